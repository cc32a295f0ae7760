"""Norms, rotary positions and mapped weights: the same numbers from fewer passes, where the known code is met."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers.models.gemma import modeling_gemma
from transformers.models.llama import modeling_llama

import inlay
from inlay.compat.source import has_body
from inlay.compat.transformers import RMS_NORM_BODY, ROTARY, ROTARY_BODIES
from inlay.engine import fused, norm, rotary
from inlay.engine.steady import Steady, mapped
from inlay.train.ways import Packed, Plain
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.engine.test_fused import count_nodes
from tests.engine.test_packed import rows
from tests.laws.zoo import base, dressed, excite, small

LONG = rows(30, 40, 34, 26, 20)


def nothing(*_: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def without(*names: str):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(patch(f"inlay.engine.engaged.{name}", nothing))
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norm_has_the_modules_gradient(dtype):
    torch.manual_seed(0)
    module = modeling_llama.LlamaRMSNorm(24, eps=1e-3).to(dtype)
    module.weight.data.uniform_(0.5, 2).requires_grad_(False)
    module.weight.requires_grad_(False)
    x, g = torch.randn(2, 3, 24).to(dtype), torch.randn(2, 3, 24).to(dtype)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    with norm.rms_norms(nn.Sequential(module)):
        got = module(a)
        assert "RMSNorm" in got.grad_fn.name()
    want = module(b)
    got.backward(g)
    want.backward(g)
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 2e-2}
    torch.testing.assert_close(got, want, **near)
    torch.testing.assert_close(a.grad, b.grad, **near)


def test_only_the_known_formula_is_served():
    assert has_body(modeling_llama.LlamaRMSNorm.forward, RMS_NORM_BODY)
    assert not has_body(modeling_gemma.GemmaRMSNorm.forward, RMS_NORM_BODY), "1 + w"
    assert all(has_body(getattr(modeling_llama, name), body) for name, body in ROTARY_BODIES.items())


def test_a_norm_that_learns_is_left_alone():
    module = modeling_llama.LlamaRMSNorm(8)
    with norm.rms_norms(nn.Sequential(module)):
        module(torch.randn(2, 8, requires_grad=True)).sum().backward()
    assert module.weight.grad is not None


def test_rotary_is_the_decoders():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 1, 5, 8, dtype=torch.float64)
    cos, sin = torch.randn(2, 1, 5, 8, dtype=torch.float64), torch.randn(2, 1, 5, 8, dtype=torch.float64)
    for x in (q, k):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = rotary.Rotary.apply(a, cos, sin), b * cos + modeling_llama.rotate_half(b) * sin
        g = torch.randn_like(want)
        got.backward(g)
        want.backward(g)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "gemma", "gptj"])
def test_nodes_change_nothing(family):
    host = dressed(family)
    with without("rms_norms", "rotary"):
        want, plain = gradients(host, "lora", Packed(host, 0, 14), LONG)
    before = vars(modeling_llama)[ROTARY]
    got, found = gradients(host, "lora", Packed(host, 0, 14), LONG)
    assert got == pytest.approx(want, rel=1e-6) and vars(modeling_llama)[ROTARY] is before
    assert_as_exact(found, plain, exact_gradients(family, "lora", LONG)[1])


def test_a_llama_meets_them():
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    way = Packed(host, 0, 1000)
    with host.using("a"), way.active():
        loss = way.loss(LONG)
    assert count_nodes(loss, "RMSNormBackward") >= 2 * host.anatomy.layers - 1
    assert count_nodes(loss, "RotaryBackward") == 2 * host.anatomy.layers


@pytest.mark.parametrize("name", ["road1", "dora"])
@pytest.mark.parametrize("family", ["llama", "gptj", "opt", "gpt2", "phi3", "bloom", "mixtral"])
def test_mapped_weights_change_nothing(family, name):
    """Turned and stretched weights against the padded forward; each is made once for all packs of a step."""
    host, made = dressed(family), []
    want, plain = gradients(host, name, Plain(host, 0, 2), LONG)

    def counted(*args):
        made.append(1)
        return mapped(*args)

    with patch.object(fused, "mapped", counted):
        got, found = gradients(host, name, Packed(host, 0, 75), LONG)
    assert got == pytest.approx(want, rel=1e-5)
    assert 0 < len(made) <= len(host.by_place(name)), (len(made), len(host.by_place(name)))
    assert_as_exact(found, plain, exact_gradients(family, name, LONG)[1])


@pytest.mark.parametrize("name", ["road1", "dora"])
def test_a_step_meets_the_tensors_of_its_time(name):
    """Nothing of the last step is left: neither after an optimizer's step nor after a silent write past autograd."""
    host = inlay.attach(base("llama")).add("a", small(name), at="linear", seed=0)
    excite(host)
    way = Packed(host, 0, 1000)
    for write in (lambda t: t.add_(0.1), lambda t: t.data.add_(0.1)):
        got = []
        with host.using("a"), way.active():
            for _ in range(2):
                (part,) = way.split(LONG)
                got.append(way.loss(part).item())
                with torch.no_grad():
                    for p in host.parameters():
                        write(p)
            (part,) = way.split(LONG)
            got.append(way.loss(part).item())
        assert way.steady._made == {}
        want = Plain(host, 0, 8)
        with torch.no_grad(), host.using("a"):
            assert got[-1] == pytest.approx(want.loss(LONG).item(), rel=1e-5)
        assert len(set(got)) == 3


