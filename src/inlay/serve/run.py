"""A server process: what `inlay serve` starts, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from types import FrameType
from typing import Any

import uvicorn

from inlay.api import attach
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.library.bank import Bank
from inlay.models.base import load_base
from inlay.serve.app import make_app
from inlay.serve.batcher import Batcher
from inlay.serve.gate import Doors
from inlay.serve.metrics import Metrics
from inlay.serve.service import Service
from inlay.serve.settings import ServeSettings
from inlay.serve.text import Texts
from inlay.tasks import template_choice
from inlay.tasks.template_choice import shown
from inlay.threads import set_threads

log = logging.getLogger(__name__)


def run(s: ServeSettings) -> None:
    """Load the base, serve until a signal, end what is in flight."""
    logging.basicConfig(level=s.log.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    s.keys()
    template_choice.check(s.template)
    doors, door = Doors(), listening_at(s.host, s.port)
    app, batcher = application(s, doors)
    if s.host not in ("127.0.0.1", "localhost", "::1") and s.keys()[0] is None:
        log.warning("listening at %s without an API key: anybody who reaches it may use it", s.host)
    config = uvicorn.Config(app, s.host, s.port, log_config=None, access_log=s.log in ("info", "debug"),
                            timeout_graceful_shutdown=int(s.drain) + 1, server_header=False)  # fmt: skip
    try:
        Server(config, doors, batcher, s.drain, s.drain_delay).run([door])
    finally:
        batcher.stop(10)


def listening_at(host: str, port: int) -> socket.socket:
    """The door, taken before anything slow is done; nobody is let in yet.

    Raises:
        InlayError: the address is in use, or not this machine's.
    """
    door = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind((host, port))
    except OSError as e:
        door.close()
        raise InlayError(
            f"cannot listen at {host}:{port}: {(e.strerror or str(e)).lower()}; choose another --port or --host"
        ) from e
    return door


def application(s: ServeSettings, doors: Doors | None = None) -> tuple[Any, Batcher]:
    """(an ASGI application for any server, its batcher), the base loaded."""
    s.keys()
    set_threads(s.threads)
    model, tokenizer = load_base(s.model, s.dtype, s.device)
    return build(s, attach(model), tokenizer, doors or Doors())


def build(s: ServeSettings, host: Host, tokenizer: Any, doors: Doors) -> tuple[Any, Batcher]:
    """(the ASGI application, its batcher, not yet started: the application's lifespan starts it)."""
    metrics = Metrics()
    adapters = Bank(host, s.adapters, s.base_names, int(s.adapter_memory * 2**30), trial=True)
    batcher = Batcher(host, tokenizer, adapters, rows=s.rows, longest=s.longest, waiting=s.waiting, prefill=s.prefill,
                      watch=metrics.watch())  # fmt: skip
    metrics.follow(batcher, adapters)
    vocabulary = host.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    service = Service(batcher, adapters, Texts(tokenizer, vocabulary, s.template), s.timeout)
    app = make_app(service, metrics, doors, *s.keys(), body=s.body)

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        batcher.post = asyncio.get_running_loop().call_soon_threadsafe
        batcher.start()
        log.info("serving %s with %d adapters", s.model, len(adapters.names()))
        asked = shown(service.prompting.default)
        others = "" if s.template else "; adapters by the template that they were trained with"
        log.info("conversations become prompts by %s%s", asked, others)
        try:
            yield
        finally:
            await asyncio.to_thread(batcher.stop, 10)

    app.router.lifespan_context = lifespan
    return app, batcher


class Server(uvicorn.Server):
    """uvicorn, which on the first signal says that it is not ready, then takes nothing new, ends what is in flight, and
    only then leaves; on the second signal it leaves at once."""

    def __init__(self, config: uvicorn.Config, doors: Doors, batcher: Batcher, drain: float, delay: float):
        super().__init__(config)
        self.doors, self.batcher, self.drain, self.delay = doors, batcher, drain, delay
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.doors.ready or self._loop is None or not self.started:
            self.should_exit = self.force_exit = True
            return
        self.doors.ready = False
        log.info("%s: ending %d requests", signal.Signals(sig).name, self.batcher.jobs)
        self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(self._drain()))

    async def _drain(self) -> None:
        await asyncio.sleep(self.delay)
        self.doors.open = False
        end = asyncio.get_running_loop().time() + self.drain
        while self.batcher.jobs and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        if self.batcher.jobs:
            log.warning("%d rows did not end in %g s and are given up", self.batcher.jobs, self.drain)
            await asyncio.to_thread(self.batcher.stop, 10)
        self.should_exit = True
