"""Which figures a report's data gives, section by section; a part that is not there gives none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from inlay.knowledge import figures
from inlay.knowledge.curves import Bins, width_edges
from inlay.knowledge.figures import Drawn
from inlay.knowledge.pca import target_frame
from inlay.knowledge.states import Deviation, deviation, free, states

Data = Mapping[str, Any]


def plain_runs(data: Data) -> list[dict[str, Any]]:
    """Runs with snapshots that train as usual, so that methods may be compared."""
    return [r for r in data.get("runs", []) if r.get("snapshots") and r.get("condition", "plain") == "plain"]


def middle(run: Data) -> int:
    """The snapshot at which most is in motion: accuracy among those wrong at the start nearest to a half."""
    rates = [float(np.mean(s["em"])) for s in run["snapshots"]]
    later = range(1, len(rates)) if len(rates) > 1 else range(len(rates))
    return min(later, key=lambda i: abs(rates[i] - 0.5))


def _wrong(data: Data, run: Data) -> np.ndarray:
    """Items that the base gets wrong."""
    known: np.ndarray = np.asarray(data["tables"][run["table"]]["em0"], bool)
    return ~known


def accuracy(data: Data) -> list[Drawn]:
    """Accuracy against distance: methods on one model, and models with one method; in the middle and at the end."""
    made = []
    runs = plain_runs(data)
    regimes = list(dict.fromkeys(r.get("regime", "") for r in runs))
    for by, fixed in (("method", "model"), ("model", "method")):
        for regime in regimes:
            own = [r for r in runs if r.get("regime", "") == regime]
            if not own or (by == "model" and len({r["model"] for r in own}) < 2):
                continue
            most = max({r[fixed] for r in own}, key=lambda v: sum(r[fixed] == v for r in own))
            own = [r for r in own if r[fixed] == most]
            made.append(_accuracy(data, own, by, f"{most}, {regime}" if regime else str(most), regime))
    return made


def _accuracy(data: Data, runs: Sequence[Data], by: str, most: str, regime: str) -> Drawn:
    """Items of all seeds strung together, each run at its middle snapshot."""
    series: dict[str, tuple[list, list]] = defaultdict(lambda: ([], []))
    known: tuple[list, list] = ([], [])
    for run in runs:
        wrong, snap = _wrong(data, run), run["snapshots"][middle(run)]
        tsd, em = (np.asarray(x, float) for x in (data["tables"][run["table"]]["tsd"], snap["em"]))
        for into, mask in ((series[str(run[by])], wrong), (known, ~wrong)):
            into[0].extend(tsd[mask])
            into[1].extend(em[mask])
    drawn = figures.accuracy(series, known, name=_name("accuracy", by, regime))
    words = f"{drawn.words} Each run at the snapshot where about half is learned ({most})."
    return Drawn(drawn.name, f"{drawn.title}, by {by}: {most}", words, drawn.figure, drawn.twin)


def _name(*parts: str) -> str:
    """A file name, of letters, digits, - and _ only."""
    words = ("".join(c if c.isalnum() or c in "+-_" else " " for c in p) for p in parts if p)
    return "_".join("-".join(w.split()) for w in words)


def shown(data: Data) -> list[dict[str, Any]]:
    """The runs drawn one by one: the first of each regime."""
    first: dict[str, dict[str, Any]] = {}
    for run in plain_runs(data):
        first.setdefault(run.get("regime", ""), run)
    return list(first.values())


def start(data: Data) -> list[Drawn]:
    """Distances before training, of tables whose runs are drawn, or of all where there are no runs."""
    names = dict.fromkeys(r["table"] for r in shown(data)) or data.get("tables", {})
    made = []
    for name in names:
        table = data["tables"][name]
        drawn = figures.distances(table["tsd"], table["em0"], table["relation"], _name("distances", str(name)))
        made.append(Drawn(drawn.name, f"{drawn.title}: {name}", drawn.words, drawn.figure, drawn.twin))
    return made


def away(data: Data) -> list[Drawn]:
    """Deviation with its null, states and trajectories of one run a regime."""
    made = []
    for run in shown(data):
        regime, wrong = run.get("regime", ""), _wrong(data, run)
        found, step = _deviation(data, run, wrong)
        if found is not None:
            made.append(_of(figures.deviations(found, step, _name("deviation", regime)), run))
        steps = [s["step"] for s in run["snapshots"]]
        if wrong.any() and len(steps) > 1:
            state = [np.asarray(s["state"], dtype=object)[wrong] for s in run["snapshots"]]
            far = [np.asarray(s["distance"], float)[wrong] for s in run["snapshots"]]
            made.append(_of(figures.state_shares(steps, state, _name("states", regime)), run))
            made.append(_of(figures.trajectories(steps, far, name=_name("trajectories", regime)), run))
    return made


def _of(drawn: Drawn, run: Data) -> Drawn:
    told = ", ".join(str(run[k]) for k in ("method", "model", "regime") if run.get(k))
    return Drawn(drawn.name, f"{drawn.title}: {told}, seed {run.get('seed')}", drawn.words, drawn.figure, drawn.twin)


def _deviation(data: Data, run: Data, wrong: np.ndarray) -> tuple[Deviation | None, int | None]:
    """As the run recorded it, or from its answers' features where they are prompt-free and at hand."""
    if kept := run.get("deviation"):
        arrays = {k: _floats(v) for k, v in kept.items() if k in ("null", "excess", "low", "high")}
        return Deviation(bins=Bins(**{k: _floats(v) for k, v in kept["bins"].items()}), **arrays), kept.get("step")
    early = [s for s in run["snapshots"][1:] if "features" in s]
    if not early or not wrong.any():
        return None, None
    table = data["tables"][run["table"]]
    d0 = np.asarray(table["tsd"], float)
    # The snapshot with most items away: later ones have converged.
    snap = max(early, key=lambda s: np.mean(states(d0, s["distance"], s["em"]) == "away"))
    keep = np.flatnonzero(wrong)
    texts = [[x[i] for i in keep] for x in (snap["answers"], table["target"], table["relation"])]
    recompute = free(np.asarray(snap["features"])[keep], np.asarray(table["features"])[keep], *texts[:2])
    d0, d, em = (np.asarray(x)[keep] for x in (d0, snap["distance"], snap["em"]))
    return deviation(d0, d, em, texts[2], recompute, width_edges(d0)), int(snap["step"])


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


