"""Bins, shapes and paired seeds: arithmetic by hand, published intervals, simulations, and statsmodels' peers."""

from __future__ import annotations

import math

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.curves import (
    binned,
    isotonic,
    logistic,
    moving_average,
    paired_seeds,
    quantile_edges,
    two_lines,
)


def test_bins_without_items_are_nan_and_never_zero():
    bins = binned([0.05, 0.15, 0.15, 0.95], [1, 0, 1, 0], width=0.1)
    assert bins.n.tolist() == [1, 2, 0, 0, 0, 0, 0, 0, 0, 1]
    assert bins.share[[0, 1, 9]].tolist() == [1, 0.5, 0]
    assert np.isnan(bins.share[2:9]).all() and np.isnan(bins.low[2:9]).all()


@pytest.mark.parametrize(("k", "n", "ends"), [(1, 2, (0.0945, 0.9055)), (0, 5, (0, 0.4345)), (3, 10, (0.1078, 0.6032))])
def test_wilson_intervals_are_the_published_ones(k, n, ends):
    bins = binned([0.5] * n, [1] * k + [0] * (n - k))
    assert (bins.low[5], bins.high[5]) == pytest.approx(ends, abs=5e-5)


def test_an_edge_belongs_to_the_bin_above_it_and_the_last_one_to_the_last():
    assert binned([0.1, 0.3, 0.6, 0.7, 1.0], [1] * 5).n.tolist() == [0, 1, 0, 1, 0, 0, 1, 1, 0, 1]
    assert binned([0.0, 1.7], [1, 1]).n.sum() == 2


def test_quantile_bins_have_equal_counts():
    d = np.random.default_rng(0).random(80)
    assert set(binned(d, d > 0.5, edges=quantile_edges(d, 8)).n) == {10}
    assert binned([0.4] * 5, [1, 0, 1, 0, 1], edges=quantile_edges([0.4] * 5)).n.tolist() == [5]


def test_moving_average_of_everything_is_the_mean():
    d, y = np.arange(10) / 10, np.arange(10) % 3 == 0
    at, share = moving_average(d, y, 10)
    assert at == pytest.approx([d.mean()]) and share == pytest.approx([y.mean()])
    at, share = moving_average(d[::-1], y[::-1], 1)
    assert at.tolist() == pytest.approx(d.tolist()) and share.tolist() == y.tolist()


def test_isotonic_finds_the_direction():
    d = np.linspace(0, 1, 50)
    _, fit, up = isotonic(d, 1 - d)
    assert not up and fit == pytest.approx(1 - d)
    assert isotonic(d, d > 0.4)[2]


CURVES = {
    "inverted": (lambda x: 0.9 - 3 * (x - 0.5) ** 2, 0.95, 1.0),
    "rising": (lambda x: 0.1 + 0.8 * x, 0.0, 0.01),
    "falling": (lambda x: 0.9 - 0.8 * x, 0.0, 0.01),
    "flat": (lambda x: 0.5 + 0 * x, 0.0, 0.03),
}


@pytest.mark.parametrize("name", CURVES)
def test_two_lines_declares_an_inverted_u_where_there_is_one_and_hardly_elsewhere(name):
    curve, least, most = CURVES[name]
    draw = np.random.default_rng(11)
    found = 0
    for k in range(200):
        x = draw.random(600)
        found += two_lines(x, draw.random(600) < curve(x), seed=k).inverted_u
    assert least <= found / 200 <= most


def test_two_lines_does_not_judge_what_it_cannot():
    assert math.isnan(two_lines([0.1, 0.2], [0, 1]).z_left)
    assert not two_lines([0.5] * 100, [0, 1] * 50).inverted_u


def test_logistic_recovers_its_slope_and_controls_take_away_what_is_theirs():
    draw = np.random.default_rng(3)
    d = draw.random(4000)
    fit = logistic(d, draw.random(4000) < 1 / (1 + np.exp(-(1 - 2 * d))))
    assert fit.slope == pytest.approx(-2, abs=0.35) and fit.z < -5
    group = draw.integers(2, size=4000)
    y = draw.random(4000) < np.where(group, 0.8, 0.2)
    d = 0.4 * group + 0.6 * draw.random(4000)
    assert logistic(d, y).z > 10
    held = logistic(d, y, relation=[str(g) for g in group], n_tokens=[1] * 4000)
    assert abs(held.z) < 3 and held.controls == ("relation",)


def test_logistic_does_not_report_separation_as_an_estimate():
    d = np.linspace(0, 1, 40)
    assert math.isnan(logistic(d, d > 0.5).slope) and math.isnan(logistic(d, d >= 0).slope)


def test_paired_seeds():
    a, b = np.ones((5, 20)), np.zeros((5, 20))
    same = paired_seeds(a, b)
    assert (same.difference, same.low, same.high, same.seed_error) == (1, 1, 1, 0)
    draw = np.random.default_rng(0)
    a, b = draw.random((5, 200)) < 0.6, draw.random((5, 200)) < 0.6
    made = paired_seeds(a, b)
    assert made.low < made.difference < made.high
    assert made.difference == pytest.approx(a.mean() - b.mean())
    spread = (a.astype(float) - b).std() / math.sqrt(1000)
    assert (made.high - made.low) / 3.92 == pytest.approx(spread, rel=0.1)
    a = a.astype(float)
    a[:, :100] = np.nan
    assert paired_seeds(a, b).difference == pytest.approx(a[:, 100:].mean() - b[:, 100:].mean())
    with pytest.raises(InlayError, match="same seeds"):
        paired_seeds(np.ones((2, 3)), np.ones((3, 2)))
