"""Whose fault a failed step is: its rows are fed in halves until those that fail alone are found."""

from __future__ import annotations

from collections.abc import Sequence

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


def halves(rows: Sequence[Row]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Two parts about equal, cut where one adapter's rows end if they are of several."""
    ends = [i for i in range(1, len(rows)) if rows[i].worn != rows[i - 1].worn] or range(1, len(rows))
    cut = min(ends, key=lambda i: abs(2 * i - len(rows)))
    return rows[:cut], rows[cut:]
