"""What an evaluation found: a cell per adapter and task, tables of them, and paired comparisons on the same items."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError, unknown
from inlay.core.files import write_text
from inlay.evaluate.stats import Paired, paired

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One adapter on one task."""

    adapter: str
    """Its name; `base` for the bare model."""
    dataset: str
    n: int
    """Items scored."""
    correct: int
    accuracy: float
    """Percent."""
    low: float
    """95 % Wilson interval of the accuracy, percent."""
    high: float
    no_answer: int
    """Items from which no answer could be extracted; they count as wrong."""
    truncated: int
    """Items that hit the limit of tokens."""
    shortened: int
    """Items whose prompt lost its middle to fit the base's context."""
    seconds: float
    """Compute time; a mixed batch's is shared out evenly among its rows."""


REPORT = "report.json"


def saved_cells(folder: Path | None) -> list[Cell]:
    """The cells of the report in a folder, if there is one."""
    path = folder / REPORT if folder else None
    if path is None or not path.exists():
        return []
    try:
        return [Cell(**cell) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    except (ValueError, KeyError, TypeError) as e:
        raise InlayError(f"{path} is damaged ({e!r}); delete it: what is asked for next is put there again") from e


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`."""

    cells: tuple[Cell, ...]
    settings: Mapping[str, Any]
    """Everything that made the numbers: protocol, decoding, data, adapters' digests."""
    right: Mapping[tuple[str, str], Mapping[int, bool]] = field(repr=False)
    """(adapter, data set) -> record's index -> whether it was right."""

    @property
    def adapters(self) -> list[str]:
        """In the order asked for."""
        return list(dict.fromkeys(c.adapter for c in self.cells))

    @property
    def datasets(self) -> list[str]:
        """In the order asked for."""
        return list(dict.fromkeys(c.dataset for c in self.cells))

    def cell(self, adapter: str, dataset: str) -> Cell:
        """One cell by its names."""
        found = next((c for c in self.cells if (c.adapter, c.dataset) == (adapter, dataset)), None)
        if found is None:
            raise unknown("cell", (adapter, dataset), [(c.adapter, c.dataset) for c in self.cells])
        return found

    def average(self, adapter: str) -> float:
        """Mean accuracy over the tasks it was scored on, each weighing the same, as published tables have it."""
        own = [c.accuracy for c in self.cells if c.adapter == adapter]
        return sum(own) / len(own)

    def whole(self, adapter: str) -> bool:
        """Whether it was scored on every task of the report: averages of others are of other tasks."""
        return all((adapter, d) in self.right for d in self.datasets)

    def compare(self, first: str, second: str, seed: int = 0) -> dict[str, Paired]:
        """Two adapters on the same items: per data set that both were scored on, and over all items of these as `all`
        if there are several."""
        for name in (first, second):
            if name not in self.adapters:
                raise unknown("adapter in this report", name, self.adapters)
        common = [d for d in self.datasets if (first, d) in self.right and (second, d) in self.right]
        pairs = {d: (self.right[first, d], self.right[second, d]) for d in common}
        sides = {d: ([a[i] for i in a], [b[i] for i in a]) for d, (a, b) in pairs.items()}
        if len(sides) > 1:
            sides["all"] = tuple(list(itertools.chain(*(s[i] for s in sides.values()))) for i in (0, 1))  # type: ignore[assignment]
        return {d: paired(a, b, seed) for d, (a, b) in sides.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: settings, cells, averages and comparisons."""
        return {
            "settings": _shown(self.settings),
            "cells": [asdict(c) for c in self.cells],
            "average": {a: self.average(a) for a in self.adapters if self.whole(a)},
            "comparisons": [
                {**asdict(p), "first": a, "second": b, "only_first": p.first, "only_second": p.second, "dataset": d}
                for a, b in itertools.combinations(self.adapters, 2)
                for d, p in self.compare(a, b).items()
            ],
        }

    def markdown(self) -> str:
        """Accuracies, the details of each cell, comparisons and settings."""
        parts = [_matrix(self)] if len(self.datasets) > 1 else []
        parts += [_details(self), _comparisons(self)] if len(self.adapters) > 1 else [_details(self)]
        made = json.dumps(_shown(self.settings), indent=1, ensure_ascii=False)
        return "\n\n".join([*parts, f"Settings\n\n```json\n{made}\n```"]) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `report.json` and `report.md`."""
        plain = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_text(Path(folder) / REPORT, plain)
        write_text(Path(folder) / "report.md", self.markdown())

    def table(self) -> Table:
        """For the terminal; where that is narrow, headings are broken and never numbers."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        head, rows = _detail_rows(self)
        title = f"accuracy, % ({self.settings['protocol']}, {self.settings['how']})"
        out = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
        for i, name in enumerate(head[:7]):
            wide, left = max(len(row[i]) for row in rows), i < 2
            out.add_column(name, justify="left" if left else "right", min_width=wide, no_wrap=left, overflow="fold")
        for row in rows:
            out.add_row(*row[:7])
        return out


def _shown(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a reader wants them: the base's fingerprint is some sixty numbers, which `settings.json` has."""
    base = json.dumps(settings["base"], sort_keys=True).encode()
    form = {"base_form": settings["base"]["form"]} if "form" in settings["base"] else {}
    return {**settings, "base": hashlib.sha256(base).hexdigest()[:16], **form}


def _grid(head: list[str], rows: list[list[str]], left: int) -> str:
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _matrix(report: Report) -> str:
    said = {(c.adapter, c.dataset): f"{c.accuracy:.1f}" for c in report.cells}
    rows = [
        [a, *(said.get((a, d), "") for d in report.datasets), f"{report.average(a):.1f}" if report.whole(a) else ""]
        for a in report.adapters
    ]
    return _grid(["accuracy, %", *report.datasets, "average"], rows, 1)


def _detail_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    head = ["adapter", "task", "n", "accuracy", "95 % interval", "no answer, %", "truncated, %", "shortened", "seconds"]
    rows = [
        [
            c.adapter,
            c.dataset,
            str(c.n),
            f"{c.accuracy:.1f}",
            f"{c.low:.1f}-{c.high:.1f}",
            f"{100 * c.no_answer / c.n:.1f}",
            f"{100 * c.truncated / c.n:.1f}",
            str(c.shortened),
            f"{c.seconds:.1f}",
        ]
        for c in report.cells
    ]
    return head, rows


def _details(report: Report) -> str:
    return _grid(*_detail_rows(report), 2)


def _span(pair: Paired) -> str:
    return f"{pair.low:+.1f} to {pair.high:+.1f}"


def _comparisons(report: Report) -> str:
    head = ["first", "second", "task", "n", "only first", "only second", "difference", "95 % interval", "p (McNemar)"]
    rows = [
        [a, b, d, *map(str, (p.n, p.first, p.second)), f"{p.difference:+.1f}", _span(p), f"{p.p:.2g}"]
        for a, b in itertools.combinations(report.adapters, 2)
        for d, p in report.compare(a, b).items()
    ]
    return "Paired, on the same items, in points\n\n" + _grid(head, rows, 3)
