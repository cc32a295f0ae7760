"""What came of it: interference, filters, weights, retention, controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlay.knowledge.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LINES,
    MARKS,
    ORANGE,
    RED,
    Drawn,
    legend,
    legend_below,
    plain,
    say,
    share,
    sheet,
)


def interference(series: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "interference") -> Drawn:
    """Single against joint training: name -> points with `k`, `drop`, `low`, `high`, `em`, `retention`."""
    figure, (drop, kept) = sheet(2, wide=5.2, high=4.0)
    for i, (label, points) in enumerate(series.items()):
        points = sorted(points, key=lambda p: p["k"])
        k = np.array([p["k"] for p in points])
        y, low, high = (np.array([p[f] for p in points], float) for f in ("drop", "low", "high"))
        colour, mark = LINES[i % len(LINES)], MARKS[i % len(MARKS)]
        error = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
        drop.errorbar(k, y, error, color=colour, marker=mark, markersize=4, elinewidth=0.8, label=label)
        kept.plot(k, [p["retention"] for p in points], color=colour, marker=mark, markersize=4)
    drop.axhline(0, color=INK, linewidth=0.8)
    for axes in (drop, kept):
        axes.set_xscale("log", base=2)
        ticks = sorted({int(p["k"]) for points in series.values() for p in points})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
    say(drop, "items trained together", "accuracy lost against training alone", "interference")
    say(kept, "items trained together", "share of other facts still known", "retention of facts that were not trained")
    share(kept)
    legend_below(drop, 3)
    words = (
        "The same items trained alone and together with others, each shown equally often at a constant rate: how much "
        "accuracy they lose (left, 95 % intervals over items), and how many facts that nobody trained survive (right)."
    )
    return Drawn(name, "Interference of facts learned together", words, figure, plain({"series": dict(series)}))


def filter_front(front: Mapping[str, Sequence[float]], chosen: float | None = None) -> Drawn:
    """Mean distance against spread of what filters keep: `inlay.knowledge.select.front` as it is."""
    figure, axes = sheet(wide=5.6)
    cloud = front["random_distance"], front["random_spread"]
    axes.scatter(*cloud, s=12, color=GREY, alpha=0.5, label="random subsets")
    points = sorted(zip(front["lam"], front["distance"], front["spread"], strict=True))
    axes.plot([p[1] for p in points], [p[2] for p in points], color=BLUE, marker="o", markersize=4, label="filter")
    told: list[tuple[float, float]] = []
    near = 0.02 * np.array([np.ptp([p[1] for p in points]) or 1, np.ptp([p[2] for p in points]) or 1])
    for lam, a, b in points:
        if all(abs(a - u) > near[0] or abs(b - v) > near[1] for u, v in told):
            axes.annotate(f"λ={lam:g}", (a, b), textcoords="offset points", xytext=(6, -9), fontsize=7.5)
            told.append((a, b))
        if chosen is not None and lam == chosen:
            axes.plot(a, b, marker="o", markersize=10, markerfacecolor="none", color=RED, linewidth=0, label="chosen")
    say(axes, "mean target semantic distance of what is kept", "spread of the kept targets' features")
    legend(axes, loc="best")
    words = (
        "What a filter can trade: facts near to what the model says (left) against facts unlike each other (up). The "
        "blue line is the best trade for each weight λ of spread; grey dots are random subsets of the same size."
    )
    twin = plain({"front": dict(front), "chosen": chosen})
    return Drawn("filter_front", "What the filter trades", words, figure, twin)


def kept_histogram(tsd: Any, kept: Any, name: str = "filter_kept") -> Drawn:
    """Kept and dropped items over their starting distance."""
    d, kept = np.asarray(tsd, float), np.asarray(kept, bool)
    figure, axes = sheet(wide=5.6)
    edges = np.linspace(0, max(1.0, float(d.max())), 31)
    stacks = [d[kept], d[~kept]]
    labels = [f"kept ({kept.sum()})", f"dropped ({(~kept).sum()})"]
    axes.hist(stacks, edges, stacked=True, color=[GREEN, ORANGE], label=labels)
    say(axes, "target semantic distance", "items")
    legend(axes, loc="best")
    words = "Which facts the filter keeps, by distance. A dropped fact is a fact that is not taught."
    counts = [np.histogram(s, edges)[0] for s in stacks]
    return Drawn(
        name, "Kept and dropped facts", words, figure, plain({"edges": edges, "kept": counts[0], "dropped": counts[1]})
    )


def weight_histogram(
    steps: Sequence[int], counts: Sequence[Any], edges: Sequence[float], name: str = "weights"
) -> Drawn:
    """How the loss weights of examples are spread at some steps: counts (S, B) between edges (B - 1), as the objective
    reports them; the outer bins are open."""
    figure, axes = sheet(wide=5.6)
    inner = np.asarray(edges, float)
    ratio = inner[1] / inner[0]
    borders = np.concatenate([[inner[0] / ratio], inner, [inner[-1] * ratio]])
    for k, (step, count) in enumerate(zip(steps, counts, strict=True)):
        share_of = np.asarray(count, float) / max(1, np.sum(count))
        axes.stairs(share_of, borders, color=LINES[k % len(LINES)], linewidth=1.4, label=f"step {step}")
    axes.axvline(1, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    ticks = [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8]
    axes.set_xticks(ticks, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.minorticks_off()
    say(axes, "weight of an example in the loss (mean 1)", "share of the step's examples")
    legend(axes, loc="best")
    words = "How unequally facts count in the loss while training goes on; 1 (dashed) is the plain loss."
    twin = plain({"steps": list(steps), "edges": borders, "counts": list(counts)})
    return Drawn(name, "Weights in the loss", words, figure, twin)


def retention_front(points: Sequence[Mapping[str, Any]], name: str = "retention_front") -> Drawn:
    """Accuracy on trained facts' paraphrases against what is kept of others: points of `name`, `em`, `retention`."""
    figure, axes = sheet(wide=6.2, high=4.0)
    labels = list(dict.fromkeys(p["name"] for p in points))
    for k, label in enumerate(labels):
        own = [p for p in points if p["name"] == label]
        x, y = ([p[f] for p in own] for f in ("retention", "em"))
        colour, mark = LINES[k % len(LINES)], MARKS[(k // len(LINES) + k) % len(MARKS)]
        axes.scatter(x, y, s=16, color=colour, marker=mark, alpha=0.35, linewidths=0)
        axes.scatter([np.mean(x)], [np.mean(y)], s=60, color=colour, marker=mark, label=label, edgecolors="white")
    axes.set_xlim(-0.03, 1.03)
    share(axes)
    say(axes, "share of facts that were not trained and are still known", "accuracy on unseen paraphrases")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    words = (
        "What was learned (up) against what was kept of everything else (right), small marks a seed each, large ones "
        "their mean. The upper right corner is where one wants to be."
    )
    return Drawn(name, "Learning against forgetting", words, figure, plain({"points": list(points)}))


def controls(rows: Sequence[Mapping[str, Any]], against: str, name: str = "controls") -> Drawn:
    """Differences of conditions from one of them, with intervals: rows with `name`, `difference`, `low`, `high`."""
    figure, axes = sheet(wide=6.4, high=max(2.2, 0.32 * len(rows) + 1.2))
    y = np.arange(len(rows))[::-1]
    axes.axvline(0, color=INK, linewidth=0.8)
    for at, row in zip(y, rows, strict=True):
        ours = bool(row.get("remedy"))
        colour = BLUE if ours else GREY
        axes.plot([row["low"], row["high"]], [at, at], color=colour, linewidth=2)
        axes.plot(row["difference"], at, marker="D" if ours else "o", color=colour, markersize=6)
    axes.set_yticks(y, [str(r["name"]) for r in rows])
    axes.set_ylim(-0.7, len(rows) - 0.3)
    say(axes, f"accuracy on unseen paraphrases, less that of: {against}", "")
    words = (
        f"Each condition against {against}, the same seeds and items in both; bars are 95 % bootstrap intervals over "
        "items within seeds. Blue diamonds are the remedies, grey dots the controls they must beat to mean anything."
    )
    return Drawn(
        name, f"Remedies and controls against {against}", words, figure, plain({"rows": list(rows), "against": against})
    )
