"""What is trained on and scored: rows of tokens with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from inlay.core.errors import InlayError

IGNORED = -100


class Example(Protocol):
    """One row of tokens, as `inlay.tasks.encode` makes it."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""

    @property
    def labels(self) -> list[int]:
        """The same, -100 where nothing is learned."""


@dataclass(frozen=True)
class Tokens:
    """An example of plain lists."""

    input_ids: list[int]
    labels: list[int]


def as_example(row: Any, place: str) -> Example:
    """Return a row as an example: one already, or a mapping with `input_ids` and `labels` (a row of a data set).

    Args:
        place: names the row in errors.

    Raises:
        InlayError: a field is missing, the two differ in length, or one holds something else than whole numbers.
    """
    if not isinstance(row, Mapping):
        if hasattr(row, "input_ids") and hasattr(row, "labels"):
            return row
        raise InlayError(f"{place} is a {type(row).__name__}; a row has input_ids and labels (-100: not learned)")
    values = {}
    for name in ("input_ids", "labels"):
        if (value := row.get(name)) is None:
            raise InlayError(f"{place} has no {name!r}; it has {', '.join(map(str, row)) or 'nothing'}")
        values[name] = value.tolist() if hasattr(value, "tolist") else list(value)
        if not all(isinstance(v, int) for v in values[name]):
            raise InlayError(f"{place}: {name!r} must be a flat list of whole numbers")
    if len(values["input_ids"]) != len(values["labels"]):
        raise InlayError(f"{place} has {len(values['input_ids'])} input_ids and {len(values['labels'])} labels")
    return Tokens(**values)


def scored(labels: Sequence[int]) -> int:
    """Labels that are predicted from the tokens before: the first one never is."""
    return sum(label != IGNORED for label in labels[1:])


def unlearned(labels: Sequence[int]) -> int:
    """Tokens before the first label: the prompt."""
    return next((t for t, label in enumerate(labels) if label != IGNORED), len(labels))


def learned(example: Example) -> int:
    """The same of an example."""
    return scored(example.labels)
