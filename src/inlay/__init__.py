"""Inlay: any adapter, at any place, in any decoder; trained, mixed in one batch, saved, merged and read back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from inlay.compat.versions import check_required

__version__ = "0.1.0"

check_required()

_HOME = {
    **dict.fromkeys(("attach", "host_of", "save", "load", "merge", "merged"), "inlay.api"),
    **dict.fromkeys(("METHODS", "method"), "inlay.methods"),
    "load_base": "inlay.models.base",
    "InlayError": "inlay.core.errors",
}
__all__ = [
    "METHODS",
    "InlayError",
    "__version__",
    "attach",
    "host_of",
    "load",
    "load_base",
    "merge",
    "merged",
    "method",
    "save",
]

if TYPE_CHECKING:
    from inlay.api import attach, host_of, load, merge, merged, save
    from inlay.core.errors import InlayError
    from inlay.methods import METHODS, method
    from inlay.models.base import load_base


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
