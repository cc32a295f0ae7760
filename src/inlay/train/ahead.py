"""Work on many items that goes on beside something else, such as tokenising while the base is loaded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Ahead(Generic[S, T]):
    """`make(item)` for every item, in order, on a thread of its own, from now on.

    Args:
        prepare: called first, on that thread: gives `make`.
    """

    def __init__(self, items: Iterable[S], prepare: Callable[[], Callable[[S], T]]):
        self.items: Sequence[S] = list(items)
        self._made: list[T] = []
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(prepare,), name="inlay-ahead", daemon=True)
        self._thread.start()

    def _work(self, prepare: Callable[[], Callable[[S], T]]) -> None:
        try:
            make = prepare()
            for item in self.items:
                self._made.append(make(item))
        except BaseException as e:  # told where the result is asked for
            self._failed = e

    def get(self, title: str = "", progress: bool = False) -> list[T]:
        """All of it, waiting for what is missing (with a bar, if asked); raises what `make` raised."""
        if progress and self._thread.is_alive():
            from rich.progress import Progress

            with Progress(transient=True) as bar:
                task = bar.add_task(title, total=len(self.items))
                while self._thread.is_alive():
                    self._thread.join(0.1)
                    bar.update(task, completed=len(self._made))
        self._thread.join()
        if self._failed is not None:
            raise self._failed
        return self._made
