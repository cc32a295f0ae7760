"""Paired statistics against scipy, brute force, and a plain bootstrap."""

import itertools
import random

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.evaluate.stats import bootstrap_difference, mcnemar, paired


def test_mcnemar_is_the_binomial_test():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for a, b in itertools.product((0, 1, 2, 7, 30, 400, 1200), repeat=2):
        expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
        assert mcnemar(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand():
    assert mcnemar(5, 0) == 2 / 32
    assert mcnemar(3, 1) == 2 * (1 + 4) / 16
    assert mcnemar(4, 4) == 1.0


def test_bootstrap_draws_as_resampling_items_does():
    items = [1] * 30 + [-1] * 12 + [0] * 158
    rng = random.Random(0)
    means = sorted(sum(rng.choices(items, k=200)) / 200 for _ in range(4000))
    low, high = bootstrap_difference(30, 12, 200)
    assert low == pytest.approx(means[100], abs=0.011) and high == pytest.approx(means[3899], abs=0.011)
    assert bootstrap_difference(30, 12, 200) == (low, high)
    assert bootstrap_difference(9, 0, 9) == (1.0, 1.0)


def test_paired():
    torch.manual_seed(0)
    first = [bool(x) for x in torch.rand(300) < 0.7]
    second = [bool(x) for x in torch.rand(300) < 0.5]
    found = paired(first, second)
    assert found.difference == pytest.approx(100 * (sum(first) - sum(second)) / 300)
    assert found.low < found.difference < found.high and found.p < 0.001
    mirror = paired(second, first)
    assert mirror.p == found.p and (mirror.first, mirror.second) == (found.second, found.first)
    with pytest.raises(InlayError, match="same items"):
        paired(first, second[:-1])
    with pytest.raises(InlayError, match="no such comparison"):
        bootstrap_difference(5, 6, 10)
