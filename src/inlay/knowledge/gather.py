"""A report's data from what other commands left: watched runs, measured tables, and reports made before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.curves import width_edges
from inlay.knowledge.exam import Exam
from inlay.knowledge.feature import Space
from inlay.knowledge.figures.style import plain
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings
from inlay.knowledge.report import SCHEMA, read
from inlay.knowledge.states import deviation, states
from inlay.knowledge.table import ABOUT, Table
from inlay.knowledge.track import FOLDER, WATCH, read_watched
from inlay.knowledge.wording import Wording
from inlay.train.yaml_file import read_yaml


def gather(path: str | Path, model: str | None = None) -> dict[str, Any]:
    """A report's data from one place: a run folder of `know watch`, a table of `know measure`, or a report.

    Args:
        model: the base, for a watched run: with it answers have features, so that there is a null of deviation.
    """
    path = Path(path)
    if (path / FOLDER / WATCH).is_file():
        return watched(path, model)
    if (path / ABOUT).is_file():
        table = Table.load(path)
        return {"schema": SCHEMA, "tables": {path.name: plain(table.rows)}, "about": {"model": table.about["model"]}}
    if not path.exists():
        raise InlayError(f"there is no {path}; give a run of `know watch`, a table of `know measure`, or a report")
    return read(path)


def watched(run_dir: Path, model: str | None = None) -> dict[str, Any]:
    """A watched run as a report's data."""
    found = read_watched(run_dir)
    if len(found.snapshots) < 2:
        raise InlayError(
            f"{run_dir} has {len(found.snapshots)} snapshots; a report needs one after the start: train on"
        )
    last = found.snapshots[-1]["summary"]
    if last["retention_em"] is None:
        raise InlayError(
            f"{run_dir} was watched without retained facts, and accuracy is not reported without what it cost; "
            "watch again with facts that are not trained on (`know watch --retention`)"
        )
    about = _told(run_dir)
    run = {
        "name": run_dir.name,
        "model": str(about.get("model", found.table.about["model"])),
        "method": str(about.get("method", "")),
        "condition": "plain",
        "regime": "",
        "seed": about.get("run", {}).get("seed"),
        "steps": found.snapshots[-1]["step"],
        "em": last["em"],
        "paraphrase_em": last["em"] if last["paraphrase_em"] is None else last["paraphrase_em"],
        "retention": last["retention_em"],
        "table": run_dir.name,
        "snapshots": found.snapshots,
    }
    notes = []
    if last["paraphrase_em"] is None:
        notes.append(f"{run_dir.name}: the items have no paraphrases; accuracy is that of the trained wording.")
    if model is not None:
        enrich(run, found.table, model)
    else:
        notes.append(f"{run_dir.name}: no null of deviation without the base (give --model).")
    tables = {run_dir.name: plain(found.table.rows)}
    return {"schema": SCHEMA, "notes": notes, "tables": tables, "runs": [plain(run)]}


def _told(run_dir: Path) -> Mapping[str, Any]:
    file = run_dir / "settings.yaml"
    told: Any = read_yaml(file) if file.is_file() else {}
    return told if isinstance(told, Mapping) else {}


def settings_of(table: Table) -> MeasureSettings:
    """The settings a table was measured with."""
    told = json.loads(json.dumps(table.about["settings"]))
    told["space"] = Space(**told["space"])
    told["wording"] = Wording(**{**told["wording"], "stop": tuple(told["wording"]["stop"])})
    return MeasureSettings(**told)


def items_of(table: Table) -> list[Item]:
    """The items of a table, without aliases and paraphrases, which it does not keep."""
    names = ("id", "prompt", "target", "relation", "subject")
    return [Item(**dict(zip(names, row, strict=True))) for row in zip(*(table[n].tolist() for n in names), strict=True)]


def enrich(run: dict[str, Any], table: Table, model: str) -> None:
    """Give a run's snapshots features, and the run its deviation with a null."""
    import inlay

    base, tokenizer = inlay.load_base(model)
    exam = Exam(inlay.attach(base), tokenizer, items_of(table), settings_of(table))
    for snap in run["snapshots"]:
        if "features" not in snap:  # soft ones were kept: they are of the adapter as it was then
            snap["features"] = exam.features(snap["answers"])
    run["deviation"] = deviate(exam, table["tsd"], table["em0"], table["relation"].tolist(), run["snapshots"])


def deviate(exam: Exam, tsd: Any, em0: Any, relation: list[str], snapshots: list[dict[str, Any]]) -> dict[str, Any]:
    """Deviation and its null at the snapshot with most items away, over items that the base gets wrong."""
    wrong = np.flatnonzero(~np.asarray(em0, bool))
    tsd = np.asarray(tsd, float)
    if not len(wrong) or len(snapshots) < 2:
        return {}

    def gone(snap: Mapping[str, Any]) -> float:
        return float(np.mean(states(tsd, snap["distance"], snap["em"], exam.tau)[wrong] == "away"))

    snap = max(snapshots[1:], key=gone)
    own = Exam(exam.host, exam.tokenizer, [exam.items[i] for i in wrong], exam.settings)
    d, em = (np.asarray(snap[k])[wrong] for k in ("distance", "em"))
    deal = own.recompute([snap["answers"][i] for i in wrong], np.asarray(snap["features"])[wrong])
    edges = width_edges(tsd[wrong])
    made = deviation(tsd[wrong], d, em, [relation[i] for i in wrong], deal, edges, exam.tau, draws=100)
    return {**plain(made), "step": snap["step"]}
