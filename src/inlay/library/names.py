"""What adapters and their compositions are called, and which folders are adapters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from inlay.core.errors import InlayError
from inlay.interop.peft_folder import CONFIG
from inlay.library.compose import Node, leaves, parse
from inlay.library.errors import BankError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
HUB = "hub:"
FILES = ("adapter.json", CONFIG)


def parts(model: str) -> list[str]:
    """The adapters that `a`, `a+b` or a composition names."""
    if "(" in model:
        return sorted(set(leaves(_parsed(model))))
    names = model.split("+")
    if len(set(names)) < len(names):
        raise BankError(f"the model {model!r} names an adapter twice; name each once", "invalid")
    return names


def render(model: str, names: Mapping[str, str]) -> str:
    """A composition with other names, in one way of writing it."""
    return _rendered(_parsed(model), names)


def adapter_in(folder: str | Path) -> Path | None:
    """The adapter that a folder is, or holds as a training run does."""
    for place in (str(folder), f"{folder}/adapter"):
        if any(os.path.isfile(f"{place}/{file}") for file in FILES):
            return Path(place)
    return None


def _parsed(model: str) -> Node:
    try:
        return parse(model)
    except (InlayError, RecursionError) as e:
        raise BankError(f"the model {model!r} cannot be read: {e}", "invalid") from e


def _rendered(node: Node, names: Mapping[str, str]) -> str:
    if not node.parts:
        return names[node.name]
    weights = [f"{weight!r}*" if node.name == "sum" else "" for weight, _ in node.parts]
    inner = [w + _rendered(part, names) for w, (_, part) in zip(weights, node.parts, strict=True)]
    return f"{node.name}({', '.join(inner)})"
