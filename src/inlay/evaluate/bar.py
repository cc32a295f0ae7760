"""The progress bar of whatever goes through many prompts."""

from __future__ import annotations

from typing import Any


def bar(show: bool) -> Any:
    """A rich `Progress` on stderr, to be entered; nothing at all if `show` is false."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not show)
