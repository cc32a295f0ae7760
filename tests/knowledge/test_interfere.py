"""Interference, first where it can be computed by hand, then on a tiny random model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from inlay.core.errors import InlayError
from inlay.knowledge.interfere import Bench, cosines, curve, gradients, groups, influence, pairs, pairwise, suppression
from inlay.knowledge.items import Item
from inlay.knowledge.trial import Practice, Trial
from tests.evaluate import tiny


def table(start):
    """A model whose parameters are the logits of one prompt's answer; items are targets."""
    logits = torch.tensor(start, dtype=torch.float32).requires_grad_()
    return logits, lambda target: F.cross_entropy(logits[None], torch.tensor([target]))


def cosine_of(start, a=0, b=1):
    logits, loss = table(start)
    return cosines(gradients(lambda i: loss((a, b)[i]), 2, [logits]))[0, 1]


@pytest.mark.parametrize("v", [3, 4, 10])
def test_two_targets_of_one_prompt_oppose_each_other_from_a_uniform_start(v):
    assert cosine_of([0.0] * v) == pytest.approx(-1 / (v - 1), abs=1e-6)


def test_the_same_two_look_aligned_while_both_push_off_an_old_answer():
    assert cosine_of([0.0, 0.0, 60.0, 0.0]) == pytest.approx(0.5, abs=1e-6)


def test_two_targets_of_one_prompt_are_never_both_learned():
    logits, loss = table([0.0] * 4)
    optimizer = torch.optim.SGD([logits], 0.5)
    for _ in range(200):
        optimizer.zero_grad()
        (loss(0) + loss(1)).backward()
        optimizer.step()
    assert sum(int(logits.argmax()) == t for t in (0, 1)) / 2 <= 0.5


def test_items_in_parameters_of_their_own_do_not_touch_each_other():
    blocks = torch.zeros(3, 4, requires_grad=True)

    def loss(i):
        return F.cross_entropy(blocks[i][None], torch.tensor([1]))

    def step(i):
        optimizer = torch.optim.AdamW([blocks], 0.1, weight_decay=0)
        optimizer.zero_grad()
        loss(i).backward()
        optimizer.step()

    made = influence(step, lambda: torch.stack([loss(i).detach() for i in range(3)]), 3, [blocks])
    assert (made[~np.eye(3, dtype=bool)] == 0).all() and (np.diag(made) < -0.05).all()
    assert not blocks.detach().any(), "parameters are as before"


def test_pairs_are_split_by_relation_and_distance():
    m = np.array([[1, 2.0, -3], [2, 1, -4], [-3, -4, 1]])
    made = pairs(m, ["a", "a", "b"], [0.1, 0.2, 0.9])
    assert made["mean"] == pytest.approx(-10 / 6) and made["same_relation"] == 2
    assert made["other_relation"] == -3.5 and made["below_zero"] == pytest.approx(4 / 6)
    assert made["near"] == 2 and np.isnan(made["far"])


def test_every_probe_is_in_one_group_of_the_right_size():
    for k in (1, 4, 10, 30):
        made = groups(24, 40, k)
        assert sorted(i for own, _ in made for i in own) == list(range(24))
        assert all(len(own) + len(rest) == k and len(set(rest)) == len(rest) for own, rest in made)
    with pytest.raises(InlayError, match="there are 3"):
        groups(24, 3, 30)


def test_suppression_of_what_moves_half_as_far_the_same_way():
    base = np.zeros((4, 3))
    one = np.random.default_rng(0).normal(size=(4, 3))
    made = suppression(base, one, one / 2)
    assert made["ratio"] == pytest.approx(0.5) and made["cosine"] == pytest.approx(1)
    assert np.isnan(suppression(base, base, base)["ratio"])


WORDS = "abcdef"


def items(n, prefix="q", relation="colour"):
    return [Item(f"{prefix}{i}", f"{prefix} {i}:", WORDS[i % len(WORDS)], relation=relation) for i in range(n)]


@pytest.fixture(scope="module")
def bench():
    import inlay

    host = inlay.attach(tiny.base("llama", 64))
    return Bench(host, tiny.tokenizer(), Practice(settings={"rank": 4}, lr=2e-2))


def test_a_trial_leaves_no_trace(bench):
    before = {k: v.clone() for k, v in bench.host.model.state_dict().items()}
    with bench.trial(items(3), presentations=2) as trial:
        trial.to()
        assert trial.step == trial.total == 2 and trial.presentations == 2 and trial.name in bench.host.edits
    after = bench.host.model.state_dict()
    assert (
        not bench.host.edits and before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in after)
    )


def test_each_item_is_presented_equally_often(bench):
    practice = Practice(batch_size=4)
    with Trial(bench.host, bench.tokenizer, items(10), practice, presentations=3) as trial:
        assert trial.total == 9
        seen = [tuple(e.input_ids) for s in range(trial.total) for e in trial.loop.feed.step(s)]
    assert {seen.count(tuple(r.input_ids)) for r in trial.rows} == {3}


def test_trials_are_repeatable(bench):
    def once():
        with bench.trial(items(4), presentations=3) as trial:
            trial.to(1)
            trial.to()
            return {k: v.detach().clone() for k, v in bench.host.tensors(trial.name).items()}

    a, b = once(), once()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_trial_says_what_it_lacks(bench):
    with pytest.raises(InlayError, match="not both"):
        bench.trial(items(2))
    with pytest.raises(InlayError, match="items to train on"):
        bench.trial([], steps=1)


def test_the_curve_compares_the_same_items_at_equal_presentations(bench):
    made = curve(bench, items(4), items(6, "other"), items(3, "kept"), (2, 8), presentations=15)
    points = {p["k"]: p for p in made["curve"]}
    assert set(points) == {1, 2, 8} and points[1]["drop"] == 0
    assert points[1]["steps"] == points[8]["steps"] == 15
    assert points[1]["p"] > points[8]["p"] > 0, "six answers to much the same question"
    assert points[8]["drop_p"] == pytest.approx(points[1]["p"] - points[8]["p"])
    assert all(0 <= p["retention"] <= 1 for p in made["curve"])
    assert not bench.host.edits
    with pytest.raises(InlayError, match="two roles"):
        curve(bench, items(4), items(6), items(3, "kept"), (2,))


def test_the_influence_matrix_is_what_a_training_step_does(bench):
    """Against the engine itself: one step of a trial on item 0 alone changes item 0's loss as the diagonal says."""
    from inlay.knowledge.trial import losses

    own = items(3)
    made = pairwise(bench, own)
    delta = made["influence"]["delta"]
    assert delta.shape == (3, 3) and (np.diag(delta) < 0).all()
    assert np.diag(made["gradients"]["cosine"]) == pytest.approx(1)
    with bench.trial(own[:1], steps=1) as trial:
        with trial.active():
            before = losses(trial.loop, trial.rows)
        trial.to()
        with trial.active():
            after = losses(trial.loop, trial.rows)
    assert float(after - before) == pytest.approx(delta[0, 0], abs=1e-4)
