"""A tiny base with adapters in folders, and servers of it: in this process, or as `inlay serve`."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

import inlay
from inlay.serve.gate import Doors
from inlay.serve.run import build
from inlay.serve.settings import ServeSettings
from tests.evaluate import tiny
from tests.library.folders import SMALL, host, write  # noqa: F401 (for tests of servers)

ADMIN = {"Authorization": "Bearer boss"}


@dataclass
class Served:
    """A server that runs."""

    url: str
    app: Any = None
    batcher: Any = None
    process: subprocess.Popen[str] | None = None

    def client(self, **more: Any) -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", **({"api_key": "none", "max_retries": 0} | more))

    def http(self, method: str, path: str, **more: Any) -> httpx.Response:
        """A plain request."""
        return httpx.request(method, self.url + path, timeout=30, **more)

    def metric(self, name: str) -> float:
        """A number from /metrics."""
        lines = self.http("GET", "/metrics").text.splitlines()
        return float(next((line.split()[-1] for line in lines if line.rsplit(" ", 1)[0] == name), 0))


@contextlib.contextmanager
def inside(root: Path, base: tuple[Any, Any] | None = None, **settings: Any) -> Iterator[Served]:
    """A server on a thread of this process, of a (host, tokenizer) or of the tiny ones."""
    told = {"adapters": (str(root / "adapters"),), "admin_key": "boss", "rows": 4, "log": "warning"} | settings
    s = ServeSettings(model=str(root / "base"), **told)
    worn, tokenizer = base or (inlay.attach(tiny.base("llama")), tiny.tokenizer())
    app, batcher = build(s, worn, tokenizer, Doors())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app, batcher)
    finally:
        server.should_exit = True
        thread.join(20)


@contextlib.contextmanager
def outside(root: Path, *flags: str) -> Iterator[Served]:
    """`inlay serve` as a process."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["serve", str(root / "base"), "--adapters", str(root / "adapters"), "--port", str(port), *flags]
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay", *words],
        env=os.environ | {"INLAY_ADMIN_KEY": "boss", "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    served = Served(f"http://127.0.0.1:{port}", process=process)
    try:
        wait(lambda: ready(served) or process.poll() is not None, 60)
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def ready(served: Served) -> bool:
    """Whether /ready says so."""
    try:
        return served.http("GET", "/ready").status_code == 200
    except httpx.HTTPError:
        return False


def wait(until: Any, seconds: float = 20) -> None:
    """Until something is true."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
