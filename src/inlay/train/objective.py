"""What a step minimises. By default the mean over learned tokens; others may weigh examples and add terms.

An objective sees each group of rows that is computed together, and what the whole effective batch has, so that its sum
over groups and ranks is one loss of that batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from inlay.engine.example import Example, learned
from inlay.engine.head import Read
from inlay.train.ways import Way

Reduce = Callable[[Sequence[Example], Tensor, Tensor | None], Tensor]
"""(rows, cross entropy and what was read of their learned tokens (N,)) -> numbers of each row (rows, K)."""
Survey = Callable[[Sequence[Example], Read | None, Reduce, int], Tensor]
"""K numbers of each example (B, K), float64, the same on all ranks: computed without gradients and dropout."""


class Objective(Protocol):
    """All ranks call the same methods in the same order; `loss` as often as each has groups."""

    rate: float
    """What the learning rate of this step is multiplied by."""

    @property
    def digest(self) -> str:
        """Names what decides the objective beside the settings: a run goes on under the same one only."""

    def prepare(self, survey: Survey) -> None:
        """Before the first step of a session."""

    def begin(self, examples: Sequence[Example], done: float, survey: Survey) -> None:
        """Before a step on these examples, of all ranks; `done` is the share of steps taken, 1 at the last."""

    def loss(self, way: Way, rows: Sequence[Example]) -> Tensor:
        """What these rows, some of the step's, add to the loss."""

    def end(self, sums: Callable[[Sequence[float]], list[float]]) -> dict[str, Any]:
        """After the backward passes; what the metrics should say. `sums` adds up over ranks."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint."""


class TokenMean:
    """Cross entropy over learned tokens, divided by their number in the whole effective batch."""

    rate, digest = 1.0, ""

    def prepare(self, survey: Survey) -> None:
        """Nothing."""

    def begin(self, examples: Sequence[Example], done: float, survey: Survey) -> None:
        """Count."""
        self.count = sum(map(learned, examples))

    def loss(self, way: Way, rows: Sequence[Example]) -> Tensor:
        """Their share of the mean."""
        return way.loss(rows) / self.count

    def end(self, sums: Callable[[Sequence[float]], list[float]]) -> dict[str, Any]:
        """Nothing."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing."""
