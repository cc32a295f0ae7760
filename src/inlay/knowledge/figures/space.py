"""In feature space and between items: principal axes, the target frame, heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.figures.style import ARROW, GREY, INK, LINES, Drawn, calm, legend_below, plain, say, sheet
from inlay.knowledge.pca import TargetFrame, basis
from inlay.knowledge.spread import neighbourhoods, numbers
from inlay.knowledge.states import unit


def panels(
    target_ND: Any, tsd: Any, relation: Sequence[str], said: tuple[Any, Any] | None = None, name: str = "pca"
) -> Drawn:
    """Target features in one principal basis: bands of distance, tight against spread groups, relations; and before and
    after training, where given.

    Args:
        said: features of what the model says before and after (N, D) each, of a space of their own (`predict`).
    """
    z, d = unit(target_ND), np.asarray(tsd, float)
    if len(z) < 4:
        raise InlayError(f"a picture of principal axes needs at least 4 items, not {len(z)}")
    made = basis(z)
    at = made(z)
    figure, axes = sheet(3 + (said is not None), wide=3.7, high=4.3)
    cuts = np.unique(np.quantile(d, [0, 0.25, 0.5, 0.75, 1]))
    band = np.clip(np.searchsorted(cuts, d, side="right") - 1, 0, max(0, len(cuts) - 2))
    names = [f"{a:.2f} to {b:.2f}" for a, b in zip(cuts[:-1], cuts[1:], strict=True)] or [f"{cuts[0]:.2f}"]
    _scatter(axes[0], at, band, names, "by starting distance")
    near = neighbourhoods(z)
    _scatter(axes[1], at, (near > np.median(near)).astype(int), ["tight", "spread"], "by distance from neighbours")
    kinds = sorted(set(relation))
    _scatter(axes[2], at, np.array([kinds.index(r) for r in relation]), kinds, "by relation")
    first, second = made.ratio
    for one in axes[:3]:
        one.set_aspect("equal", "datalim")
        say(one, f"axis 1 ({100 * first:.0f} %)", f"axis 2 ({100 * second:.0f} %)", one.get_title(loc="left"))
    twin: dict[str, Any] = {"explained": made.ratio, "points": at, "band": band, "bands": names, "near": near}
    told = numbers(z, relation, None)
    if said is not None:
        own = basis(np.concatenate([unit(s) for s in said]))
        points = [own(unit(s)) for s in said]
        _moves(axes[3], *points)
        say(
            axes[3],
            f"axis 1 ({100 * own.ratio[0]:.0f} %)",
            f"axis 2 ({100 * own.ratio[1]:.0f} %)",
            "what is about to be said",
        )
        twin |= {"before": points[0], "after": points[1], "explained_said": own.ratio}
    words = (
        "The right answers' features on their two main axes, the same axes in every panel; percentages say how much of "
        f"the spread an axis shows. Without projection: spread {told['spread']:.2f}, effective directions "
        f"{told['participation_ratio']:.1f}, silhouette of relations {told['silhouette_of_relations']:.2f}."
    )
    return Drawn(name, "Knowledge features, projected", words, figure, plain({**twin, "numbers": told}))


def _scatter(axes: Any, at: np.ndarray, group: np.ndarray, names: Sequence[str], title: str) -> None:
    for k, label in enumerate(names[: len(LINES)]):
        own = at[group == k]
        axes.scatter(own[:, 0], own[:, 1], s=14, color=LINES[k], alpha=0.65, linewidths=0, label=label)
    rest = at[group >= len(LINES)]
    if len(rest):
        axes.scatter(rest[:, 0], rest[:, 1], s=14, color=GREY, alpha=0.5, linewidths=0, label="others")
    axes.set_title(title, fontsize=9.5, loc="left")
    legend_below(axes, 2)


def _moves(axes: Any, before: np.ndarray, after: np.ndarray) -> None:
    for a, b in zip(before, after, strict=True):
        axes.plot(*zip(a, b, strict=True), color=GREY, linewidth=0.4, alpha=0.5)
    axes.scatter(*before.T, s=12, color=GREY, label="before")
    axes.scatter(*after.T, s=12, color=LINES[0], label="after")
    axes.set_aspect("equal", "datalim")
    legend_below(axes, 2)


def frame(made: TargetFrame, groups: Sequence[Any] | None = None, name: str = "target_frame") -> Drawn:
    """Arrows from where each answer was to where it is, all targets in the middle.

    Args:
        groups: of each item, the run it was trained in; a dashed outline goes around each group's ends.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(6.2, 5.6), layout="constrained")
    axes: Any = figure.add_subplot(projection="polar")
    calm_polar(axes)
    points = made.points()
    top = max(0.2, 1.05 * float(made.radius[[0, -1]].max()))
    axes.set_ylim(0, top)
    for i, colour in enumerate(made.colour):
        a, b = points[0, i], points[-1, i]
        axes.annotate(
            "",
            (made.angle[-1, i], made.radius[-1, i]),
            (made.angle[0, i], made.radius[0, i]),
            arrowprops={
                "arrowstyle": "-|>",
                "color": ARROW[colour],
                "lw": 0.7,
                "alpha": 0.5,
                "shrinkA": 0,
                "shrinkB": 0,
            },
        ) if np.abs(a - b).max() > 1e-9 else None
    axes.scatter(made.angle[0], made.radius[0], s=9, color=[ARROW[c] for c in made.colour], zorder=3, linewidths=0)
    axes.plot(0, 0, marker="*", markersize=15, color=INK, zorder=4)
    for group in sorted(set(groups or []), key=str):
        _outline(axes, points[-1][[g == group for g in groups or []]])
    count = {c: int((made.colour == c).sum()) for c in ARROW}
    said = {"green": "nearer", "red": "farther", "grey": "unchanged"}
    handles = [Line2D([], [], color=ARROW[c], lw=2, label=f"{said[c]} ({n})") for c, n in count.items()]
    handles.append(Line2D([], [], color=INK, marker="*", lw=0, markersize=10, label="the right answers"))
    axes.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(-0.16, 1.06))
    words = (
        "Every fact seen from its own right answer, which is the star in the middle for all of them: an arrow leads "
        "from the base's answer (dot) to the present one, and the distance from the middle is the semantic distance "
        "itself. Only the direction around the middle is a projection."
    )
    twin = plain({"radius": made.radius, "angle": made.angle, "colour": made.colour, "count": count})
    return Drawn(name, "Moves relative to the target", words, figure, twin)


