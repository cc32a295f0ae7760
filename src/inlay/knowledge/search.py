"""The search behind the data filter: the subset of k rows that minimises mean(a) + mu * ||mean z||^2.

Readings A and B of the filter are both of this form (`inlay.knowledge.select`). Only sums are needed: L = sum a,
s = sum z, T = ||s||^2, g_i = <z_i, s>, q_i = ||z_i||^2. Backward elimination drops the row whose removal lowers the
objective most; then the best exchange of a chosen row for another is made until none lowers it.

No Gram matrix is stored. What is known of g is allowed to grow stale, as |g_i now - g_i then| <= ||z_i|| ||s now - s
then||: only rows that could still be the best by that bound are computed anew, so the result is the plain search's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TIE = 1e-12
"""Objectives nearer than this are equal: the row that comes later leaves, the one that comes earlier stays."""
FRESH = 128
"""Rows that may be computed anew for one decision before all are."""
BLOCK = 1 << 22
"""Numbers of a block of pairs held at a time."""


@dataclass
class Problem:
    """Rows to choose from, in the order that decides ties."""

    a_N: Floats
    """Each row's own cost."""
    z_ND: Floats
    """Features."""
    mu: float
    """Weight of ||mean z||^2, not negative."""
    group_N: Ints
    """Group of each row."""
    floor: int = 0
    """Each group keeps at least so many rows, or all it has."""
    q_N: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.q_N = np.einsum("nd,nd->n", self.z_ND, self.z_ND)

    def objective(self, chosen: NDArray) -> float:
        """mean(a) + mu * ||mean z||^2 of the rows at these places."""
        mean_D = self.z_ND[chosen].mean(0)
        return float(self.a_N[chosen].mean() + self.mu * mean_D @ mean_D)


class _Sum:
    """g_i = <z_i, s> of a moving s, computed where it is needed."""

    def __init__(self, problem: Problem, alive_N: NDArray):
        self.problem = problem
        self.s_D = problem.z_ND[alive_N].sum(0)
        self.refresh()

    def refresh(self) -> None:
        self.then_D = self.s_D.copy()
        self.g_N = self.problem.z_ND @ self.s_D

    def at(self, rows: NDArray) -> Floats:
        return self.problem.z_ND[rows] @ self.s_D

    def slack(self) -> Floats:
        """How far each stale g may be from the truth."""
        return np.sqrt(self.problem.q_N) * float(np.linalg.norm(self.s_D - self.then_D))


def eliminate(problem: Problem, k: int, tick: Callable[[], None] = lambda: None) -> NDArray:
    """Mask (N,) of k rows: all of them, less the one whose removal lowers the objective most, again and again."""
    n = len(problem.a_N)
    alive_N = np.ones(n, dtype=bool)
    counts = np.bincount(problem.group_N)
    free_N = counts[problem.group_N] > problem.floor
    known = _Sum(problem, alive_N)
    for left in range(n, k, -1):
        worst = _worst(problem, known, alive_N & free_N, left)
        alive_N[worst] = False
        known.s_D = known.s_D - problem.z_ND[worst]
        group = problem.group_N[worst]
        counts[group] -= 1
        if counts[group] == problem.floor:
            free_N[problem.group_N == group] = False
        tick()
    return alive_N


def _worst(problem: Problem, known: _Sum, may_N: NDArray, left: int) -> int:
    """The row to drop: the largest a_i + mu (2 g_i - q_i) / (left - 1), the last of equals."""
    scale = problem.mu / (left - 1)
    fixed_N = problem.a_N - scale * problem.q_N
    rows = _contenders(fixed_N + 2 * scale * known.g_N, 2 * scale * known.slack(), may_N)
    if len(rows) > FRESH:
        known.refresh()
        rows = np.flatnonzero(may_N)
        exact = fixed_N[rows] + 2 * scale * known.g_N[rows]
    else:
        exact = fixed_N[rows] + 2 * scale * known.at(rows)
    best = exact.max()
    return int(rows[np.flatnonzero(exact >= best - TIE * max(1.0, abs(best)))[-1]])


def _contenders(score_N: Floats, slack_N: Floats, may_N: NDArray) -> NDArray:
    """Rows whose score, known to within its slack, may be the highest."""
    low = np.where(may_N, score_N - slack_N, -np.inf).max()
    return np.flatnonzero(may_N & (score_N + slack_N >= low - 2 * TIE * max(1.0, abs(low))))


