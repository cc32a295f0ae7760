"""SIGTERM while training: schedulers and containers send it before they kill."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Termination:
    """Whether SIGTERM has arrived."""

    requested: bool = False


@contextlib.contextmanager
def termination() -> Iterator[Termination]:
    """Note a first SIGTERM in this block instead of dying of it; a second one does what it did before.

    Python hands signals to the main thread only: in others nothing is changed.
    """
    noted = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        noted.requested = True
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGTERM, before)