def calm_polar(axes: Any) -> None:
    """A polar panel whose angle means nothing by itself."""
    axes.set_xticklabels([])
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.spines["polar"].set_visible(False)
    axes.tick_params(labelsize=8, colors="#777777")
    axes.set_rlabel_position(90)


def _outline(axes: Any, points: np.ndarray) -> None:
    """A dashed hull around points; too few or on a line: nothing to enclose."""
    from scipy.spatial import ConvexHull, QhullError

    try:
        hull = points[ConvexHull(points).vertices]
    except (QhullError, ValueError):
        return
    hull = np.concatenate([hull, hull[:1]])
    fine = np.concatenate([np.linspace(a, b, 30) for a, b in zip(hull[:-1], hull[1:], strict=True)])
    axes.plot(np.arctan2(fine[:, 1], fine[:, 0]), np.hypot(*fine.T), color=INK, linestyle="--", linewidth=0.9)


def heat_map(
    matrix: Any,
    title: str,
    words: str,
    name: str,
    bar: str,
    order: Sequence[str] | None = None,
    limit: float | None = None,
) -> Drawn:
    """A square of items, blue below 0 and red above; with `order` (a relation each) sorted and ruled by relation."""
    m = np.asarray(matrix, float)
    figure, axes = sheet(wide=5.6, high=4.6)
    calm(axes)
    axes.grid(False)
    by = np.argsort(np.asarray(order, dtype=object), kind="stable") if order is not None else np.arange(len(m))
    off = m[~np.eye(len(m), dtype=bool)]
    top = limit or max(1e-9, float(np.quantile(np.abs(off), 0.99)) if len(off) else 1.0)
    image = axes.imshow(m[np.ix_(by, by)], cmap="RdBu_r", vmin=-top, vmax=top, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=bar, shrink=0.85, extend="neither" if np.abs(m).max() <= top else "both")
    if order is not None:
        kinds = [order[i] for i in by]
        starts = [i for i, k in enumerate(kinds) if i == 0 or kinds[i - 1] != k]
        for start, end in zip(starts, [*starts[1:], len(kinds)], strict=True):
            if start:
                axes.axhline(start - 0.5, color=INK, linewidth=0.6)
                axes.axvline(start - 0.5, color=INK, linewidth=0.6)
            axes.text((start + end - 1) / 2, len(m) - 0.2, str(kinds[start]), ha="center", va="top", fontsize=8)
        axes.set_xticks([])
    say(axes, "", "item that the step is on" if "step" in title else "item")
    return Drawn(name, title, words, figure, plain({"matrix": m, "order": by, "relation": list(order or [])}))
