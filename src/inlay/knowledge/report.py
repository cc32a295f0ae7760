"""A report of knowledge learning from plain data: checked first, then drawn, with every number beside its picture.

The data is one mapping, as JSON holds it (docs/knowledge.md, "Report"):

    schema 1, title, about {}, notes []
    tables        name -> id, relation, tsd, em0, features, ... (`Table` as plain arrays)
    runs          [{name, method, model, condition, regime, seed, steps, presentations, em, paraphrase_em, retention,
                    table, snapshots: [{step, answers, em, distance, state, features?}], deviation?}]
    interference  [{name, curve: [{k, drop, low, high, em, retention, steps, presentations}], gradients?, influence?,
                    suppression?}]
    filter        {front (`select.front`), chosen, tsd, kept};  weights {steps, counts, edges}
    controls      [{name, against, difference, low, high, em, paraphrase_em, retention, remedy, ...}]

All parts but `schema` may be missing; an accuracy without the retention that goes with it may not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from inlay.core.errors import InlayError
from inlay.core.files import write_text
from inlay.knowledge.figures.style import Drawn, plain

SCHEMA = 1
PARTS = ("schema", "title", "about", "notes", "tables", "runs", "interference", "filter", "weights", "controls")
NEEDED = ("em", "paraphrase_em", "retention")


def validate(data: Mapping[str, Any]) -> None:
    """Raises InlayError for another schema, unknown parts, a run without its accuracies, and one without retention."""
    if data.get("schema") != SCHEMA:
        raise InlayError(f"a report's data has schema {SCHEMA}, not {data.get('schema')!r}; make it with this version")
    if strange := [k for k in data if k not in PARTS]:
        raise InlayError(f"unknown part {strange[0]!r} in a report's data; there is: {', '.join(PARTS)}")
    for where, entry, needed in _accounted(data):
        for key in needed:
            value = entry.get(key)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or not 0 <= value <= 1:
                why = "accuracy is not reported without what it cost elsewhere: " if key == "retention" else ""
                raise InlayError(f"{where} has no {key} between 0 and 1 ({value!r}); {why}measure it with the run")
    tables = data.get("tables", {})
    for run in data.get("runs", []):
        if run.get("snapshots") and run.get("table") not in tables:
            raise InlayError(f"run {run.get('name')!r} has snapshots of table {run.get('table')!r}, which is not there")


def _accounted(data: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], tuple[str, ...]]]:
    for n, run in enumerate(data.get("runs", [])):
        yield f"run {run.get('name', n)!r}", run, NEEDED
    for one in data.get("interference", []):
        for point in one.get("curve", []):
            yield f"interference of {one.get('name')!r} at {point.get('k')} items", point, ("em", "retention")
    for n, row in enumerate(data.get("controls", [])):
        yield f"control {row.get('name', n)!r}", row, NEEDED


def build(data: Mapping[str, Any], out: str | Path, progress: bool = False) -> Path:
    """Write `report.html` (self-contained), `report.json` and `figures/*.png|json` into a folder; returns the page."""
    from inlay.knowledge import page, sections

    validate(data)
    out = Path(out)
    found: dict[str, list[Drawn]] = {}
    with _bar(progress) as step:
        for title, draw in sections.SECTIONS.items():
            step(title)
            found[title] = draw(data)
            for one in found[title]:
                one.save(out / "figures")
    write_text(out / "report.json", json.dumps(plain(data), ensure_ascii=False) + "\n")
    write_text(out / "report.html", page.html(data, found))
    return out / "report.html"


class _bar:
    """A line that says which part is drawn."""

    def __init__(self, show: bool):
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn

        self.progress = Progress(
            SpinnerColumn(), TextColumn("drawing: {task.description}"), console=Console(stderr=True), disable=not show
        )

    def __enter__(self) -> Any:
        self.progress.start()
        task = self.progress.add_task("")
        return lambda title: self.progress.update(task, description=title)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def read(path: str | Path) -> dict[str, Any]:
    """A report's data from a JSON file, or from the folder it lies in."""
    path = Path(path)
    file = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise InlayError(f"there is no {file}; give a report's JSON data or a folder that holds report.json") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InlayError(f"{file} is no JSON: {e}") from e
    if not isinstance(found, dict):
        raise InlayError(f"{file} must hold an object with {', '.join(PARTS)}")
    return found


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several reports' data as one: lists are joined, tables put together; the first one's title stands.

    Raises InlayError where two differ in what there can be only one of.
    """
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key in ("runs", "interference", "controls", "notes"):
                whole[key] = [*whole.get(key, []), *value]
            elif key in ("tables", "about"):
                twice = [k for k in value if k in whole.get(key, {}) and whole[key][k] != value[k]]
                if twice and key == "tables":
                    raise InlayError(f"two of the reports hold a different table {twice[0]!r}; rename one")
                whole[key] = {**value, **whole.get(key, {})}
            elif key in ("filter", "weights") and key in whole:
                raise InlayError(f"two of the reports have a part {key!r}; report them apart")
            else:
                whole.setdefault(key, value)
    return whole