def test_lengths_below_zero_have_their_gradient():
    """PyTorch's torch.polar has it with the wrong sign; against differences, both ways."""
    host = inlay.attach(base("llama")).add("a", small("road1"), at="q@0", seed=0)
    theta, a = (host.tensors("a")[k] for k in sorted(host.tensors("a"), key=lambda k: k.endswith("/a")))
    with torch.no_grad():
        theta.fill_(0.3)
        a.fill_(1.0)[0] = -0.8
    slopes = []
    for way in (Plain(host, 0, 8), Packed(host, 0, 1000)):
        _, found = gradients(host, "a", way, LONG)
        slopes.append(next(float(g[0]) for k, g in found.items() if k.endswith("/a")))
    losses = []
    for step in (-0.01, 0.02):
        with torch.no_grad(), host.using("a"):
            a[0] += step
            losses.append(Plain(host, 0, 8).loss(LONG).item())
    assert slopes == pytest.approx([(losses[1] - losses[0]) / 0.02] * 2, rel=0.05, abs=2e-3)


def test_what_cannot_be_undone_is_not_mapped():
    from inlay.core.edit import LowRank

    W = torch.randn(4, 3)
    assert mapped(W, None, LowRank(gain=torch.tensor([1.0, 0.0, 1.0, 1.0])), torch.tensor([1.0, 0.0, 1.0, 1.0])) is None
    assert mapped(W, None, LowRank(turn=(torch.zeros(2), torch.tensor([1.0, 0.0]))), None) is None


def test_steady_asks_again_when_tensors_moved():
    steady, asked = Steady(), []
    for state in (1, 1, 2, 2, 1):
        steady.get("k", state, lambda: asked.append(1))
    assert len(asked) == 3


@pytest.mark.parametrize("plan", ["road-lora", "road1", "dora", "road1+lora", "dora+lora"])
def test_16_bits_validate_what_they_train(plan):
    """Validation has no gradients; what is turned or stretched in float32 still meets 16-bit factors there."""
    host = inlay.attach(base("llama").to(torch.bfloat16))
    for i, part in enumerate(plan.split("+")):
        host.add(part, small(part), at="linear", seed=i)
    excite(host)
    way, found = Packed(host, 0, 1000), []
    with host.using(plan), way.active():
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                (part,) = way.split(LONG)
                found.append(way.loss(part).item())
    assert found[0] == pytest.approx(found[1], rel=5e-3)
