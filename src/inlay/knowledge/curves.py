"""A yes or no against a distance: bins with intervals, smooth curves, and tests of the curve's shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from inlay.core.errors import InlayError
from inlay.tasks.score import wilson


def same_length(**arrays: Any) -> None:
    """InlayError unless all have as many items."""
    if len({len(a) for a in arrays.values()}) > 1:
        told = ", ".join(f"{k} {len(a)}" for k, a in arrays.items())
        raise InlayError(f"these must be of the same items, one entry each: {told}")


# ---- bins ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bins:
    """Shares per bin of distance. A bin without items has NaN, never 0."""

    edges: np.ndarray
    """(B + 1,); a bin holds its lower edge and, the last one only, its upper edge."""
    n: np.ndarray
    """Items (B,)."""
    share: np.ndarray
    """Share of yes (B,)."""
    low: np.ndarray
    """95 % Wilson interval (B,)."""
    high: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        """Middle of each bin (B,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2


def width_edges(d, width: float = 0.1) -> np.ndarray:
    """Edges of bins of fixed width from 0 to at least 1 and the largest distance."""
    if width <= 0:
        raise InlayError(f"bins need a width above 0, not {width}")
    top = max(1.0, float(np.max(d, initial=0.0)))
    return np.arange(int(np.ceil(top / width - 1e-9)) + 1) * width


def quantile_edges(d, bins: int = 10) -> np.ndarray:
    """Edges of bins of equal counts; fewer bins where distances tie."""
    d = np.asarray(d, float)
    if not len(d):
        raise InlayError("no distances to cut into bins")
    edges = np.unique(np.quantile(d, np.linspace(0, 1, bins + 1)))
    return edges if len(edges) > 1 else np.array([edges[0], edges[0] + 1e-9])


def place(d, edges) -> np.ndarray:
    """Bin of each distance (N,); -1 outside of all."""
    d, edges = np.asarray(d, float), np.asarray(edges, float)
    near = 1e-12  # edges such as 3 * 0.1 are a hair above what was meant
    at = np.searchsorted(edges - near, d, side="right") - 1
    at[(at == len(edges) - 1) & (d <= edges[-1] + near)] = len(edges) - 2
    return np.where(at >= len(edges) - 1, -1, at)


def binned(d, yes, width: float = 0.1, edges=None) -> Bins:
    """Share of `yes` (N,) per bin of `d` (N,), in bins of that width unless edges are given."""
    d, yes = np.asarray(d, float), np.asarray(yes, float)
    same_length(d=d, yes=yes)
    edges = width_edges(d, width) if edges is None else np.asarray(edges, float)
    at = place(d, edges)
    n = np.bincount(at[at >= 0], minlength=len(edges) - 1)
    k = np.bincount(at[at >= 0], yes[at >= 0], minlength=len(edges) - 1)
    share = np.divide(k, n, out=np.full(len(n), np.nan), where=n > 0)
    ends = [
        tuple(x / 100 for x in wilson(int(a), int(b))) if b else (np.nan, np.nan) for a, b in zip(k, n, strict=True)
    ]
    low, high = np.array(ends).T
    return Bins(edges, n, share, low, high)


# ---- curves without bins ---------------------------------------------------------------------------------------------
def moving_average(d, yes, window: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean distance, mean of yes) of `window` neighbours in rank, by default a fifth of the items (at least 5)."""
    d, yes = np.asarray(d, float), np.asarray(yes, float)
    same_length(d=d, yes=yes)
    window = min(len(d), window or max(5, len(d) // 5))
    if window < 1:
        raise InlayError("no items to average")
    order = np.argsort(d, kind="stable")

    def mean(x: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(x[order])])
        return (total[window:] - total[:-window]) / window

    return mean(d), mean(yes)


def isotonic(d, yes) -> tuple[np.ndarray, np.ndarray, bool]:
    """(sorted distances, monotone fit, whether it rises); the direction is the one that fits better."""
    from sklearn.isotonic import IsotonicRegression

    d, yes = np.asarray(d, float), np.asarray(yes, float)
    order = np.argsort(d, kind="stable")
    fits = {up: IsotonicRegression(increasing=up).fit_transform(d[order], yes[order]) for up in (True, False)}
    up = min(fits, key=lambda k: float(((fits[k] - yes[order]) ** 2).sum()))
    return d[order], fits[up], up


# ---- shape -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TwoLines:
    """Slopes left and right of a break, with z values."""

    break_at: float
    left: float
    right: float
    z_left: float
    z_right: float

    @property
    def inverted_u(self) -> bool:
        """Left slope above 0 and right slope below 0, both |z| > 1.96."""
        return bool(self.z_left > Z95 and self.z_right < -Z95)


Z95 = 1.959963984540054
NOT_TESTED = TwoLines(*[float("nan")] * 5)


def two_lines(d, yes, seed: int = 0, least: int = 40) -> TwoLines:
    """Two-lines test of a (inverted) U (after Simonsohn 2018, AMPPS 1, 538-555, with a simpler choice of the break).

    The break is the one that fits best on a random half; slopes are tested on the other half, by an interrupted line
    with heteroscedasticity-robust (HC3) errors. All NaN with fewer than `least` items or four distances in a half.

    Args:
        seed: of the halves; must not be the one that made the data.
    """
    import statsmodels.api as sm

    d, yes = np.asarray(d, float), np.asarray(yes, float)
    same_length(d=d, yes=yes)
    order = np.random.default_rng([seed, 715]).permutation(len(d))
    one, two = order[: len(d) // 2], order[len(d) // 2 :]
    if len(d) < least or min(len(np.unique(d[h])) for h in (one, two)) < 4:
        return NOT_TESTED
    at = _break(d[one], yes[one])
    x = _interrupted(d[two], at)
    if np.linalg.matrix_rank(x) < x.shape[1] or np.ptp(yes[two]) == 0:
        return NOT_TESTED
    fit = sm.OLS(yes[two], x).fit(cov_type="HC3")
    (left, right), (zl, zr) = fit.params[2:4], fit.tvalues[2:4]
    return TwoLines(float(at), float(left), float(right), float(zl), float(zr))


def _interrupted(d: np.ndarray, at: float) -> np.ndarray:
    """Columns: 1, a jump at the break, slope before it, slope behind it."""
    behind = (d > at).astype(float)
    return np.stack([np.ones_like(d), behind, (d - at) * (1 - behind), (d - at) * behind], 1)


def _break(d: np.ndarray, yes: np.ndarray) -> float:
    """The inner quantile at which a line with a kink fits best."""

    def loss(at: float) -> float:
        x = np.stack([np.ones_like(d), np.minimum(d - at, 0), np.maximum(d - at, 0)], 1)
        return float(((yes - x @ np.linalg.lstsq(x, yes, rcond=None)[0]) ** 2).sum())

    inner = np.unique(np.quantile(d, np.linspace(0.15, 0.85, 29)))
    inner = inner[(inner > d.min()) & (inner < d.max())]
    return float(min(inner, key=loss)) if len(inner) else float(np.median(d))


@dataclass(frozen=True)
class Logistic:
    """Logistic regression of yes on distance; NaN where it has no finite fit (yes or no throughout, separation)."""

    slope: float
    z: float
    p: float
    n: int
    controls: tuple[str, ...]
    """What was held fixed."""


def logistic(
    d, yes, relation: Sequence[str] | None = None, n_tokens=None, frequency=None, at_most: float = 50.0
) -> Logistic:
    """Slope of log odds on distance with robust (HC1) errors, with relation, number of tokens and frequency of the
    target held fixed.

    Args:
        frequency: of the target among the items, or in any corpus (N,); its log(1 + x) is used.
        at_most: slopes beyond this are separation, not estimates: reported as NaN.
    """
    import warnings

    import statsmodels.api as sm

    d, yes = np.asarray(d, float), np.asarray(yes, float)
    same_length(d=d, yes=yes)
    columns, names = [d], []
    if relation is not None and len(kinds := sorted(set(relation))) > 1:
        columns += [(np.asarray(relation, dtype=object) == r).astype(float) for r in kinds[1:]]
        names.append("relation")
    for name, x in (("n_tokens", n_tokens), ("frequency", frequency)):
        if x is not None and np.ptp(x := np.asarray(x, float)) > 0:
            columns.append(np.log1p(x) if name == "frequency" else x)
            names.append(name)
    x = np.stack([np.ones(len(d)), *columns], 1)
    nothing = Logistic(float("nan"), float("nan"), float("nan"), len(d), tuple(names))
    if not len(d) or np.ptp(yes) == 0 or np.ptp(d) == 0 or np.linalg.matrix_rank(x) < x.shape[1]:
        return nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # separation is what is looked at below
        try:
            fit = sm.GLM(yes, x, family=sm.families.Binomial()).fit(cov_type="HC1")
        except (np.linalg.LinAlgError, ValueError, RuntimeError):
            return nothing
    slope, z = float(fit.params[1]), float(fit.tvalues[1])
    if not np.isfinite([slope, z]).all() or abs(slope) > at_most:
        return nothing
    return Logistic(slope, z, float(fit.pvalues[1]), len(d), tuple(names))


# ---- two conditions, the same seeds ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class PairedSeeds:
    """Mean difference of two conditions over paired seeds."""

    difference: float
    low: float
    """95 % bootstrap interval: items resampled within each seed, the same ones for both conditions."""
    high: float
    per_seed: tuple[float, ...]
    seed_error: float
    """Standard error over seeds; NaN with one seed."""


def paired_seeds(a_SN, b_SN, draws: int = 2000, seed: int = 0) -> PairedSeeds:
    """`a` less `b`: outcomes per seed and item (S, N); NaN marks items that do not count for either."""
    a, b = np.atleast_2d(np.asarray(a_SN, float)), np.atleast_2d(np.asarray(b_SN, float))
    if a.shape != b.shape or not a.size:
        raise InlayError(f"paired seeds need the same seeds and items: {a.shape} here, {b.shape} there")
    draw, means, boots = np.random.default_rng(seed), [], []
    for row in a - b:
        row = row[np.isfinite(row)]
        if not len(row):
            raise InlayError("a seed has no item that counts in both conditions")
        means.append(row.mean())
        boots.append(np.array([row[draw.integers(len(row), size=len(row))].mean() for _ in range(draws)]))
    low, high = np.quantile(np.mean(boots, 0), [0.025, 0.975])
    error = float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")
    return PairedSeeds(float(np.mean(means)), float(low), float(high), tuple(map(float, means)), error)
