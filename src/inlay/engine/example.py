"""What is trained on and scored: rows of tokens with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

IGNORED = -100


class Example(Protocol):
    """One row of tokens, as `inlay.tasks.encode` makes it."""

    @property
    def input_ids(self) -> list[int]:
        """Token ids."""

    @property
    def labels(self) -> list[int]:
        """The same, -100 where nothing is learned."""


def scored(labels: Sequence[int]) -> int:
    """Labels that are predicted from the tokens before: the first one never is."""
    return sum(label != IGNORED for label in labels[1:])


def unlearned(labels: Sequence[int]) -> int:
    """Tokens before the first label: the prompt."""
    return next((t for t, label in enumerate(labels) if label != IGNORED), len(labels))


def learned(example: Example) -> int:
    """The same of an example."""
    return scored(example.labels)
