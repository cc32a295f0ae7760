"""The data filter: which items to teach, so that targets are near on average and spread out (our reading).

Readings (J is minimised over subsets S of k items; d_i is the target semantic distance, z_i the unit feature of the
target):

- `features` (A, the default): J = mean_S(d) / sigma - lam * V(S) / V(all), with V(S) = 1 - ||mean_S z||^2 and sigma
  the standard deviation of d over all items. k/(k-1) V(S) is the mean pairwise cosine distance of S. A term whose
  scale is zero over all items is left out. Near-exact: backward elimination, then best exchanges.
- `distances` (B): J = mean_S(d) - lam * Var_S(d), not scaled. With the other items fixed J is concave in one item's
  value, so some optimum is the j smallest and the k - j largest; all j are tried: exact, O(N log N).
- `band` (C): the middle of d, both tails dropped (if their sizes differ by one, more is dropped of the long one).

That filtering helps is the paper's claim ("Semantic are Beacons", Wang and Li 2024, abstract); the objective is known
second-hand only, and these formulas and solvers are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from inlay.core.errors import InlayError, unknown
from inlay.knowledge.search import Floats, Ints, Problem, eliminate, exchange
from inlay.knowledge.spread import spread
from inlay.knowledge.states import unit

Reading = Literal["features", "distances", "band"]
READINGS = ("features", "distances", "band")


@dataclass(frozen=True)
class Selection:
    """What a filter keeps."""

    kept: NDArray
    """Places of the kept items in the input, ascending."""
    dropped: NDArray
    """Places of the others, ascending."""
    objective: float | None
    """J of the kept items; None for readings and controls that minimise nothing."""
    distance: float
    """Mean d of the kept items."""
    spread: float | None
    """V of the kept items; None without features."""
    trace: tuple[float, ...] = ()
    """J before and after each exchange."""


def share(n: int, keep: float) -> int:
    """Number of items that a share of n is, at least one. Raises InlayError for a share outside (0, 1]."""
    if not 0 < keep <= 1:
        raise InlayError(f"keep is the share of items that stay, above 0 and at most 1, not {keep:g}")
    return max(1, round(keep * n))


def select_subset(
    d: Any,
    Z: Any = None,
    keep: float = 0.8,
    lam: float = 1.0,
    variance_of: Reading = "features",
    ids: Sequence[Any] | None = None,
    keep_per_relation: int = 0,
    relations: Sequence[Any] | None = None,
    *,
    swaps: int | None = None,
) -> Selection:
    """Choose `round(keep * N)` items (see the module).

    The result does not depend on the order of the input: items are sorted by id, and of equal ones the lower id stays.

    Args:
        d: target semantic distances (N,).
        Z: features (N, D) of the targets; needed by `features` only.
        lam: weight of the spread or variance, not negative.
        ids: names that sort (all text or all numbers); positions if not given.
        keep_per_relation: at least so many of each relation stay, or all it has. `distances` is then near-exact.
        relations: relation of each item, needed with `keep_per_relation`.
        swaps: most exchanges after the elimination; by default as many as there are items, 0 for none.

    Raises:
        InlayError: for shapes that do not fit, distances that are not finite, ids that repeat, or a `keep` that leaves
            less than the relations need.
    """
    if variance_of not in READINGS:
        raise unknown("reading", variance_of, READINGS)
    if not lam >= 0 or not np.isfinite(lam):
        raise InlayError(f"lam weighs the spread and must be 0 or more, not {lam:g}")
    d_N, order, group_N = prepared(d, ids, relations, keep_per_relation)
    if variance_of == "features" and Z is None:
        raise InlayError("the reading 'features' needs the features of the targets (Z); or take 'distances' or 'band'")
    z_ND = None if Z is None else unit(Z)
    if z_ND is not None and len(z_ND) != len(d_N):
        raise InlayError(
            f"there are {len(d_N)} distances and {len(z_ND)} rows of features; they must be of the same items"
        )
    if z_ND is not None and not np.isfinite(z_ND).all():
        raise InlayError("some features are not finite; measure these items again or leave them out")
    z_ND = None if z_ND is None else z_ND[order]
    k = share(len(d_N), keep)
    floors_fit(k, group_N, keep_per_relation)
    most = len(d_N) if swaps is None else swaps
    objective: float | None = None
    trace: tuple[float, ...] = ()
    if variance_of == "band":
        chosen_N = ranked(_from_the_middle(d_N, k), k, group_N, keep_per_relation)
    elif variance_of == "distances" and not keep_per_relation:
        chosen_N = _two_ends(d_N, k, lam)
        objective = _variance_objective(d_N[chosen_N], lam)
    else:
        problem = _problem(d_N, z_ND, lam, variance_of, group_N, keep_per_relation)
        chosen_N, trace = _near_exact(problem, k, most)
        objective = problem.objective(chosen_N) if variance_of == "features" else None
        objective = _variance_objective(d_N[chosen_N], lam) if objective is None else objective
    kept = np.sort(order[chosen_N])
    return Selection(
        kept=kept,
        dropped=np.setdiff1d(np.arange(len(d_N)), kept),
        objective=objective,
        distance=float(d_N[chosen_N].mean()),
        spread=None if z_ND is None else spread(z_ND[chosen_N]),
        trace=trace,
    )


def ranked(key_N: Any, k: int, group_N: Ints, floor: int) -> NDArray:
    """Mask of the k rows with the lowest keys (ties: the earlier), after the lowest `floor` of each group."""
    order = np.argsort(np.asarray(key_N), kind="stable")
    seen = np.zeros(int(group_N.max()) + 1, dtype=np.int64)
    first: list[int] = []
    rest: list[int] = []
    for i in order:
        seen[group_N[i]] += 1
        (first if seen[group_N[i]] <= floor else rest).append(i)
    chosen_N = np.zeros(len(order), dtype=bool)
    chosen_N[(first + rest)[:k]] = True
    return chosen_N


def front(
    d: Any, Z: Any, keep: float = 0.8, lams: Sequence[float] = (0, 0.25, 0.5, 1, 2, 4, 8), randoms: int = 50,
    seed: int = 0, ids: Sequence[Any] | None = None, keep_per_relation: int = 0, relations: Sequence[Any] | None = None,
) -> dict[str, list[float]]:  # fmt: skip
    """Mean distance against spread over a sweep of lam, and the same of random subsets of equal size.

    Returns:
        Lists `lam`, `distance`, `spread`, and `random_distance`, `random_spread`: plain data for a figure.
    """
    found = [select_subset(d, Z, keep, lam, "features", ids, keep_per_relation, relations) for lam in lams]
    d_N, _, group_N = prepared(d, None, relations, keep_per_relation)
    z_ND, draw = unit(Z), np.random.default_rng(seed)
    cloud = [ranked(draw.random(len(d_N)), share(len(d_N), keep), group_N, keep_per_relation) for _ in range(randoms)]
    return {
        "lam": [float(lam) for lam in lams],
        "distance": [s.distance for s in found],
        "spread": [float(s.spread or 0.0) for s in found],
        "random_distance": [float(np.asarray(d, dtype=np.float64)[c].mean()) for c in cloud],
        "random_spread": [spread(z_ND[c]) for c in cloud],
    }


# ---- the parts -------------------------------------------------------------------------------------------------------
def prepared(
    d: Any, ids: Sequence[Any] | None, relations: Sequence[Any] | None, floor: int
) -> tuple[Floats, NDArray, Ints]:
    """(distances sorted by id, places of the sorted items, group of each). Raises InlayError as `select_subset`."""
    d_N = np.asarray(d, dtype=np.float64)
    if d_N.ndim != 1 or not len(d_N):
        raise InlayError(f"distances must be one number per item, not of shape {d_N.shape}")
    if not np.isfinite(d_N).all():
        raise InlayError(
            f"{int((~np.isfinite(d_N)).sum())} distances are not finite; measure these items again or leave them out"
        )
    names = range(len(d_N)) if ids is None else list(ids)
    if len(names) != len(d_N) or len(set(names)) != len(names):
        raise InlayError(
            f"{len(names)} ids, {len(set(names))} of them different, for {len(d_N)} items: one each is needed"
        )
    order = np.array(sorted(range(len(d_N)), key=lambda i: names[i]), dtype=np.int64)
    if floor < 0 or (floor and relations is None):
        raise InlayError("keep_per_relation counts items (0: no such bound) and needs the relation of each item")
    if relations is not None and len(relations) != len(d_N):
        raise InlayError(f"{len(relations)} relations for {len(d_N)} items")
    group_N = np.zeros(len(d_N), dtype=np.int64)
    if floor and relations is not None:
        group_N = np.unique(np.array([str(r) for r in relations]), return_inverse=True)[1].astype(np.int64)
    return d_N[order], order, group_N[order]


def floors_fit(k: int, group_N: Ints, floor: int) -> None:
    """Raises InlayError where k items cannot be `floor` of each group."""
    needed = int(np.minimum(np.bincount(group_N), floor).sum())
    if needed > k:
        raise InlayError(
            f"keep leaves {k} items, but {floor} of each of {len(set(group_N.tolist()))} relations are {needed}; "
            "raise keep or lower keep_per_relation"
        )


def _problem(d_N: Floats, z_ND: Floats | None, lam: float, reading: Reading, group_N: Ints, floor: int) -> Problem:
    """Either reading as mean(a) + mu ||mean z||^2."""
    if reading == "distances":  # lam Var(d) = lam mean(d^2) - lam mean(d)^2
        return Problem(d_N - lam * d_N**2, d_N[:, None], lam, group_N, floor)
    assert z_ND is not None
    sigma, whole = float(d_N.std()), spread(z_ND)
    mu = lam / whole if whole > 1e-12 else 0.0
    near_N = d_N / sigma if sigma > 1e-12 else np.zeros_like(d_N)
    return Problem(near_N - mu, z_ND, mu, group_N, floor)


def _near_exact(problem: Problem, k: int, most: int) -> tuple[NDArray, tuple[float, ...]]:
    chosen_N = eliminate(problem, k)
    return chosen_N, tuple(exchange(problem, chosen_N, most) if most and k < len(chosen_N) else ())


def _two_ends(d_N: Floats, k: int, lam: float) -> NDArray:
    """The exact optimum of mean(d) - lam Var(d): the j smallest and k - j largest values, for the best j."""
    n = len(d_N)
    value = np.sort(d_N) - d_N.mean()  # near zero, where squares cancel least
    one, two = (np.concatenate([[0.0], np.cumsum(v)]) for v in (value, value**2))
    j = np.arange(k, -1, -1)  # of equal objectives, the one with more near items
    mean, square = ((c[j] + c[n] - c[n - k + j]) / k for c in (one, two))
    objective = mean - lam * (square - mean**2)
    best = int(j[np.flatnonzero(objective <= objective.min() + 1e-15)[0]])
    # Equal values may be met from both ends: how often each value is wanted is what counts.
    wanted = np.concatenate([np.sort(d_N)[:best], np.sort(d_N)[n - k + best :]])
    left = dict(zip(*np.unique(wanted, return_counts=True), strict=True))
    chosen_N = np.zeros(n, dtype=bool)
    for i, one_d in enumerate(d_N):
        if left.get(one_d, 0):
            chosen_N[i], left[one_d] = True, left[one_d] - 1
    return chosen_N


def _variance_objective(d_K: Floats, lam: float) -> float:
    return float(d_K.mean() - lam * d_K.var())


def _from_the_middle(d_N: Floats, k: int) -> Floats:
    """How far each rank is from the middle of the band of k."""
    n = len(d_N)
    rank_N = np.empty(n)
    rank_N[np.argsort(d_N, kind="stable")] = np.arange(n)
    low = (n - k) // 2
    return np.abs(rank_N - (low + (k - 1) / 2))
