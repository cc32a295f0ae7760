"""The HTTP routes: OpenAI's, those of administrators, and those that machines ask."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from inlay import __version__
from inlay.library.errors import BankError
from inlay.serve.errors import Refused
from inlay.serve.gate import PATHS, Doors, Gate, refusal
from inlay.serve.metrics import Metrics
from inlay.serve.service import Reply, Service
from inlay.serve.wire import ChatRequest, CompletionRequest, LoadRequest

T = TypeVar("T")
log = logging.getLogger(__name__)

OBJECT = "the body must be a JSON object, sent with the header Content-Type: application/json"
NO_OBJECT = ("missing", "model_attributes_type", "dict_type", "model_type")
"""What pydantic calls a body that is none, or is not an object."""


def make_app(
    service: Service,
    metrics: Metrics,
    doors: Doors | None = None,
    api_key: str | None = None,
    admin_key: str | None = None,
    body: int = 2_000_000,
) -> FastAPI:
    """An ASGI application over a running batcher; `doors` says whether requests are taken."""
    doors = doors or Doors()
    app = FastAPI(title="Inlay", version=__version__, openapi_url="/openapi.json")
    app.state.service = service
    app.add_middleware(Gate, doors=doors, metrics=metrics, api_key=api_key, admin_key=admin_key, most=body)
    _errors(app)
    _openai(app, service)
    _admin(app, service, metrics)
    _machines(app, service, metrics, doors)
    return app


def _openai(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, begin: Awaitable[Reply]) -> Response:
        reply = await begin
        if reply.asked.stream:
            return Events(reply)
        try:
            found = await unless_gone(request.receive, reply.whole())
        finally:
            reply.close()
        return Response(json.dumps(found), media_type="application/json")

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await answer(request, service.chat(asked))

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await answer(request, service.complete(asked))

    def model(name: str, parent: str | None) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": 0, "owned_by": "inlay", "parent": parent}

    own = service.adapters.base[0]

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        adapters = [model(name, own) for name in service.adapters.names()]
        return {"object": "list", "data": [model(own, None), *adapters]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        if name in service.adapters.base:
            return model(name, None)
        if not service.adapters.has(name):
            raise BankError(f"the model {name!r} does not exist", "unknown")
        return model(name, own)


def _admin(app: FastAPI, service: Service, metrics: Metrics) -> None:
    adapters = service.adapters

    async def change(what: str, function: Callable[[], T]) -> T:
        try:
            done = await service.on_model(function)
        except BankError:
            metrics.changes.labels("refused").inc()
            raise
        metrics.changes.labels(what).inc()
        return done

    @app.get("/admin/adapters")
    async def listed() -> dict[str, Any]:
        return {"adapters": adapters.describe()}

    @app.post("/admin/adapters/{name:path}", status_code=201)
    async def load(name: str, asked: LoadRequest | None = None) -> dict[str, Any]:
        source = asked.source if asked else None
        made = await change("loaded", lambda: adapters.load(name, source))
        return {"name": name, "source": made.source}

    @app.put("/admin/adapters/{name:path}")
    async def replace(name: str, asked: LoadRequest | None = None) -> dict[str, Any]:
        source = asked.source if asked else None
        made = await change("replaced", lambda: adapters.load(name, source, replacing=True))
        return {"name": name, "source": made.source}

    @app.delete("/admin/adapters/{name:path}")
    async def unload(name: str) -> dict[str, Any]:
        await change("unloaded", lambda: adapters.unload(name))
        return {"name": name, "deleted": True}


def _machines(app: FastAPI, service: Service, metrics: Metrics, doors: Doors) -> None:
    @app.get("/health")
    async def health() -> Response:
        alive = service.batcher.alive
        return JSONResponse({"status": "ok" if alive else "the model's thread has ended"}, 200 if alive else 503)

    @app.get("/ready")
    async def ready() -> Response:
        fine = service.batcher.alive and doors.ready
        return JSONResponse({"status": "ready" if fine else "going down"}, 200 if fine else 503)

    @app.get("/metrics")
    async def metrics_text() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(Refused)
    async def refused(request: Request, e: Refused) -> Response:
        return refusal(e)

    @app.exception_handler(BankError)
    async def by_bank(request: Request, e: BankError) -> Response:
        return refusal(Refused.by_bank(e))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, e: RequestValidationError) -> Response:
        first = e.errors()[0]
        if first["type"] == "json_invalid":
            said = f"the body is not JSON, from character {first['loc'][-1]} on: {first['ctx']['error']}"
            return refusal(Refused(said, 400, "invalid_request"))
        if tuple(first["loc"]) == ("body",) and first["type"] in NO_OBJECT:
            return refusal(Refused(OBJECT, 400, "invalid_request"))
        where = ".".join(str(p) for p in first["loc"] if p != "body")
        what = first["msg"].removeprefix("Value error, ")
        unknown = first["type"] == "extra_forbidden"
        said = f"this server does not know the field {where!r}" if unknown else f"{where}: {what}" if where else what
        return refusal(Refused(said, 400, "invalid_request", where or None))

    @app.exception_handler(HTTPException)
    async def http(request: Request, e: HTTPException) -> Response:
        if e.status_code == 400 and request.method in ("POST", "PUT"):  # FastAPI could not read the body
            return refusal(Refused(OBJECT, 400, "invalid_request"))
        there = f"; there are {', '.join(PATHS)}" if e.status_code == 404 else ""
        found = refusal(Refused(f"{request.method} {request.url.path}: {e.detail}{there}", e.status_code))
        found.headers.update(e.headers or {})
        return found

    @app.exception_handler(Exception)
    async def broken(request: Request, e: Exception) -> Response:
        return refusal(Refused(f"the server failed: {type(e).__name__}", 500, "internal_error"))


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """The work's result; Refused (499) and the work cancelled if the client leaves first."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Refused("the client has left", 499, "client_gone")
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class Events(Response):
    """Server-sent events of a reply, until its end or until the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, reply: Reply):
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.reply = reply

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with contextlib.suppress(OSError, Refused):  # both mean that nobody listens
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await unless_gone(receive, self._send(send))
        finally:
            self.reply.close()

    async def _send(self, send: Send) -> None:
        async for lines in self._lines():
            await send({"type": "http.response.body", "body": lines.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for pieces in self.reply.pieces():
                yield "".join(f"data: {json.dumps(p)}\n\n" for p in pieces)
            yield "data: [DONE]\n\n"
        except Refused as e:
            yield f"data: {json.dumps(e.body())}\n\n"
