"""The methods, one file a family. A file lists its rows in `METHODS`; a new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from inlay.core.edit import Edit
from inlay.core.errors import unknown
from inlay.core.method import Method
from inlay.methods.compose import EDITS as COMPOSED

METHODS: dict[str, Method] = {
    row.name: row
    for module in pkgutil.iter_modules(__path__)
    for row in getattr(importlib.import_module(f"{__name__}.{module.name}"), "METHODS", ())
}
"""Name -> method, over all files of this folder."""
EDITS: dict[str, type[Edit]] = {row.edit.kind: row.edit for row in METHODS.values()} | {e.kind: e for e in COMPOSED}
"""The name that files carry -> edit."""


def method(name: str) -> Method:
    """A method by its name."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]
