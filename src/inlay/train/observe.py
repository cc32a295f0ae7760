"""Observers: whoever watches a run while it goes on, and writes beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from inlay.train.loop import Loop


class Observer(Protocol):
    """Called on all ranks, in the same order. It draws no random numbers and changes nothing of the run; forwards that
    are not the loop's own stand inside `with loop.aside():`."""

    def begin(self, loop: Loop, run_dir: Path) -> None:
        """Before the first step of a session; `loop.step` steps are done, and what was written of later ones is to be
        forgotten."""

    def before_step(self, loop: Loop) -> None:
        """Before each step."""

    def after_step(self, loop: Loop) -> dict[str, float]:
        """After each step, before it is saved; what the metrics of this step should say besides."""
