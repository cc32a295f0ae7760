"""Products of adapters: either library, and under autocast, the same numbers."""

import pytest
import torch

from inlay.core import product as products


@pytest.fixture(params=[False, True], ids=["default", "oneDNN"])
def library(request, monkeypatch):
    if request.param and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "slow_default", lambda: request.param)


def parts(seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(2, 5, 12), torch.randn(2, 5, 16)
    A, B = torch.randn(4, 12), torch.randn(16, 4)
    return [t.requires_grad_() for t in (x, A, B, y)]


def test_low_rank_equals_plain_operations(library):
    x, A, B, y = parts()
    g = torch.randn_like(y)
    got = products.low_rank(x, A, B, 0.5, onto=y)
    want = y + 0.5 * x @ A.T @ B.T
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        torch.autograd.grad(got, (x, A, B, y), g), torch.autograd.grad(want, (x, A, B, y), g), rtol=1e-5, atol=1e-5
    )


def test_autocast_leaves_an_adapter_in_float32(library):
    x, A, B, y = parts()
    want = products.low_rank(x, A, B, 0.5, onto=y)
    with torch.autocast("cpu", torch.bfloat16):
        got = products.low_rank(x, A, B, 0.5, onto=y)
        grads = torch.autograd.grad(got.sum(), (x, A, B, y))
    assert torch.equal(got, want)
    for a, b in zip(grads, torch.autograd.grad(want.sum(), (x, A, B, y)), strict=True):
        assert torch.equal(a, b)
