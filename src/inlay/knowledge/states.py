"""Where an item went: states at a snapshot, histories over snapshots, and deviation against its null.

Plain arrays in, plain arrays out; nothing here knows a model. Definitions are ours (docs/knowledge.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.curves import Bins, binned, place, same_length

STATES = ("learned", "approached", "stalled", "away")
TAU = 1e-6
"""Tolerance of a distance in the embedding space, where equal texts are at exactly 0; hidden spaces want 0.01."""

Recompute = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(receiving items (M,), giving items (M,)) -> distances (M,) and exact matches (M,) of the giver's answer, its feature
made anew in the receiver's own prompt and compared with the receiver's target."""


def states(tsd, distance, em, tau: float = TAU) -> np.ndarray:
    """State of each item (N,), one of `STATES`.

    Args:
        tsd: distance of the base's answer from the target (N,).
        distance: of the present answer (N,).
        em: whether the present answer is right (N,).
        tau: moves of no more than this are none.
    """
    tsd, distance, em = (np.asarray(x) for x in (tsd, distance, em))
    same_length(tsd=tsd, distance=distance, em=em)
    delta = distance - tsd
    found = np.full(len(tsd), "stalled", dtype=object)
    found[delta > tau] = "away"
    found[delta < -tau] = "approached"
    found[em.astype(bool)] = "learned"
    return found


def shares(found) -> dict[str, float]:
    """State -> share of the items (of one snapshot's states)."""
    found = np.asarray(found, dtype=object)
    return {s: float(np.mean(found == s)) if len(found) else float("nan") for s in STATES}


def histories(found) -> dict[str, np.ndarray]:
    """What states (S, N) over snapshots, in order, amount to: a mask (N,) for each name.

    `transient_away`: away once, learned at the end. `relapsed`: learned once, not at the end. `never_moved`: stalled
    throughout.
    """
    found = np.asarray(found, dtype=object)
    if found.ndim != 2 or not len(found):
        raise InlayError(f"histories need states of at least one snapshot as (snapshots, items), not {found.shape}")
    was: dict[str, np.ndarray] = {s: np.asarray(found == s, dtype=bool) for s in STATES}
    learned = was["learned"]
    return {
        "transient_away": was["away"].any(0) & learned[-1],
        "relapsed": learned.any(0) & ~learned[-1],
        "never_moved": was["stalled"].all(0),
    }


def progress(tsd, distance) -> np.ndarray:
    """1 - D/TSD (N,): 1 at the target, 0 where nothing moved, below 0 farther away; NaN where TSD is 0."""
    tsd, distance = np.asarray(tsd, float), np.asarray(distance, float)
    return 1 - np.divide(distance, tsd, out=np.full_like(tsd, np.nan), where=tsd > 0)


def direction(start, now, target) -> np.ndarray:
    """Cosine (N,) between the way gone and the way to the target, of unit features (N, D); NaN where nothing moved."""
    start, now, target = (unit(z) for z in (start, now, target))
    gone, to = now - start, target - start
    size = np.linalg.norm(gone, axis=1) * np.linalg.norm(to, axis=1)
    return np.divide((gone * to).sum(1), size, out=np.full(len(gone), np.nan), where=size > 1e-12)


def unit(z_ND) -> np.ndarray:
    """Rows brought to length 1 in float64; rows of zeros stay."""
    z = np.asarray(z_ND, dtype=np.float64)
    size = np.linalg.norm(z, axis=1, keepdims=True)
    return np.divide(z, size, out=np.zeros_like(z), where=size > 0)


def free(answer_ND, target_ND, answers: Sequence[str], targets: Sequence[str]) -> Recompute:
    """`Recompute` for a space whose features do not depend on the prompt (the embedding space)."""
    cosine = np.clip(unit(target_ND) @ unit(answer_ND).T, -1, 1)
    empty: np.ndarray = np.logical_not(np.asarray(answer_ND).any(1))
    said, right = np.asarray(answers, dtype=object), np.asarray(targets, dtype=object)

    def recompute(receiving: np.ndarray, giving: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        em = said[giving] == right[receiving]
        distance = np.where(empty[giving], 1.0, 1 - cosine[receiving, giving])
        return np.where(em, 0.0, distance), em

    return recompute


@dataclass(frozen=True)
class Deviation:
    """Share of items that went away, per bin of starting distance, beside what chance alone makes of it."""

    bins: Bins
    """Observed shares, with their counts and Wilson intervals."""
    null: np.ndarray
    """Mean share under permutation (B,)."""
    excess: np.ndarray
    """Observed less null (B,)."""
    low: np.ndarray
    """95 % permutation interval of the excess under no effect, around 0 (B,)."""
    high: np.ndarray


def deviation(
    tsd,
    distance,
    em,
    relation: Sequence[str],
    recompute: Recompute,
    edges,
    tau: float = TAU,
    draws: int = 200,
    seed: int = 0,
) -> Deviation:
    """Deviation by starting distance, and its null: final answers permuted among the items of one relation, their
    features made anew in the receiving items' prompts.

    Without the null a falling curve proves nothing: of answers that have nothing to do with the start, those that began
    far away can hardly end farther away.

    Args:
        edges: of the bins over `tsd` (B + 1,); see `curves.width_edges`, `curves.quantile_edges`.
        draws: permutations.
    """
    tsd = np.asarray(tsd, float)
    bins = binned(tsd, states(tsd, distance, em, tau) == "away", edges=edges)
    at, count = place(tsd, bins.edges), bins.n
    groups = [np.flatnonzero(np.asarray(relation, dtype=object) == r) for r in sorted(set(relation))]
    draw = np.random.default_rng(seed)
    made = np.full((draws, len(count)), np.nan)
    everyone = np.arange(len(tsd))
    for k in range(draws):
        giving = everyone.copy()
        for own in groups:
            giving[own] = draw.permutation(own)
        far, right = recompute(everyone, giving)
        away = states(tsd, far, right, tau) == "away"
        hits = np.bincount(at[at >= 0], away[at >= 0], minlength=len(count))
        made[k] = np.divide(hits, count, out=np.full(len(count), np.nan), where=count > 0)
    null = made.mean(0)
    low, high = np.quantile(made, [0.025, 0.975], axis=0) - null
    return Deviation(bins, null, bins.share - null, low, high)
