"""Attention over packs where several heads share keys: right, and without a copy of the keys for each head."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import inlay
from benchmarks.bases import llama
from inlay.engine import attention
from inlay.engine.attention import Recomputed, _path, _shares_keys
from inlay.engine.pack import laid_out

H, KV, T, D = 6, 2, 12, 8
TYPES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def formula(q, k, v):
    """softmax(q k^T / sqrt(D)) v, each query of the last len(q) tokens seeing those up to its own; float64."""
    k, v = (t.repeat_interleave(H // KV, 1) for t in (k, v))
    scores = torch.einsum("lhd,thd->hlt", q, k) / D**0.5
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return torch.einsum("hlt,thd->lhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture(scope="module")
def layout():
    return laid_out(inlay.attach(llama("tiny")), [[5] * T])[0]


def given(dtype, length):
    torch.manual_seed(0)
    return [torch.randn(n, h, D, dtype=torch.float64).to(dtype) for n, h in ((length, H), (T, KV), (T, KV))]


@pytest.mark.parametrize("served", [True, False], ids=["shared", "repeated"])
@pytest.mark.parametrize("length", [T, 5, 1], ids=["whole", "behind a beginning", "one token"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_grouped_heads_attend_as_the_formula_says(layout, monkeypatch, dtype, length, served):
    """Output and gradients, by the fused kernel on grouped keys where PyTorch has one, and on repeated keys."""
    if not served:
        monkeypatch.setattr(attention, "_shares_keys", lambda *a: False)
    tensors = given(dtype, length)
    wide = [t.double().requires_grad_() for t in tensors]
    own = [t.clone().requires_grad_() for t in tensors]
    got, want = _path(layout, *own, None, 0.0, None, None), formula(*wide)
    weight = torch.randn_like(want)
    (got.double() * weight).sum().backward()
    (want * weight).sum().backward()
    for a, b in zip((got, *(t.grad for t in own)), (want, *(t.grad for t in wide)), strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).norm() <= TYPES[dtype] * b.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_keys_are_kept_once_and_not_for_every_head(layout, dtype):
    if dtype == torch.float32 and not _shares_keys("cpu", dtype, False):
        pytest.skip("this PyTorch's fused CPU kernel does not take grouped keys")
    q, k, v = (t.requires_grad_() for t in given(dtype, T))
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        _path(layout, q, k, v, None, 0.0, None, None)
    floats = sum(t.untyped_storage().nbytes() // t.element_size() for t in kept.values() if t.dtype == dtype)
    assert floats <= (2 * H + 2 * KV) * T * D + T * T  # q, what is said, k, v; a bias


def test_recomputed_probabilities_have_exact_gradients():
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, n, 3, dtype=torch.float64, requires_grad=True) for h, n in ((4, 3), (2, 5), (2, 5)))
    bias = torch.zeros(3, 5, dtype=torch.float64).masked_fill_(~torch.ones(3, 5, dtype=torch.bool).tril(2), -torch.inf)
    assert torch.autograd.gradcheck(lambda *t: Recomputed.apply(*t, bias, 0.7), (q, k, v))


def test_a_pytorch_without_the_choice_repeats_keys(monkeypatch):
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a: 0)  # knows no enable_gqa
    _shares_keys.cache_clear()
    try:
        assert not _shares_keys("cpu", torch.float32, False)
    finally:
        _shares_keys.cache_clear()
    assert not _shares_keys("cuda", torch.float32, False)