def exchange(problem: Problem, chosen_N: NDArray, most: int, tick: Callable[[], None] = lambda: None) -> list[float]:
    """Make the best exchange of a chosen row for another until none lowers the objective; changes `chosen_N`.

    Args:
        most: exchanges after which the search ends in any case.

    Returns:
        The objective before and after each exchange, strictly falling.
    """
    known = _Sum(problem, chosen_N)
    counts = np.bincount(problem.group_N[chosen_N], minlength=int(problem.group_N.max()) + 1)
    trace = [problem.objective(chosen_N)]
    while len(trace) <= most:
        known.refresh()
        change, out, into = _best_pair(problem, known.g_N, chosen_N, counts)
        if change > -TIE * max(1.0, abs(trace[-1])):
            break
        chosen_N[out], chosen_N[into] = False, True
        known.s_D = known.s_D + problem.z_ND[into] - problem.z_ND[out]
        counts[problem.group_N[out]] -= 1
        counts[problem.group_N[into]] += 1
        trace.append(trace[-1] + change)
        tick()
    return trace


def _best_pair(problem: Problem, g_N: Floats, chosen_N: NDArray, counts: Ints) -> tuple[float, int, int]:
    """(change of the objective, row out, row in) of the best allowed exchange; change inf if there is none."""
    k = int(chosen_N.sum())
    scale = problem.mu / k**2
    leave_N = problem.a_N / k + scale * (2 * g_N - problem.q_N)
    enter_N = problem.a_N / k + scale * (2 * g_N + problem.q_N)
    full_G = counts > problem.floor
    free_N = full_G[problem.group_N]
    best = _best_of(problem, scale, leave_N, enter_N, chosen_N & free_N, ~chosen_N, (np.inf, -1, -1))
    for group in np.unique(problem.group_N[chosen_N & ~free_N]):  # these may only be exchanged among themselves
        own_N = problem.group_N == group
        best = _best_of(problem, scale, leave_N, enter_N, chosen_N & own_N, ~chosen_N & own_N, best)
    return best


def _best_of(
    problem: Problem, scale: float, leave_N: Floats, enter_N: Floats, out_N: NDArray, in_N: NDArray,
    best: tuple[float, int, int],
) -> tuple[float, int, int]:  # fmt: skip
    """The best of these pairs, or `best`: enter_j - leave_i - 2 scale <z_i, z_j>.

    The last term is at most 2 scale ||z_i|| ||z_j||: rows that even so could not be of a better pair are passed over.
    """
    outs, ins = np.flatnonzero(out_N), np.flatnonzero(in_N)
    if not len(outs) or not len(ins):
        return best
    outs, ins = outs[np.argsort(-leave_N[outs], kind="stable")], ins[np.argsort(enter_N[ins], kind="stable")]
    reach = 2 * scale * float(np.sqrt(problem.q_N[outs].max() * problem.q_N[ins].max()))
    first = outs[:64], ins[:64]
    best = _block(problem, scale, leave_N, enter_N, *first, best)
    limit = best[0] + TIE
    outs = outs[enter_N[ins[0]] - leave_N[outs] - reach <= limit]
    ins = ins[enter_N[ins] - leave_N[outs[0]] - reach <= limit] if len(outs) else ins[:0]
    step = max(1, BLOCK // max(1, len(ins)))
    for at in range(0, len(outs), step):
        best = _block(problem, scale, leave_N, enter_N, outs[at : at + step], ins, best)
    return best


def _block(
    problem: Problem, scale: float, leave_N: Floats, enter_N: Floats, outs: NDArray, ins: NDArray,
    best: tuple[float, int, int],
) -> tuple[float, int, int]:  # fmt: skip
    if not len(outs) or not len(ins):
        return best
    change = enter_N[ins] - leave_N[outs, None]
    if scale:
        change = change - 2 * scale * (problem.z_ND[outs] @ problem.z_ND[ins].T)
    at = int(change.argmin())
    i, j = divmod(at, len(ins))
    return (float(change[i, j]), int(outs[i]), int(ins[j])) if change[i, j] < best[0] else best
