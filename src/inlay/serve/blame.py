"""Whose fault a failed step is: its rows are fed in halves until those that fail alone are found, and such a row with
one of its adapters at a time, and with none."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inlay.core.route import Worn
from inlay.evaluate.rows import Row
from inlay.evaluate.running import Running


def apart(running: Running, error: Exception) -> tuple[list[Row], list[tuple[Row, Exception]]]:
    """After `running.step` has raised: (rows that got their token after all, rows that fail alone, with their errors).

    A step of n rows takes at most 2 n - 2 forwards more, about 2 log n if one row fails: rows that wear the same stay
    together as long as they can. What fails for its size alone (memory) passes in halves, and nobody is blamed.
    """
    fed: list[Row] = []
    failed: list[tuple[Row, Exception]] = []

    def feed(rows: Sequence[Row], why: Exception) -> None:
        if len(rows) == 1 or running.torn:
            failed.extend((row, why) for row in rows)
            return
        for half in halves(rows):
            try:
                fed.extend(running.again(half))
            except Exception as e:
                feed(half, e)

    feed(sorted(running.fed, key=lambda row: row.worn), error)
    return fed, failed


def at_fault(running: Running, row: Row, error: Exception) -> list[Worn]:
    """Which of the adapters on a row that `apart` found make its forward fail: those that fail by themselves, or else
    all of them together. Nothing if the bare base fails as well, if the row passes now, or if memory was short.

    Takes at most a forward per adapter and two more; the row is to be dropped then.
    """

    def fails(worn: Worn) -> bool:
        try:
            running.try_on(row, worn)
        except Exception as e:
            return not _of_memory(e)
        return False

    if not row.worn or running.torn or _of_memory(error):
        return []
    found: list[Worn] = [(name,) for name in row.worn if fails((name,))]
    if not found and len(row.worn) > 1 and fails(row.worn):
        found = [row.worn]
    return found if found and not fails(()) else []


def _of_memory(e: Exception) -> bool:
    return isinstance(e, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(e)


def halves(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Two parts about equal, cut where one adapter's rows end if they are of several."""
    ends = [i for i in range(1, len(rows)) if rows[i].worn != rows[i - 1].worn] or range(1, len(rows))
    cut = min(ends, key=lambda i: abs(2 * i - len(rows)))
    return rows[:cut], rows[cut:]
