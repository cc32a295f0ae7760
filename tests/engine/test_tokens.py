"""Losses token by token, and what is read of logits beside them: both ways, and the sums they must have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from inlay.engine import head
from inlay.engine.example import learned
from inlay.engine.loss import linear_cross_entropies, linear_cross_entropy
from inlay.train.ways import Packed, Plain
from tests.engine.test_packed import ROWS
from tests.laws.zoo import dressed


def gap(logits, target):
    """How far the likeliest token is ahead of the right one, smoothly."""
    return logits.logsumexp(-1) * 0.5 - logits.gather(1, target[:, None])[:, 0].tanh()


def gradients(host, name, way, through):
    """(losses, what is read, gradient of every tensor) of a sum that weighs tokens unevenly."""
    losses, said = [], []
    with host.using(name), way.active():
        for rows in way.split(ROWS):
            loss_N, said_N = way.tokens(rows, gap, through)
            uneven = torch.linspace(0.5, 1.5, len(loss_N))
            total = (loss_N * uneven).sum() + ((said_N * uneven**2).sum() if through else 0.0)
            total.backward()
            assert said_N.requires_grad == through
            for row, a, b in zip(
                rows, *(t.detach().split([learned(r) for r in rows]) for t in (loss_N, said_N)), strict=True
            ):
                losses.append((ROWS.index(row), a))
                said.append((ROWS.index(row), b))
    found = {k: t.grad for k, t in host.tensors(name).items() if t.grad is not None}
    for t in host.tensors(name).values():
        t.grad = None
    return *(torch.cat([t for _, t in sorted(made, key=lambda one: one[0])]) for made in (losses, said)), found


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("family", ["llama", "bloom", "gptj", "gpt2"])
def test_packed_tokens_are_the_plain_ones(family, through):
    host = dressed(family)
    for name in ("lora", "prefix", "series"):
        # One forward each way, so that tokens are weighed alike.
        want = gradients(host, name, Sorted(Plain(host, 0, 9)), through)
        got = gradients(host, name, Sorted(Packed(host, 0, 100)), through)
        torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)
        assert want[2].keys() == got[2].keys()
        for key, g in want[2].items():
            torch.testing.assert_close(got[2][key], g, rtol=1e-3, atol=2e-5 * float(g.abs().max()) + 1e-5)


class Sorted:
    """A way that keeps the rows of a step together and in their order."""

    def __init__(self, way):
        self.way, self.tokens, self.active = way, way.tokens, way.active

    def split(self, rows):
        return [list(rows)]


@pytest.mark.parametrize("at", ["q,v", "q,head"])
def test_tokens_add_up_to_the_loss(at):
    """Also where an adapter hangs at the head, whose rows are found by the route."""
    import inlay
    from tests.laws.zoo import base, excite, small

    host = inlay.attach(base("llama")).add("a", small("lora"), at=at, seed=0)
    host.add("b", small("lora"), at=at, seed=1)
    excite(host)
    way = Packed(host, 0, 100)
    host.use("a", "b", None, "a")
    with way.active(), torch.no_grad():
        loss_N, said_N = way.tokens(
            ROWS, lambda logits, target: F.cross_entropy(logits, target, reduction="none"), False
        )
        assert float(way.loss(ROWS)) == pytest.approx(float(loss_N.sum()), rel=1e-6)
    torch.testing.assert_close(said_N, loss_N, rtol=1e-4, atol=1e-5)
    assert len(loss_N) == sum(map(learned, ROWS))


def test_slices_of_a_small_buffer_change_nothing(monkeypatch):
    host = dressed("llama")
    want = gradients(host, "lora", Sorted(Packed(host, 0, 100)), True)
    for sizes in ("head.at_a_time", "loss.in_one_product"):
        monkeypatch.setattr(f"inlay.engine.{sizes}", lambda vocabulary: 3)
    got = gradients(host, "lora", Sorted(Packed(host, 0, 100)), True)
    torch.testing.assert_close(got[:2], want[:2])
    torch.testing.assert_close(got[2], want[2], rtol=1e-4, atol=1e-6)
    assert head.at_a_time(1) == 3


def test_every_position_has_its_own_gradient():
    torch.manual_seed(0)
    h, W, b, target = torch.randn(7, 5, requires_grad=True), torch.randn(9, 5), torch.randn(9), torch.arange(7)
    weight = torch.rand(7)
    want_N = F.cross_entropy(h @ W.t() + b, target, reduction="none")
    got_N = linear_cross_entropies(h, W, b, target)
    torch.testing.assert_close(got_N, want_N)
    (want,) = torch.autograd.grad((want_N * weight).sum(), h)
    (got,) = torch.autograd.grad((got_N * weight).sum(), h)
    torch.testing.assert_close(got, want)
    assert linear_cross_entropy(h, W, b, target).item() == pytest.approx(want_N.sum().item())
