"""Inlay: any adapter, at any place, in any decoder; trained, mixed in one batch, saved, merged and read back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {"attach": "inlay.api", "host_of": "inlay.api", "method": "inlay.methods", "METHODS": "inlay.methods"}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from inlay.api import attach, host_of
    from inlay.methods import METHODS, method


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
