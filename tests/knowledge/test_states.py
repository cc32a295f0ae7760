"""States, directions and the null of deviation, on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.curves import quantile_edges
from inlay.knowledge.states import deviation, direction, free, histories, progress, shares, states


def test_states_of_four_items():
    d0, em = np.array([0.5, 0.5, 0.2, 0]), np.array([0, 0, 0, 1])
    found = states(d0, [0.7, 0.3, 0.2, 0], em)
    assert found.tolist() == ["away", "approached", "stalled", "learned"]
    assert shares(found)["away"] == 1 / 4 and shares(found[d0 > 0])["away"] == 1 / 3


def test_away_in_distance_and_in_direction_are_two_things():
    z0, t, now = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), np.array([[-1.0, 1.0]])
    distance = 1 - (now / np.sqrt(2) * t).sum()
    assert distance == pytest.approx(1.707107, abs=1e-6)
    assert states([1.0], [distance], [0]).tolist() == ["away"]
    assert direction(z0, now, t) == pytest.approx([-0.382683], abs=1e-6)
    assert np.isnan(direction(z0, z0, t)).all()
    assert progress([1.0, 0.0], [0.25, 0.0])[0] == 0.75 and np.isnan(progress([0.0], [0.0])).all()


def test_histories():
    steps = [["stalled", "away", "learned", "away"], ["stalled", "learned", "stalled", "away"]]
    made = {k: v.tolist() for k, v in histories(steps).items()}
    assert made == {
        "transient_away": [False, True, False, False],
        "relapsed": [False, False, True, False],
        "never_moved": [True, False, False, False],
    }
    with pytest.raises(InlayError, match="snapshot"):
        histories([])


def test_unrelated_answers_have_a_falling_deviation_and_no_excess():
    draw = np.random.default_rng(5)
    d0, dt = draw.random(4000), draw.random(4000)
    made = deviation(
        d0,
        dt,
        np.zeros(4000),
        ["r"] * 4000,
        lambda to, of: (dt[of], np.zeros(len(of), bool)),
        np.linspace(0, 1, 9),
        draws=50,
    )
    assert made.bins.share[0] > 0.9 and made.bins.share[-1] < 0.1
    assert np.abs(made.excess).max() < 0.05
    assert made.null == pytest.approx(1 - made.bins.centers, abs=0.02)  # P(uniform > d), averaged over the bin


def test_the_null_permutes_within_a_relation_only():
    seen = []

    def recompute(to, of):
        seen.append((to, of))
        return np.zeros(len(to)), np.zeros(len(to), bool)

    relation = ["a", "b", "a", "b", "c"]
    deviation(np.ones(5), np.ones(5), np.zeros(5), relation, recompute, [0, 2], draws=20)
    for to, of in seen:
        assert [relation[i] for i in to] == [relation[i] for i in of] and sorted(of) == sorted(to)
    assert any((to != of).any() for to, of in seen)


def test_a_hidden_space_is_encoded_again_in_the_receiving_prompt():
    """Features that mix in the prompt: the null through the encoder differs from features merely permuted."""
    draw = np.random.default_rng(1)
    n, wide = 60, 6
    prompt, answer = draw.normal(size=(n, wide)) * 3, draw.normal(size=(n, wide))
    target = draw.normal(size=(n, wide))

    def encode(i, j):
        return prompt[i] + answer[j]

    def cosine_distance(a, b):
        return 1 - (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    gold = prompt + target
    start = cosine_distance(prompt + draw.normal(size=(n, wide)), gold)
    own = np.arange(n)
    end = cosine_distance(encode(own, own), gold)

    def again(to, of):
        return cosine_distance(encode(to, of), gold[to]), np.zeros(n, bool)

    def moved(to, of):
        return cosine_distance(encode(of, of), gold[to]), np.zeros(n, bool)

    edges = quantile_edges(start, 3)
    right, wrong = (deviation(start, end, np.zeros(n), ["r"] * n, f, edges, draws=40) for f in (again, moved))
    assert (wrong.null - right.null).min() > 0.2
    assert np.abs(right.excess).max() < 0.2 < np.abs(wrong.excess).max()


def test_free_space_gives_right_answers_no_distance_and_empty_ones_one():
    answers, targets = ["x", "", "y"], ["y", "x", "y"]
    z = {"x": [1.0, 0.0], "y": [0.0, 2.0], "": [0.0, 0.0]}
    recompute = free([z[a] for a in answers], [z[t] for t in targets], answers, targets)
    distance, em = recompute(np.array([0, 0, 1, 1]), np.array([0, 2, 1, 0]))
    assert distance == pytest.approx([1, 0, 1, 0]) and em.tolist() == [False, True, False, True]


def test_the_null_of_an_embedded_bases_states_is_made_in_the_receiving_prompt():  # check 9, on a real model
    """Start and end are answers drawn by lot, so nothing went anywhere: the null in the receiving prompt says so, and
    one that only permutes features, each still of its giver's prompt, would find that training draws answers near."""
    import inlay
    from inlay.knowledge.exam import Exam
    from inlay.knowledge.feature import Space, features
    from inlay.knowledge.measure import MeasureSettings
    from inlay.knowledge.world import World

    model, tokenizer = inlay.load_base("tiny-llama", device="cpu")
    items = World().random_pairs(96)
    exam = Exam(inlay.attach(model), tokenizer, items, MeasureSettings(space=Space("hidden:-1")))
    draw = np.random.default_rng(3)
    every = [i.target for i in World(1).random_pairs(200)]
    before, after = (list(draw.choice(every, len(items))) for _ in range(2))
    tsd, z = exam.distance(before), exam.features(after)
    deal = exam.recompute(after)
    own = np.arange(len(items))
    (alone,) = features(exam.host, tokenizer, [items[3].prompt], [after[7]], "hidden:-1")
    dealt, _ = deal(np.array([3]), np.array([7]))
    assert dealt == pytest.approx(exam.distance_of(alone[None].numpy(), [3]), abs=1e-5)

    def permuted(to, of):
        return exam.distance_of(z[of], to), np.zeros(len(to), bool)

    end, none = exam.distance_of(z), np.zeros(len(items))
    same = ["r"] * len(items)
    edges = quantile_edges(tsd, 2)
    right, wrong = (deviation(tsd, end, none, same, f, edges, tau=0, draws=8) for f in (deal, permuted))
    assert deal(own, own)[0] == pytest.approx(permuted(own, own)[0], abs=1e-5)
    assert (wrong.null - right.null).min() >= 0.08  # 0.15 and 0.24
    assert (right.low <= right.excess).all() and (right.excess <= right.high).all()
    assert (wrong.excess < wrong.low).any(), "permuted features see an effect where there is none"
