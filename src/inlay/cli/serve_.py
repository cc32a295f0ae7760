"""`inlay serve`: a base and its adapters over HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError

if TYPE_CHECKING:
    from inlay.serve.settings import ServeSettings


def run(s: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl+C."""
    from inlay.cli.quiet import quiet

    quiet()
    try:
        from inlay.serve import run as server
    except ModuleNotFoundError as e:
        if e.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise InlayError(f"serving needs {e.name}: pip install 'inlay[serve]'") from e
    server.run(s)


VERB = Verb(
    "serve",
    "Serve a base and its adapters over HTTP, as OpenAI's API; requests for different adapters share each batch.",
    "inlay.serve.settings:ServeSettings",
    run,
    (
        "inlay serve tiny-llama --adapters runs",
        "inlay serve llama-dir --adapters adapters more-adapters --port 8080 --rows 64 --admin-key secret",
    ),
)
