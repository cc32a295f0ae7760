"""What a study's runs say: controls with intervals, shapes of curves, slopes per seed, deviation beyond chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlay.knowledge.curves import logistic, paired_seeds, two_lines
from inlay.knowledge.design import AGAINST, StudySettings, condition
from inlay.knowledge.sections import middle

SPLITS = 20
"""Halvings of the items on which the two-lines test is repeated: a shape that one in four shows is none to build on."""


def control_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per condition, against its kind's baseline on the same seeds and items (all items, kept or not)."""
    by: dict[str, dict[int, Mapping[str, Any]]] = {}
    for one in found:
        by.setdefault(one["run"]["condition"], {})[one["run"]["seed"]] = one
    rows = []
    for name, own in by.items():
        against = AGAINST[condition(name).kind]
        seeds = sorted(own.keys() & by.get(against, {}).keys())
        if not seeds or name == against:
            continue
        mine, base = ([runs[s] for s in seeds] for runs in (own, by[against]))
        made = paired_seeds([_floats(r["paraphrase_N"]) for r in mine], [_floats(r["paraphrase_N"]) for r in base])
        row = {
            "name": name,
            "kind": condition(name).kind,
            "against": against,
            "remedy": condition(name).remedy,
            "difference": made.difference,
            "low": made.low,
            "high": made.high,
            "per_seed": made.per_seed,
            "seed_error": made.seed_error,
            "seeds": len(seeds),
        }
        for key in ("em", "paraphrase_em", "paraphrase_em_kept", "retention", "presentations"):
            row[key] = float(np.mean([r["run"][key] for r in mine]))
            row[f"{key}_against"] = float(np.mean([r["run"][key] for r in base]))
        rows.append(row)
    return rows


