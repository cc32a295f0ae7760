"""The data filter: solvers against brute force, and the laws of its readings."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.search import Problem, eliminate
from inlay.knowledge.select import front, select_subset
from inlay.knowledge.spread import mutual_distance, spread
from inlay.knowledge.states import unit

FIVE = [0, 0.1, 0.5, 0.9, 1]


def features(d, z, lam, chosen):
    """J of reading A, from its definition."""
    d, z = np.asarray(d, float), unit(z)
    chosen = list(chosen)
    whole, sigma = spread(z), d.std()
    return (d[chosen].mean() / sigma if sigma > 1e-12 else 0.0) - (
        lam * spread(z[chosen]) / whole if whole > 1e-12 else 0.0
    )


def variance(d, lam, chosen):
    d = np.asarray(d, float)[list(chosen)]
    return d.mean() - lam * d.var()


@pytest.mark.parametrize(
    ("lam", "kept", "objective"),
    [
        (0, {0, 1, 2}, 0.2),
        (0.5, {0, 1, 2}, 0.176667),
        (1, {0, 1, 2}, 0.153333),
        (3, {0, 1, 4}, -0.24),
        (10, {0, 1, 4}, -1.655556),
    ],
)
def test_five_distances_by_hand(lam, kept, objective):
    made = select_subset(FIVE, keep=0.6, lam=lam, variance_of="distances")
    assert set(made.kept) == kept and made.objective == pytest.approx(objective, abs=1e-6)
    assert set(made.dropped) == set(range(5)) - kept


def test_variance_of_distances_is_solved_exactly():
    draw = np.random.default_rng(0)
    for case in range(400):
        n = int(draw.integers(2, 13))
        k = int(draw.integers(1, n + 1))
        d = draw.integers(0, 5, n) / 4 if case % 2 else draw.random(n)
        lam = float(draw.choice([0, 0.3, 1, 3, 10]))
        best = min(variance(d, lam, c) for c in combinations(range(n), k))
        made = select_subset(d, keep=k / n, lam=lam, variance_of="distances")
        assert len(made.kept) == k
        assert made.objective == pytest.approx(best, abs=1e-10) == variance(d, lam, made.kept)


def test_spread_of_features_is_solved_nearly_exactly_and_exchanges_only_help():
    draw = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        n = int(draw.integers(3, 13))
        k = int(draw.integers(1, n))
        d, z, lam = draw.random(n), draw.standard_normal((n, 3)), float(draw.choice([0.3, 1, 3]))
        best = min(features(d, z, lam, c) for c in combinations(range(n), k))
        made = select_subset(d, z, k / n, lam)
        assert made.objective == pytest.approx(features(d, z, lam, made.kept), abs=1e-10)
        assert all(b < a for a, b in zip(made.trace, made.trace[1:], strict=False))
        assert made.trace[-1] == pytest.approx(made.objective, abs=1e-10)
        hits += made.objective <= best + 1e-9
    assert hits >= 190


@pytest.mark.parametrize("reading", ["features", "distances"])
def test_without_spread_the_nearest_stay_and_of_equals_the_lower_id(reading):
    d = [0.5, 0.2, 0.5, 0.1, 0.5, 0.9]
    names = ["f", "e", "d", "c", "b", "a"]
    made = select_subset(d, np.random.default_rng(0).standard_normal((6, 4)), 4 / 6, 0, reading, names)
    assert {names[i] for i in made.kept} == {"c", "e", "b", "d"}


@pytest.mark.parametrize("reading", ["features", "distances", "band"])
def test_keeping_all_is_the_identity(reading):
    d, z = np.random.default_rng(0).random(9), np.random.default_rng(1).standard_normal((9, 3))
    made = select_subset(d, z, 1.0, 1.0, reading)
    assert made.kept.tolist() == list(range(9)) and len(made.dropped) == 0


def test_constant_distances_leave_the_spread_alone():
    """Ten copies of one target and five others: one of the copies and the others stay."""
    z = np.vstack([np.tile(np.eye(6)[0], (10, 1)), np.eye(6)[1:]])
    made = select_subset(np.full(15, 0.4), z, 6 / 15)
    assert made.kept.tolist() == [0, 10, 11, 12, 13, 14]


def test_equal_features_leave_the_distance_alone():
    made = select_subset([0.3, 0.1, 0.2], np.ones((3, 2)), 2 / 3)
    assert made.kept.tolist() == [1, 2]
    assert np.isfinite(select_subset([0.3] * 3, np.zeros((3, 2)), 2 / 3).objective)


@pytest.mark.parametrize("reading", ["features", "distances", "band"])
@pytest.mark.parametrize("floor", [0, 2])
def test_the_order_of_the_input_changes_nothing(reading, floor):
    draw = np.random.default_rng(3)
    d, z = draw.integers(0, 6, 40) / 5, draw.integers(-1, 2, (40, 4)).astype(float)
    names, relation = [f"item{i:02d}" for i in range(40)], draw.integers(0, 4, 40)
    want = {names[i] for i in select_subset(d, z, 0.6, 1, reading, names, floor, relation).kept}
    for _ in range(5):
        p = draw.permutation(40)
        made = select_subset(d[p], z[p], 0.6, 1, reading, [names[i] for i in p], floor, relation[p])
        assert {names[p[i]] for i in made.kept} == want


@pytest.mark.parametrize("reading", ["features", "distances", "band"])
def test_every_relation_keeps_its_share(reading):
    draw = np.random.default_rng(4)
    d, z = draw.random(60), draw.standard_normal((60, 5))
    relation = ["rare"] * 2 + ["far"] * 8 + ["common"] * 50
    d[:10] += 5
    free = select_subset(d, z, 0.5, 0.1, reading)
    made = select_subset(d, z, 0.5, 0.1, reading, None, 3, relation)
    count = {r: sum(relation[i] == r for i in made.kept) for r in set(relation)}
    assert count["rare"] == 2 and count["far"] >= 3 and sum(count.values()) == 30
    assert sum(relation[i] != "common" for i in free.kept) < 5
    with pytest.raises(InlayError, match="raise keep or lower keep_per_relation"):
        select_subset(d, z, 0.1, 1, reading, None, 9, relation)


def test_a_bound_that_does_not_bind_changes_nothing():
    draw = np.random.default_rng(5)
    d, z = draw.random(30), draw.standard_normal((30, 4))
    relation = ["a", "b", "c"] * 10
    for reading in ("features", "distances"):
        free = select_subset(d, z, 0.7, 1, reading)
        bound = select_subset(d, z, 0.7, 1, reading, None, 1, relation)
        assert bound.kept.tolist() == free.kept.tolist()


def test_the_band_drops_both_tails():
    made = select_subset([0.9, 0.1, 0.5, 0.4, 0.0, 1.0, 0.6], keep=4 / 7, variance_of="band")
    assert made.kept.tolist() == [1, 2, 3, 6]


def test_stale_sums_change_nothing():
    """The search that computes few rows anew drops what the plain one drops."""
    draw = np.random.default_rng(6)
    for n, d in ((400, 3), (900, 40)):
        z = unit(draw.standard_normal((n, d)) + 1)
        problem = Problem(draw.random(n), z, 2.0, np.zeros(n, dtype=np.int64))
        alive = np.ones(n, dtype=bool)
        for left in range(n, n // 2, -1):
            score = problem.a_N + 2.0 * (2 * z @ z[alive].sum(0) - problem.q_N) / (left - 1)
            alive[np.where(alive, score, -np.inf).argmax()] = False
        assert (eliminate(problem, n // 2) == alive).all()


def test_the_reported_spread_is_the_mean_mutual_distance():
    z = np.random.default_rng(7).standard_normal((25, 8)) + 0.5
    made = select_subset(np.linspace(0, 1, 25), z, 0.6)
    assert 15 / 14 * made.spread == pytest.approx(mutual_distance(z[made.kept]), abs=1e-10)
    assert made.spread == pytest.approx(1 - np.linalg.norm(unit(z[made.kept]).mean(0)) ** 2, abs=1e-10)


def test_three_thousand_items_take_less_than_two_seconds():
    draw = np.random.default_rng(8)
    d, z = draw.random(3000), draw.standard_normal((3000, 64))
    began = time.process_time()
    select_subset(d, z, 0.8, swaps=0)
    assert time.process_time() - began < 2


def test_more_weight_on_spread_spreads_more():
    draw = np.random.default_rng(9)
    z = draw.standard_normal((200, 6)) + 1
    made = front(draw.random(200), z, 0.5, (0, 1, 4, 16), randoms=20)
    assert made["distance"] == sorted(made["distance"]) and made["spread"] == sorted(made["spread"])
    assert min(made["random_distance"]) > made["distance"][0] and len(made["random_spread"]) == 20


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep": 0}, "above 0 and at most 1"),
        ({"keep": 1.5}, "above 0 and at most 1"),
        ({"lam": -1}, "0 or more"),
        ({"variance_of": "colour"}, "unknown reading"),
        ({"Z": None}, "needs the features"),
        ({"Z": np.ones((3, 2))}, "4 distances and 3 rows"),
        ({"d": [0, 1, 2, np.nan]}, "1 distances are not finite"),
        ({"ids": ["a", "a", "b", "c"]}, "3 of them different"),
        ({"keep_per_relation": 1}, "needs the relation"),
    ],
)
def test_mistakes_are_named(change, match):
    with pytest.raises(InlayError, match=match):
        select_subset(**{"d": [0, 1, 2, 3], "Z": np.eye(4), **change})
