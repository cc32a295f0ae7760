"""Gradio: the keywords of its mounting function, which come and go.

Assumption: `mount_gradio_app(app, blocks, path, ...)` takes the theme and the style sheet (from Gradio 6.0 on). What
only changes looks (`OPTIONAL`) is left out where it is not known; any other unknown keyword is an error.
"""

from __future__ import annotations

import inspect
from typing import Any

from inlay.compat.versions import check
from inlay.core.errors import InlayError

OPTIONAL = ("footer_links", "run_history")
"""Keywords that only say what a page shows beside its content."""


def mount(app: Any, page: Any, path: str, **options: Any) -> Any:
    """The application with a page mounted at `path`.

    Raises:
        VersionError: this Gradio is too old.
        InlayError: it does not know a keyword that the page needs.
    """
    check("gradio")
    import gradio

    known = inspect.signature(gradio.mount_gradio_app).parameters
    if strange := [k for k in options if k not in known and k not in OPTIONAL]:
        raise InlayError(f"Gradio {gradio.__version__} does not know {strange[0]!r}: pip install -U 'inlay[play]'")
    return gradio.mount_gradio_app(app, page, path, **{k: v for k, v in options.items() if k in known})