def filter_part(
    s: StudySettings, found: Sequence[Mapping[str, Any]], tables: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The front of reading A, and what it kept in the first seed."""
    from inlay.knowledge.select import front

    kept = next((f for f in found if f["run"]["condition"].startswith("filter A")), None)
    table = tables.get(kept["run"]["table"]) if kept is not None else None
    if kept is None or table is None or "features" not in table:
        return None
    tsd, features = np.asarray(table["tsd"], float), np.asarray(table["features"], float)
    return {"front": front(tsd, features, s.keep), "chosen": 1, "tsd": tsd, "kept": kept["kept_N"]}


def weights_part(found: Sequence[Mapping[str, Any]], name: str = "beta -2") -> dict[str, Any] | None:
    """Histograms of the weights of one condition's first seed."""
    from inlay.knowledge.objective import edges
    from inlay.knowledge.weights import KAPPA

    weighed = next((f["weighed"] for f in found if f["run"]["condition"] == name and f.get("weighed")), None)
    if not weighed:
        return None
    return {"steps": [w["step"] for w in weighed], "counts": [w["weights"] for w in weighed], "edges": edges(KAPPA)}


def findings(data: Mapping[str, Any]) -> dict[str, Any]:
    """Per family, method and regime: what plain runs learned and kept, and what distance had to do with it."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for run in data["runs"]:
        if run["condition"] == "plain":
            groups.setdefault((run["model"], run["method"], run["regime"]), []).append(run)
    told = ("name", "curve", "suppression")
    return {
        "plain": [{"family": f, "method": m, "regime": r, **_group(data, own)} for (f, m, r), own in groups.items()],
        "controls": data["controls"],
        "interference": [{k: p[k] for k in told if k in p} | _pairs(p) for p in data["interference"]],
    }


def _pairs(part: Mapping[str, Any]) -> dict[str, Any]:
    return {k: part[k]["pairs"] for k in ("gradients", "influence") if "pairs" in part.get(k, {})}


def _group(data: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {"seeds": len(runs)}
    for key in ("em", "paraphrase_em", "retention"):
        told[key] = float(np.mean([r[key] for r in runs]))
    far, near, slopes, shuffled, excess, null = [], [], [], [], [], []
    pooled: tuple[list[float], list[float]] = ([], [])
    away: dict[int, list[float]] = {}
    for run in runs:
        table = data["tables"][run["table"]]
        wrong = ~np.asarray(table["em0"], bool)
        d = np.asarray(table["tsd"], float)[wrong]
        em = np.asarray(run["snapshots"][middle(run)]["em"], float)[wrong]
        low, high = np.quantile(d, [0.25, 0.75])
        near.append(em[d <= low].mean())
        far.append(em[d >= high].mean())
        relation = np.asarray(table["relation"], dtype=object)[wrong].tolist()
        slopes.append(logistic(d, em, relation).z)
        mixed = np.random.default_rng([run["seed"], 33]).permutation(d)
        shuffled.append(logistic(mixed, em, relation).z)
        pooled[0].extend(d)
        pooled[1].extend(em)
        for snap in run["snapshots"]:
            state = np.asarray(snap["state"], dtype=object)[wrong]
            away.setdefault(snap["step"], []).append(float(np.mean(state == "away")))
        if kept := run.get("deviation"):
            n = np.asarray(kept["bins"]["n"], float)
            excess.append(np.nansum(_floats(kept["excess"]) * n) / n.sum())
            null.append(np.nansum(_floats(kept["null"]) * n) / n.sum())
    shape = two_lines(*pooled)
    declared = sum(two_lines(*pooled, seed=split).inverted_u for split in range(SPLITS))
    return told | {
        "near_quartile_em": float(np.mean(near)),
        "far_quartile_em": float(np.mean(far)),
        "paraphrase_em_interval": over_seeds([r["paraphrase_em"] for r in runs]),
        "drop_per_seed": np.subtract(near, far).tolist(),
        "drop_interval": over_seeds(np.subtract(near, far)),
        "logistic_z": slopes,
        "logistic_z_shuffled": shuffled,
        "two_lines": {"left": shape.left, "right": shape.right, "z_left": shape.z_left, "z_right": shape.z_right},
        "inverted_u": shape.inverted_u,
        "inverted_u_splits": declared,
        "away": {str(k): float(np.mean(v)) for k, v in sorted(away.items())},
        "deviation_null": float(np.mean(null)) if null else None,
        "deviation_excess": float(np.mean(excess)) if excess else None,
    }


def over_seeds(values: Sequence[float] | np.ndarray) -> list[float] | None:
    """95 % interval of the mean by Student's t, seeds being the sample; None for a single seed."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return [float(np.mean(values)) - half, float(np.mean(values)) + half]


def _floats(values: Any) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


# ---- as text ---------------------------------------------------------------------------------------------------------
def markdown(found: Mapping[str, Any]) -> str:
    """The findings as Markdown tables: plain runs, deviation and shape, controls, interference."""
    plain = sorted(
        found["plain"], key=lambda p: (p["regime"] != "edits", p["regime"], p["method"])
    )  # families together
    parts = [
        _table(
            [
                "family", "method", "regime", "seeds", "accuracy", "paraphrases", "retention", "near quartile",
                "far quartile", "paraphrases, 95 %", "near less far, 95 %",
            ],
            [
                [p["family"], p["method"], p["regime"], str(p["seeds"])]
                + [_percent(p[k]) for k in ("em", "paraphrase_em", "retention", "near_quartile_em", "far_quartile_em")]
                + [_span(p["paraphrase_em_interval"]), _span(p["drop_interval"], True)]
                for p in plain
            ],
            3,
        ),
        _table(
            [
                "family", "method", "regime", "away at most", "away at the end", "null", "excess", "z left", "z right",
                "inverted U", "z of slope, per seed", "labels shuffled",
            ],
            [_shape(p) for p in plain],
            3,
        ),
        _table(
            [
                "condition", "against", "seeds", "difference", "95 % interval", "seed error", "paraphrases, kept",
                "paraphrases, all", "retention", "presentations",
            ],
            [_control(r) for r in found["controls"]],
            2,
        ),
        _table(
            ["run", "together", "accuracy", "lost", "95 % interval", "probability lost", "retention", "steps"],
            [_point(p["name"], point) for p in found["interference"] for point in p["curve"]],
            1,
        ),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> str:
    if not rows:
        return ""
    rule = ["---" if i < text else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _percent(x: float | None, sign: bool = False) -> str:
    if x is None or not np.isfinite(x):
        return "–"
    return f"{100 * x:+.1f}" if sign else f"{100 * x:.1f}"


def _span(ends: Sequence[float] | None, sign: bool = False) -> str:
    return "–" if ends is None else f"{_percent(ends[0], sign)} to {_percent(ends[1], sign)}"


def _z(values: Sequence[float | None]) -> str:
    return ", ".join("–" if v is None or not np.isfinite(v) else f"{v:.1f}" for v in values)


def _shape(p: Mapping[str, Any]) -> list[str]:
    away, lines = p["away"], p["two_lines"]
    last = away[max(away, key=int)]
    return [
        p["family"], p["method"], p["regime"], _percent(max(away.values())), _percent(last),
        _percent(p["deviation_null"]), _percent(p["deviation_excess"], True), _z([lines["z_left"]]),
        _z([lines["z_right"]]), _declared(p), _z(p["logistic_z"]), _z(p["logistic_z_shuffled"]),
    ]  # fmt: skip


def _declared(p: Mapping[str, Any]) -> str:
    return f"{'yes' if p['inverted_u'] else 'no'} ({p['inverted_u_splits']}/{SPLITS})"


def _control(r: Mapping[str, Any]) -> list[str]:
    name = f"**{r['name']}**" if r["remedy"] else r["name"]
    span = _span((r["low"], r["high"]), True)
    kept = _percent(r["paraphrase_em_kept"]) if r["kind"] == "filter" else "–"
    return [
        name, r["against"], str(r["seeds"]), _percent(r["difference"], True), span, _percent(r["seed_error"]), kept,
        _percent(r["paraphrase_em"]), _percent(r["retention"]), f"{r['presentations']:.1f}",
    ]  # fmt: skip


def _point(name: str, p: Mapping[str, Any]) -> list[str]:
    span = _span((p["low"], p["high"]), True)
    numbers = [
        _percent(p["em"]),
        _percent(p["drop"], True),
        span,
        _percent(p["drop_p"], True),
        _percent(p["retention"]),
    ]
    return [name, str(p["k"]), *numbers, str(p["steps"])]
