"""The progress bar of a run: loss, learning rate, tokens a second, time left."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def note(text: str) -> None:
    """A line on stderr that the user should not miss; above the bar, if one is shown."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[yellow]note:[/] {escape(text)}")


class Bar:
    """Shown on stderr; nothing at all if `show` is false."""

    def __init__(self, total: int, done: int, show: bool):
        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not show,
        )
        self.task = self.progress.add_task("", total=total, completed=done, said="")
        self.last: tuple[float, float] | None = None
        self.speed = 0.0

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def update(self, metrics: Mapping[str, float]) -> None:
        """Show the numbers of one more step."""
        now = time.perf_counter()
        if self.last is not None:
            speed = (metrics["tokens"] - self.last[1]) / max(now - self.last[0], 1e-9)
            self.speed = 0.9 * self.speed + 0.1 * speed if self.speed else speed
        self.last = now, metrics["tokens"]
        val = f" val {metrics['val_loss']:.4f}" if "val_loss" in metrics else ""
        said = f"loss {metrics['loss']:.4f}{val} lr {metrics['lr']:.2e} {self.speed:,.0f} tok/s"
        self.progress.update(self.task, advance=1, said=said)
