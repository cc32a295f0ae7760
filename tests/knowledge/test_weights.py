"""Weights, soft distances and the weighted loss as pure functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inlay.core.errors import InlayError
from inlay.knowledge.weights import RunningMean, soft_distance, token_distance, weighted_loss, weights, weights_by_mean


def batch(items=8, wide=5, vocabulary=11, width=6, seed=0):
    """Logits, labels (the first third of each row not learned) and embeddings."""
    torch.manual_seed(seed)
    logits = torch.randn(items, wide, vocabulary, requires_grad=True)
    labels = torch.randint(0, vocabulary, (items, wide))
    labels[torch.rand(items, wide) < 0.3] = -100
    labels[:, -1] = 3
    return logits, labels, torch.randn(vocabulary, width)


def test_two_items_by_hand():
    w = weights(torch.tensor([0.0, 1.0]), 1.0)
    torch.testing.assert_close(w, torch.tensor([0.537883, 1.462117], dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [-2.0, -0.5, 1.0, 2.0])
def test_weights_have_mean_one_follow_the_signal_and_ignore_its_origin(beta):
    x = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 2
    w = weights(x, beta)
    assert w.mean().item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(weights(x + 7.5, beta), w, atol=1e-5, rtol=0)
    ordered = w[x.argsort(descending=beta < 0)]
    assert (ordered.diff() >= 0).all() and ordered[0] < ordered[-1]


def test_kappa_bounds_weights_before_they_are_rescaled():
    x = torch.tensor([0.0] * 9 + [2.0])
    raw = (5 * x.double()).exp()
    clipped = (raw / raw.mean()).clamp(1 / 3, 3)
    assert clipped.min() == 1 / 3 and clipped.max() == 3
    torch.testing.assert_close(weights(x, 5.0, kappa=3), clipped / clipped.mean())
    assert weights(torch.linspace(-1, 1, 7), 100.0).isfinite().all()


@pytest.mark.parametrize(("x", "beta"), [(torch.rand(7), 0.0), (torch.full((7,), 0.3), 2.0), (torch.rand(1), -2.0)])
def test_without_differences_weights_are_exactly_one(x, beta):
    assert torch.equal(weights(x, beta), torch.ones(len(x), dtype=torch.float64))


def test_ones_give_the_mean_over_items_of_mean_cross_entropies():
    logits, labels, _ = batch()
    each = [F.cross_entropy(o[t != -100], t[t != -100]) for o, t in zip(logits, labels, strict=True)]
    want = torch.stack(each).mean()
    torch.testing.assert_close(weighted_loss(logits, labels, torch.ones(8)), want, atol=1e-6, rtol=0)
    torch.testing.assert_close(weighted_loss(logits, labels), want, atol=1e-6, rtol=0)


def test_a_batch_is_its_accumulated_parts():
    logits, labels, _ = batch()
    w = weights(torch.rand(8), 1.5)
    (whole,) = torch.autograd.grad(weighted_loss(logits, labels, w), logits)
    parts = sum(weighted_loss(logits[i : i + 2], labels[i : i + 2], w[i : i + 2]) / 4 for i in range(0, 8, 2))
    (summed,) = torch.autograd.grad(parts, logits)
    torch.testing.assert_close(summed, whole, atol=1e-6, rtol=0)


def test_no_gradient_reaches_weights_or_signals():
    logits, labels, E = batch()
    x = soft_distance(logits, labels, E)
    assert x.requires_grad and not weights(x, 1.0).requires_grad
    w = torch.ones(8, requires_grad=True)
    loss = weighted_loss(logits, labels, w)
    assert torch.autograd.grad(loss, w, allow_unused=True) == (None,)


def test_an_item_without_positions_adds_nothing():
    logits, labels, E = batch()
    labels[3] = -100
    w = weights(torch.rand(8), 1.0)
    loss = weighted_loss(logits, labels, w)
    (g,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and g.isfinite().all() and not g[3].any()
    assert soft_distance(logits, labels, E)[3] == 0
    assert weighted_loss(logits, torch.full_like(labels, -100)) == 0


def test_a_certain_right_prediction_is_at_no_distance_and_a_uniform_one_at_that_of_the_mean():
    _, labels, E = batch()
    labels = labels.clamp_min(0)
    sure = F.one_hot(labels, 11).float() * 1e4
    assert soft_distance(sure, labels, E).abs().max() <= 1e-6
    want = (1 - F.cosine_similarity(E.mean(0), E[labels], dim=-1)).mean(1)
    torch.testing.assert_close(soft_distance(torch.zeros(8, 5, 11), labels, E), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_change_nothing(chunk):
    logits, labels, E = batch()
    want, got = soft_distance(logits, labels, E), soft_distance(logits, labels, E, chunk=chunk)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    (a,), (b,) = (torch.autograd.grad(d.sum(), logits) for d in (want, got))
    torch.testing.assert_close(b, a, atol=1e-6, rtol=0)


def test_the_likeliest_tokens_come_near_the_whole():
    logits, labels, E = batch()
    whole = soft_distance(logits * 5, labels, E)
    gaps = [(soft_distance(logits * 5, labels, E, top_k=k) - whole).abs().max().item() for k in (2, 5, 8, 11)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] == 0


def test_tokens_that_are_no_answer_are_left_out():
    logits, labels, E = batch()
    without = labels.masked_fill(labels == 3, -100)
    torch.testing.assert_close(soft_distance(logits, labels, E, skip=(3,)), soft_distance(logits, without, E))


def test_a_target_without_an_embedding_is_orthogonal():
    E = torch.eye(4)
    E[2] = 0
    logits = torch.zeros(1, 4, requires_grad=True)
    d = token_distance(logits, torch.tensor([2]), E)
    assert d.item() == 1
    assert torch.autograd.grad(d.sum(), logits)[0].isfinite().all()


def test_the_running_mean_is_unbiased_from_its_first_step_and_comes_back():
    mean = RunningMean(0.9)
    assert not mean.known
    for _ in range(3):
        mean.update(6.0, 4)
        assert mean.mean == pytest.approx(1.5)
    other = RunningMean(0.9)
    other.restore(mean.state())
    mean.update(1.0, 8), other.update(1.0, 8)
    assert other.mean == mean.mean < 1.5
    x = torch.tensor([0.1, 0.9])
    exact = (2 * x.double()).exp()
    torch.testing.assert_close(weights_by_mean(x, 2, exact.mean().item()), weights(x, 2, 100), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("x", "beta", "kappa", "match"),
    [([0.0], 1, 0.5, "kappa"), ([0.0], 1e3, 5, "out of reach"), ([float("nan")], 1, 5, "not finite")],
)
def test_mistakes_are_named(x, beta, kappa, match):
    with pytest.raises(InlayError, match=match):
        weights(torch.tensor(x), beta, kappa)
