"""Knowledge items: one question, its answer, and other ways to ask and to answer. Kept as JSON lines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.files import write_text


@dataclass(frozen=True)
class Item:
    """One fact, asked for."""

    id: str
    """Unlike any other item's of its file."""
    prompt: str
    """The question, or a sentence to complete."""
    target: str
    """The answer to be learned."""
    aliases: tuple[str, ...] = ()
    """Other answers that count as right."""
    relation: str = ""
    """What kind of fact it is, e.g. `place of birth`."""
    subject: str = ""
    """Whom or what it is about."""
    paraphrases: tuple[str, ...] = ()
    """Other wordings of the prompt. Never trained on by this package."""
    split: str = "train"
    """`train`, `val` or `test`."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The target, then its aliases."""
        return (self.target, *self.aliases)


FIELDS = {f.name: f for f in dataclasses.fields(Item)}
_LISTS = ("aliases", "paraphrases")


def read_items(path: str | Path, split: str | None = None) -> list[Item]:
    """The items of a JSON-lines file, one object a line; blank lines are passed over.

    Args:
        split: only the items of this split.

    Raises InlayError, naming file and line, for what is no item and for an id that occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise InlayError(f"there is no file of items {str(path)!r}; it holds one JSON object a line")
    items: list[Item] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        at = f"{path}, line {number}"
        try:
            item = item_of(json.loads(line))
        except json.JSONDecodeError as e:
            raise InlayError(f"{at}: no JSON ({e}); each line holds one object") from e
        except InlayError as e:
            raise InlayError(f"{at}: {e}") from e
        if item.id in seen:
            raise InlayError(f"{at}: id {item.id!r} is already that of line {seen[item.id]}; give each item its own")
        seen[item.id] = number
        items.append(item)
    if not items:
        raise InlayError(f"{path} holds no items")
    chosen = [i for i in items if split in (None, i.split)]
    if not chosen:
        there = ", ".join(sorted({i.split for i in items}))
        raise InlayError(f"{path} has no items of split {split!r}; its splits are: {there}")
    return chosen


def item_of(value: Any) -> Item:
    """An item from a mapping. Raises InlayError for unknown, missing, empty or wrongly typed fields."""
    if not isinstance(value, Mapping):
        raise InlayError(f"an item is an object with {', '.join(FIELDS)}; this is {type(value).__name__}")
    if strange := [str(k) for k in value if k not in FIELDS]:
        raise InlayError(f"unknown field {strange[0]!r}; an item has {', '.join(FIELDS)}")
    if lacking := [n for n in ("id", "prompt", "target") if n not in value]:
        raise InlayError(f"no field {lacking[0]!r}")
    made: dict[str, Any] = {}
    for name, given in value.items():
        if name in _LISTS:
            if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(t, str) for t in given):
                raise InlayError(f"field {name!r} must be a list of texts, not {given!r}")
            made[name] = tuple(given)
        elif isinstance(given, str):
            made[name] = given
        else:
            raise InlayError(f"field {name!r} must be a text, not {given!r}")
    for name in ("id", "prompt", "target"):
        if not made[name].strip():
            raise InlayError(f"field {name!r} is empty")
    return Item(**made)


def write_items(path: str | Path, items: Iterable[Item]) -> None:
    """Write items as JSON lines, at once; `read_items` gives the same back. Fields at their default are left out."""
    lines = [json.dumps(_plain(item), ensure_ascii=False) + "\n" for item in items]
    write_text(Path(path), "".join(lines))


def _plain(item: Item) -> dict[str, Any]:
    return {n: v for n, f in FIELDS.items() if (v := getattr(item, n)) != f.default}


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 over all fields, in order."""
    content = hashlib.sha256()
    for item in items:
        content.update(json.dumps([getattr(item, n) for n in FIELDS], ensure_ascii=False).encode() + b"\n")
    return content.hexdigest()
