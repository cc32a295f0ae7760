"""`inlay play`: a page where adapters answer side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.cli.verbs import Verb
from inlay.core.errors import InlayError

if TYPE_CHECKING:
    from inlay.serve.settings import PlaySettings


def run(s: PlaySettings) -> None:
    """Show the page until Ctrl+C or SIGTERM."""
    from inlay.cli.quiet import quiet

    quiet()
    try:
        from inlay.serve import play
    except ModuleNotFoundError as e:
        if e.name not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise InlayError(f"the playground needs {e.name}: pip install 'inlay[play]'") from e
    play.run(s)


VERB = Verb(
    "play",
    "A web page where one prompt goes to several adapters at once: they answer side by side, in one batch.",
    "inlay.serve.settings:PlaySettings",
    run,
    (
        "inlay play tiny-llama --adapters runs/demo",
        "inlay play llama-dir --adapters adapters hub:org/name --port 8080 --device cuda",
    ),
)
