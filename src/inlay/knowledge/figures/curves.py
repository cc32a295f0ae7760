"""Against distance, and against steps: accuracy, deviation, states, trajectories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inlay.knowledge import curves, states
from inlay.knowledge.figures.style import (
    BLUE,
    GREY,
    INK,
    LINES,
    MARKS,
    RED,
    STATE,
    Drawn,
    legend,
    legend_below,
    plain,
    say,
    share,
    sheet,
)

DISTANCE = "target semantic distance of the base's answer"


def accuracy(
    series: Mapping[str, tuple[Any, Any]],
    known: tuple[Any, Any] | None = None,
    bins: int = 10,
    name: str = "accuracy_distance",
    what: str = "share learned",
) -> Drawn:
    """Share learned against starting distance, a curve a series.

    Args:
        series: name -> (distance (N,), right or not (N,)) of items that the base answers wrongly; several seeds' items
            may be strung together.
        known: the same for items that the base knows, drawn apart.
    """
    figure, (fixed, deciles, smooth) = sheet(3, wide=4.4, high=4.1, sharey=True)
    twin: dict[str, Any] = {"series": {}}
    many = len(series) > 1
    for k, (label, (d, yes)) in enumerate(series.items()):
        colour, mark = LINES[k % len(LINES)], MARKS[k % len(MARKS)]
        found = {"width": curves.binned(d, yes), "equal": curves.binned(d, yes, edges=curves.quantile_edges(d, bins))}
        for axes, made in zip((fixed, deciles), found.values(), strict=True):
            x = made.centers + (0.012 * (k - (len(series) - 1) / 2) if axes is fixed else 0)
            full = made.n > 0
            axes.errorbar(
                x[full],
                made.share[full],
                np.maximum([(made.share - made.low)[full], (made.high - made.share)[full]], 0),
                color=colour,
                marker=mark,
                markersize=4,
                linewidth=1.3,
                elinewidth=0.7,
                capsize=0,
                alpha=0.9,
                label=label,
            )
        at, mean = curves.moving_average(d, yes)
        smooth.plot(at, mean, color=colour, linewidth=1.5)
        x, fit, rises = curves.isotonic(d, yes)
        smooth.plot(x, fit, color=colour, linewidth=1, linestyle=":")
        shape = curves.two_lines(d, yes)
        twin["series"][label] = {
            **plain(found),
            "moving_average": plain([at, mean]),
            "isotonic": {"distance": plain(x), "fit": plain(fit), "rises": rises},
            "two_lines": {**plain(shape), "inverted_u": shape.inverted_u},
            "logistic": plain(curves.logistic(d, yes)),
        }
    if not many:
        made = found["width"]
        for x, n, top in zip(made.centers, made.n, made.high, strict=True):
            if n:
                fixed.annotate(str(n), (x, min(top, 1.0)), ha="center", va="bottom", fontsize=7, color=GREY)
    if known is not None and len(known[0]):
        right = float(np.mean(known[1]))
        deciles.axhline(right, color=INK, linewidth=0.9, linestyle="--", label=f"known before ({len(known[0])} items)")
        twin["known_before"] = {"n": len(known[0]), "share": right}
    say(fixed, DISTANCE, what, "bins of width 0.1" + ("" if many else " (numbers: items)"))
    say(deciles, DISTANCE, "", f"{bins} bins of equal counts")
    say(smooth, DISTANCE, "", "moving average; dotted: best monotone fit")
    for axes in (fixed, deciles, smooth):
        share(axes, high=1.08)
    legend_below(deciles, 4)
    judged = [k for k, s in twin["series"].items() if s["two_lines"]["inverted_u"]]
    verdict = f"declares an inverted U for {', '.join(judged)}" if judged else "declares an inverted U for none of them"
    words = (
        "How many of the facts that the base got wrong were learned, by how far the base's own answer stood from the "
        f"right one; bars are 95 % intervals, bins without items are left out. The two-lines test {verdict}."
    )
    return Drawn(name, "Accuracy against semantic distance", words, figure, twin)


def deviations(made: states.Deviation, step: int | None = None, name: str = "deviation_distance") -> Drawn:
    """Share of items that went away, its null, and what is left."""
    figure, (top, rest) = sheet(2, wide=5.4, high=3.7)
    bins, x, wide = made.bins, made.bins.centers, np.diff(made.bins.edges)
    top.bar(x, np.nan_to_num(bins.share), 0.92 * wide, color=RED, alpha=0.8, label="observed")
    full = bins.n > 0
    null, low, high, excess = (np.where(full, v, np.nan) for v in (made.null, made.low, made.high, made.excess))
    top.plot(x, null, color=INK, linestyle="--", marker="_", label="null: answers permuted")
    for at, n, value, w in zip(x, bins.n, bins.share, wide, strict=True):
        if not n:
            top.axvspan(at - w / 2, at + w / 2, facecolor="none", edgecolor="#D8D8D8", hatch="///", linewidth=0)
        elif value == 0:
            top.annotate("0", (at, 0.0), ha="center", va="bottom", fontsize=8, color=RED)
        if n:
            top.annotate(f"{n:g}", (at, 1.05), ha="center", fontsize=6.5, color=GREY, annotation_clip=False)
    share(top, 0, 1.12)
    when = f" at step {step}" if step is not None else ""
    say(top, DISTANCE, "share that went away", f"went away{when} (small: items; hatched: none)")
    legend(top, loc="upper right", bbox_to_anchor=(1, 0.93))
    rest.axhline(0, color=INK, linewidth=0.8)
    rest.fill_between(x, low, high, color=GREY, alpha=0.3, label="95 % of permutations")
    rest.plot(x, excess, color=BLUE, marker="o", markersize=4, label="observed less null")
    edge = max(0.1, 1.15 * float(np.nanmax(np.abs([excess[full], low[full], high[full]]), initial=0)))
    rest.set_ylim(-edge, edge)
    say(rest, DISTANCE, "excess", "what the arithmetic of distances does not explain")
    legend_below(rest, 2)
    words = (
        "Red: items whose answer is now farther from the right one than the base's was. The dashed line is what "
        "answers of other items would give, so only the difference (right) is evidence; above the grey band, training "
        "pushes away more than chance, below it less."
    )
    return Drawn(name, "Deviation against semantic distance, with its null", words, figure, plain({"deviation": made}))


def state_shares(steps: Sequence[int], found: Sequence[Any], name: str = "states") -> Drawn:
    """Shares of states at each snapshot; `found` (S, N) holds states."""
    figure, axes = sheet(wide=6.2)
    each = [states.shares(s) for s in found]
    y = np.array([[s[k] for s in each] for k in STATE])
    axes.stackplot(steps, y, labels=list(STATE), colors=list(STATE.values()), alpha=0.9)
    axes.set_xlim(min(steps), max(max(steps), min(steps) + 1))
    share(axes, 0, 1)
    say(axes, "optimizer step", "share of items")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    past = {k: float(v.mean()) for k, v in states.histories(found).items()}
    words = (
        "Where the items stand while training goes on: learned (right answer), nearer to it than the base, unmoved, or "
        f"away from it. Over the run, {100 * past['transient_away']:.0f} % went away and came back, "
        f"{100 * past['relapsed']:.0f} % were learned and lost again."
    )
    twin = {"steps": plain(list(steps)), "shares": {k: plain(v) for k, v in zip(STATE, y, strict=True)}, **past}
    return Drawn(name, "States while training", words, figure, twin)


def trajectories(steps: Sequence[int], distance_SN: Any, most: int = 60, name: str = "trajectories") -> Drawn:
    """Distance of each item over steps, with the median; at most so many single lines, evenly chosen by start."""
    d = np.asarray(distance_SN, float)
    figure, axes = sheet(wide=6.2)
    order = np.argsort(d[0], kind="stable")
    for i in order[np.linspace(0, len(order) - 1, min(most, len(order))).astype(int)]:
        axes.plot(
            steps, d[:, i], color=RED if d[:, i].max() > d[0, i] + states.TAU else BLUE, alpha=0.22, linewidth=0.8
        )
    axes.plot(steps, np.median(d, 1), color=INK, linewidth=2.2, label="median")
    axes.plot([], [], color=RED, label="was farther than at the start")
    axes.plot([], [], color=BLUE, label="never was")
    axes.set_ylim(bottom=0)
    say(axes, "optimizer step", "distance of the answer from its target")
    legend(axes, loc="upper right")
    words = (
        "Each thin line is one fact's distance from its right answer while training goes on; 0 is the right meaning. "
        "Red ones were at some time farther away than before training."
    )
    twin = {"steps": plain(list(steps)), "distance": plain(d), "median": plain(np.median(d, 1))}
    return Drawn(name, "Distances while training", words, figure, twin)


def distances(tsd: Any, em0: Any, relation: Sequence[str], name: str = "distances") -> Drawn:
    """Starting distances of the items that the base gets wrong, by relation."""
    d, wrong = np.asarray(tsd, float), np.asarray(em0, float) == 0
    kinds = np.asarray(relation, dtype=object)
    names = sorted(set(kinds[wrong]), key=str)
    shown = names[: len(LINES) - 1]
    stacks = [d[wrong & (kinds == k)] for k in shown]
    labels = [f"{k or 'items'} ({len(s)})" for k, s in zip(shown, stacks, strict=True)]
    if rest := names[len(shown) :]:
        stacks.append(d[wrong & np.isin(kinds, rest)])
        labels.append(f"{len(rest)} others ({len(stacks[-1])})")
    figure, axes = sheet(wide=6.2)
    edges = np.linspace(0, max(1.0, float(d.max(initial=0))), 31)
    if stacks:
        axes.hist(stacks, edges, stacked=True, color=LINES[: len(stacks)], label=labels)
    say(axes, DISTANCE, "items")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    words = (
        f"How far the base's answers are from the right ones before training. {int((~wrong).sum())} of {len(d)} are "
        "right already and not drawn."
    )
    twin = {
        "edges": plain(edges),
        "counts": {k: plain(np.histogram(s, edges)[0]) for k, s in zip(labels, stacks, strict=True)},
    }
    return Drawn(name, "Distances before training", words, figure, {**twin, "known": int((~wrong).sum())})
