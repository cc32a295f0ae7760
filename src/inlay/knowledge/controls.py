"""The filter by its settings, and what must be set beside it: subsets of equal size, chosen for another reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inlay.core.errors import InlayError, unknown
from inlay.core.host import Host
from inlay.engine.example import Example, learned
from inlay.evaluate.bar import bar
from inlay.knowledge.select import Selection, floors_fit, prepared, ranked, select_subset, share
from inlay.knowledge.settings import FILTER_CONTROLS, KnowSettings
from inlay.knowledge.spread import spread
from inlay.knowledge.table import Table
from inlay.knowledge.weights import item_means
from inlay.train.ways import Plain

UNKNOWN = "Unknown"
CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", UNKNOWN)
"""SLiCK's (Gekhman et al. 2024)."""


def control_subset(
    name: str, d: Any, Z: Any = None, keep: float = 0.8, ids: Sequence[Any] | None = None, keep_per_relation: int = 0,
    relations: Sequence[Any] | None = None, *, losses: Any = None, categories: Sequence[str] | None = None,
    seed: int | Sequence[int] = 0,
) -> Selection:  # fmt: skip
    """As many items as `select_subset` would keep. Like it, the result does not depend on the order of the input.

    `random`: drawn with the seed; `lowest-distance`; `loss-ranked`: lowest loss of the base; `no-unknown`: items of
    category Unknown leave first, the others by lot. With a `keep` that is the share of the items that are not Unknown,
    the last one is Gekhman et al.'s filter.

    Args:
        losses: of the base for each item (N,), for `loss-ranked`.
        categories: of each item, for `no-unknown`.
    """
    if name not in FILTER_CONTROLS:
        raise unknown("control", name, FILTER_CONTROLS)
    d_N, order, group_N = prepared(d, ids, relations, keep_per_relation)
    k = share(len(d_N), keep)
    floors_fit(k, group_N, keep_per_relation)
    lot_N = np.random.default_rng(seed).random(len(d_N))
    if name == "loss-ranked":
        if losses is None or len(losses) != len(d_N) or not np.isfinite(losses).all():
            raise InlayError("control 'loss-ranked' needs a finite loss of the base for each item")
        key_N = np.asarray(losses, dtype=np.float64)[order]
    elif name == "no-unknown":
        if categories is None or len(categories) != len(d_N):
            raise InlayError("control 'no-unknown' needs the SLiCK category of each item")
        key_N = lot_N + np.array([categories[i] == UNKNOWN for i in order])
    else:
        key_N = lot_N if name == "random" else d_N
    kept = np.sort(order[ranked(key_N, k, group_N, keep_per_relation)])
    d_in = np.asarray(d, dtype=np.float64)
    return Selection(
        kept=kept,
        dropped=np.setdiff1d(np.arange(len(d_N)), kept),
        objective=None,
        distance=float(d_in[kept].mean()),
        spread=None if Z is None else spread(np.asarray(Z)[kept]),
    )


def choose(know: KnowSettings, table: Table, seed: int, losses: Callable[[], Any] | None = None) -> Selection:
    """What the settings keep of a table's items: the filter's choice, or its control's.

    Args:
        losses: gives the base's loss of each item, where the control needs it.
    """
    common: dict[str, Any] = {
        "d": table["tsd"],
        "Z": table["features"],
        "keep": know.keep,
        "ids": table["id"].tolist(),
        "keep_per_relation": know.keep_per_relation,
        "relations": table["relation"].tolist(),
    }
    if know.control not in FILTER_CONTROLS:
        return select_subset(lam=know.lam, variance_of=know.filter, **common)  # type: ignore[arg-type]
    if know.control == "loss-ranked" and losses is None:
        raise InlayError("control 'loss-ranked' needs the base: give its losses")
    return control_subset(
        know.control,
        **common,
        losses=losses() if losses is not None and know.control == "loss-ranked" else None,
        categories=read_categories(know.categories, common["ids"]) if know.categories is not None else None,
        seed=seed,
    )


def read_categories(path: Path, ids: Sequence[str]) -> list[str]:
    """The SLiCK category of each item, from a JSON object of id -> category (further ids do not matter)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InlayError(f"{path} is no JSON file of categories: {e}") from e
    if not isinstance(found, Mapping):
        raise InlayError(f"{path} must hold an object of item id -> category")
    if lacking := [i for i in ids if i not in found]:
        raise InlayError(
            f"{path} has no category for {len(lacking)} items, {lacking[0]!r} first; categorise all of them"
        )
    if strange := [i for i in ids if found[i] not in CATEGORIES]:
        raise InlayError(f"{path}: item {strange[0]!r}: " + str(unknown("category", found[strange[0]], CATEGORIES)))
    return [found[i] for i in ids]


def facts(know: KnowSettings, table: Table, made: Selection) -> dict[str, Any]:
    """What was chosen and how, as JSON has it: beside each number of the kept items, that of all."""
    every = np.asarray(table["tsd"], dtype=np.float64)
    return {
        "filter": know.filter,
        "control": know.control if know.control in FILTER_CONTROLS else None,
        "keep": know.keep,
        "lam": know.lam,
        "keep_per_relation": know.keep_per_relation,
        "items": len(table),
        "kept": len(made.kept),
        "objective": made.objective,
        "exchanges": max(0, len(made.trace) - 1),
        "mean_distance": {"kept": made.distance, "all": float(every.mean())},
        "spread": {"kept": made.spread, "all": spread(table["features"])},
        "dropped_ids": sorted(table["id"][made.dropped].tolist()),
    }


@torch.no_grad()
def base_losses(host: Host, examples: Sequence[Example], pad: int = 0, rows: int = 16, progress: bool = False) -> Any:
    """Mean cross entropy of the bare base over each example's learned tokens (N,), float64."""
    way, place = Plain(host, pad, rows), {id(e): i for i, e in enumerate(examples)}
    found = np.zeros(len(examples))
    was = host.model.training
    host.model.eval()
    try:
        with host.using(None), bar(progress) as shown:
            mark = shown.add_task("losses of the base", total=len(examples))
            for group in way.split(examples):
                loss_N, _ = way.tokens(group, None, False)
                mean_R = item_means(loss_N.double(), torch.tensor([learned(e) for e in group]))
                found[[place[id(e)] for e in group]] = mean_R.cpu().numpy()
                shown.advance(mark, len(group))
    finally:
        host.model.train(was)
    return found