def space(data: Data) -> list[Drawn]:
    """Features on one basis, and items seen from their targets."""
    made = []
    for run in shown(data):
        table, regime = data["tables"][run["table"]], run.get("regime", "")
        if "features" not in table or len(table["id"]) < 4:
            continue
        said = run.get("said")
        pair = (said["before"], said["after"]) if said else None
        made.append(
            _of(figures.panels(table["features"], table["tsd"], table["relation"], pair, _name("pca", regime)), run)
        )
        full = [s for s in run["snapshots"] if "features" in s]
        if len(full) > 1:
            mid = full[min(middle({"snapshots": full}), len(full) - 1)]
            distances = [np.asarray(s["distance"], float) for s in (full[0], mid)]
            frame = target_frame([full[0]["features"], mid["features"]], table["features"], distances)
            drawn = _of(figures.frame(frame, name=_name("target_frame", regime)), run)
            made.append(Drawn(drawn.name, f"{drawn.title}, step {mid['step']}", drawn.words, drawn.figure, drawn.twin))
    return made


def interference(data: Data) -> list[Drawn]:
    """Single against joint, gradients, and the influence of single steps."""
    parts = data.get("interference", [])
    made = []
    if curves := {p["name"]: p["curve"] for p in parts if p.get("curve")}:
        made.append(figures.interference(curves))
    for part in parts:
        if found := part.get("gradients"):
            words = (
                "Cosine of two facts' gradients: red pairs pull the adapter the same way, blue pairs against each "
                "other. Two facts that exclude each other can look aligned at first, as both leave the old answer."
            )
            title, name = f"Gradients of single facts: {part['name']}", _name("gradients", part["name"])
            made.append(figures.heat_map(found["cosine"], title, words, name, "cosine", found.get("relation"), 1.0))
        if found := part.get("influence"):
            words = (
                "One optimizer step on the row's fact: what it does to the loss of the column's fact. Red off the "
                "diagonal is harm to others; the diagonal is the fact itself."
            )
            title, name = f"Influence of one step: {part['name']}", _name("influence", part["name"])
            made.append(figures.heat_map(found["delta"], title, words, name, "change of loss", found.get("relation")))
    return made


def remedies(data: Data) -> list[Drawn]:
    """Filter, weights, controls, and what all runs learned and lost."""
    made = []
    if found := data.get("filter"):
        made.append(figures.filter_front(found["front"], found.get("chosen")))
        made.append(figures.kept_histogram(found["tsd"], found["kept"]))
    if found := data.get("weights"):
        made.append(figures.weight_histogram(found["steps"], found["counts"], found["edges"]))
    rows = data.get("controls", [])
    for against in dict.fromkeys(r["against"] for r in rows):
        own = [r for r in rows if r["against"] == against]
        made.append(figures.controls(own, against, _name("controls", against)))
    return made


def outcome(data: Data) -> list[Drawn]:
    """Learning against forgetting, per regime."""
    made = []
    runs = data.get("runs", [])
    for regime in dict.fromkeys(r.get("regime", "") for r in runs):
        own = [r for r in runs if r.get("regime", "") == regime]
        several = len({r.get("condition", "plain") for r in own}) > 1 and len({r["method"] for r in own}) == 1
        points = [
            {
                "name": str(r.get("condition") if several else r["method"]),
                "em": r["paraphrase_em"],
                "retention": r["retention"],
            }
            for r in own
            if several or r.get("condition", "plain") == "plain"
        ]
        if points:
            drawn = figures.retention_front(points, _name("retention", regime))
            title = f"{drawn.title}: {regime}" if regime else drawn.title
            made.append(Drawn(drawn.name, title, drawn.words, drawn.figure, drawn.twin))
    return made


SECTIONS: dict[str, Callable[[Data], list[Drawn]]] = {
    "What was learned, and what it cost": outcome,
    "Before training": start,
    "Accuracy and distance": accuracy,
    "Moving away": away,
    "Feature space": space,
    "Interference": interference,
    "Filter, weights and their controls": remedies,
}
