"""Comparing two runs on the same items: who is right where the other is wrong. No dependency beyond torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from inlay.core.errors import InlayError


@dataclass(frozen=True)
class Paired:
    """Two runs on the same items; shares are in percent."""

    n: int
    both: int
    """Items both got right."""
    first: int
    """Items only the first got right."""
    second: int
    """Items only the second got right."""
    difference: float
    """Accuracy of the first less that of the second, in points."""
    low: float
    """95 % bootstrap interval of the difference."""
    high: float
    p: float
    """Two-sided exact McNemar test of no difference."""


def mcnemar(first: int, second: int) -> float:
    """Exact two-sided p of McNemar's test: discordant pairs are fair coin tosses under no difference (McNemar 1947).

    Args:
        first, second: items that only the one, only the other got right.
    """
    n, k = first + second, min(first, second)
    tail = term = 1
    for i in range(k):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n) if n < 1000 else min(1.0, math.exp(math.log(2 * tail) - n * math.log(2)))


def bootstrap_difference(
    plus: int, minus: int, n: int, level: float = 0.95, draws: int = 20_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean paired difference (Efron 1979): `plus` of n items differ by +1, `minus` by -1.

    Resampling items with replacement draws these two counts from a multinomial, so the counts are drawn, not the items.
    """
    if n < 1 or plus < 0 or minus < 0 or plus + minus > n:
        raise InlayError(f"{plus} better and {minus} worse of {n} items: no such comparison")
    generator = torch.Generator().manual_seed(seed)
    trials = torch.full((draws,), float(n), dtype=torch.float64)
    ups = torch.binomial(trials, torch.full_like(trials, plus / n), generator=generator)
    share = minus / (n - plus) if n > plus else 0.0
    downs = torch.binomial(trials - ups, torch.full_like(trials, share), generator=generator)
    tail = (1 - level) / 2
    low, high = torch.quantile((ups - downs) / n, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def paired(first: Sequence[bool], second: Sequence[bool], seed: int = 0) -> Paired:
    """Compare two runs, item by item: `first[i]` and `second[i]` say who got item i right."""
    if len(first) != len(second) or not first:
        raise InlayError(f"a paired comparison needs the same items: {len(first)} here, {len(second)} there")
    a = sum(x and not y for x, y in zip(first, second, strict=True))
    b = sum(y and not x for x, y in zip(first, second, strict=True))
    both = sum(x and y for x, y in zip(first, second, strict=True))
    n = len(first)
    low, high = bootstrap_difference(a, b, n, seed=seed)
    return Paired(n, both, a, b, 100.0 * (a - b) / n, 100.0 * low, 100.0 * high, mcnemar(a, b))
