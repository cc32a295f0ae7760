"""Adapters at experts against a loop over tokens and experts in float64, values and gradients."""

from __future__ import annotations

import copy

import pytest
import torch

import inlay
from inlay import InlayError
from tests.experts.models import CONFIGS, ROUTED, TRANSPOSED, base, batch, expert_modules, looped_logits

FAMILIES = list(CONFIGS)
pytestmark = pytest.mark.filterwarnings("error:.*effective weights of all experts.*")


def adapted(family: str, dtype=torch.float64, experts: str = "eager", **adapters: dict):
    """(host, a bare copy of its model); adapters off their start."""
    model = base(family, dtype, experts)
    bare = copy.deepcopy(model)
    host = inlay.attach(model)
    for i, (name, settings) in enumerate(adapters.items()):
        at = settings.pop("at", "experts")
        host.add(name, inlay.method("lora").make(rank=3, alpha=6.0, **settings), at=at, seed=i, dtype=dtype)
    torch.manual_seed(1)
    for p in host.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return host, bare


def scaled(host, *names):
    return [(host.edits[n].scale, host.tensors(n)) for n in names]


@pytest.mark.parametrize("share", ["separate", "shared", "shared-A"])
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_loop(family, share):
    host, bare = adapted(family, a={"experts": share})
    inputs = batch(2, 4, pad=1)
    target = torch.randn(2, 4, 97, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with host.using("a"):
        got = host.model(**inputs).logits
    (got * target).sum().backward()
    grads = {k: p.grad.clone() for k, p in host.tensors("a").items()}
    for p in host.parameters():
        p.grad = None
    want = looped_logits(family, bare, [scaled(host, "a")] * 2, **inputs)
    (want * target).sum().backward()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 if family in TRANSPOSED else 1e-9)
    for k, p in host.tensors("a").items():
        torch.testing.assert_close(grads[k], p.grad, rtol=1e-5, atol=1e-7, msg=k)
        assert p.grad.abs().sum() > 0, k
        shared = share == "shared" or (share == "shared-A" and k.endswith("/A"))
        assert p.dim() == (2 if shared else 3), k


@pytest.mark.parametrize("strategy", ["auto", "select", "stack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_mixed_batch_are_those_of_the_loop(family, strategy):
    host, bare = adapted(family, a={}, b={"at": "experts.down@1", "experts": "shared"}, c={"at": "experts.gate_up,q"})
    host.remove("c")
    host.strategy = strategy
    plan = ("a", None, "b", ("a", "b"))
    inputs = batch(4, 3, pad=1)
    with host.using(*plan), torch.no_grad():
        got = host.model(**inputs).logits
        want = looped_logits(family, bare, [scaled(host, "a"), [], scaled(host, "b"), scaled(host, "a", "b")], **inputs)
        used = inputs["attention_mask"].bool()
        torch.testing.assert_close(got[used], want[used], rtol=0, atol=1e-6 if family in TRANSPOSED else 1e-9)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ROUTED)
def test_every_implementation_starts_as_the_base_to_the_bit_and_is_the_loop(family, experts):
    model = base(family, torch.float32, experts)
    want = model(**batch()).logits
    host = inlay.attach(model)
    host.add("fresh", inlay.method("lora").make(rank=3), at="experts")
    with host.using("fresh"):
        assert torch.equal(host.model(**batch()).logits, want)
    host.detach()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch.equal(model(**batch()).logits, want)

    host, bare = adapted(family, torch.float32, experts, a={}, b={})
    inputs = batch(3, 3)
    with host.using("a", "b", None), torch.no_grad():
        got = host.model(**inputs).logits
        want = looped_logits(family, bare.double(), [scaled(host, "a"), scaled(host, "b"), []], **inputs)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_bfloat16_edits_in_float32_and_rounds_once(experts):
    model = base("mixtral", torch.bfloat16, experts)
    want = model(**batch()).logits
    host = inlay.attach(model)
    host.add("a", inlay.method("lora").make(rank=3, alpha=6.0), at="experts", seed=0)
    with host.using("a"):
        assert torch.equal(host.model(**batch()).logits, want)
    for p in host.parameters():
        p.data.add_(0.1)
        assert p.dtype == torch.float32
    with host.using("a"):
        logits = host.model(**batch()).logits
        logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16 and (logits - want).abs().max() > 0.1
    assert all(p.grad.abs().sum() > 0 for p in host.parameters())


@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
def test_backward_keeps_no_update_of_all_experts(experts):
    """Beside the model's own tensors, nothing that autograd keeps is as large as an expert parameter."""
    host, _ = adapted("mixtral", torch.float32, experts, a={})
    own = {p.untyped_storage().data_ptr() for p in host.model.parameters()}
    kept: list[int] = []

    def keep(t):
        kept.append(0 if t.untyped_storage().data_ptr() in own else t.numel())
        return t

    with host.using("a"):
        host.model(**batch(1, 2))  # tried both ways
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            host.model(**batch(1, 2))
    assert 0 < max(kept) < min(p.numel() for p in expert_modules(host.model)[0].parameters() if p.numel() > 1000) / 4


def test_what_cannot_hang_on_experts_is_refused_and_nothing_changes():
    host, _ = adapted("mixtral")
    for name in ("series", "ia3", "road2", "full", "vera"):
        with pytest.raises(InlayError, match="cannot hang on expert parameters"):
            host.add("x", inlay.method(name).make(), at="experts")
        assert not host.edits and not host.sites
        assert not any("forward" in m.__dict__ for m in host.model.modules())
    with pytest.raises(InlayError, match="cannot share factors"):
        inlay.method("pissa").make(experts="shared")
    with pytest.raises(InlayError, match="unknown setting of experts"):
        inlay.method("lora").make(experts="all")
