"""What every request meets first: keys, size, whether the server still takes requests; and what counts it."""

from __future__ import annotations

import hmac
import time
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inlay.serve.errors import Refused
from inlay.serve.metrics import Metrics

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/admin/adapters", "/health", "/ready", "/metrics")


@dataclass
class Doors:
    """Whether requests are taken."""

    ready: bool = True
    """What /ready says."""
    open: bool = True
    """Whether new requests are taken."""


class Gate:
    """ASGI middleware.

    Args:
        api_key: for /v1; None: open.
        admin_key: for /admin; None: closed.
        most: bytes of a body.
    """

    def __init__(
        self, app: ASGIApp, doors: Doors, metrics: Metrics, api_key: str | None, admin_key: str | None, most: int
    ):
        self.app, self.doors, self.metrics, self.most = app, doors, metrics, most
        self.api_key, self.admin_key = api_key, admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.perf_counter(), 499  # who leaves before an answer begins, as nginx counts it

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
            await self.app(scope, self._measured(receive), counted)
        except Refused as e:
            await refusal(e)(scope, receive, counted)
        finally:
            path = next((p for p in PATHS if scope["path"] == p or scope["path"].startswith(p + "/")), "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)

    def _check(self, path: str, headers: Headers) -> None:
        if path.startswith("/admin"):
            if self.admin_key is None:
                raise Refused(
                    "adapters cannot be changed: this server was started without an admin key (INLAY_ADMIN_KEY)",
                    403,
                    "closed",
                )
            _same(headers, self.admin_key, "the admin key")
        elif path.startswith("/v1"):
            if not self.doors.open:
                raise Refused("the server is going down; ask another one", 503, "shutting_down")
            if self.api_key is not None:
                _same(headers, self.api_key, "an API key")
        if int(headers.get("content-length") or 0) > self.most:
            raise self._too_large()

    def _measured(self, receive: Receive) -> Receive:
        read = 0

        async def measured() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:  # FastAPI lets this one pass while it reads a body
                raise HTTPException(413, str(self._too_large()))
            return message

        return measured

    def _too_large(self) -> Refused:
        return Refused(f"the request is larger than {self.most} bytes", 413, "too_large")


def _same(headers: Headers, key: str, what: str) -> None:
    given = headers.get("authorization", "")
    if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise Refused(f"give {what} in the header: Authorization: Bearer KEY", 401, "invalid_api_key")


def refusal(e: Refused) -> JSONResponse:
    """An error as OpenAI's clients read it; whether to try again is said in their headers."""
    headers: dict[str, Any] = {"x-should-retry": "true" if e.again else "false"}
    if e.again:
        headers["retry-after"] = "1"
    return JSONResponse(e.body(), e.status, headers)
