"""Liger's kernels: used on GPUs where they are installed, never elsewhere, and equal to our own."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import pytest
import torch

from inlay.engine import loss

HERE = torch.cuda.is_available() and loss.liger() is not None


@pytest.fixture
def fresh():
    loss.liger.cache_clear()
    yield
    loss.liger.cache_clear()


def stand_in(monkeypatch, ready: bool = True) -> list:
    """A package of Liger's name; whether its loss can be imported."""
    made: list = []

    class Fused:
        def __init__(self, **settings):
            made.append(settings)

    top, inner = types.ModuleType("liger_kernel"), types.ModuleType("liger_kernel.transformers")
    top.__spec__ = importlib.machinery.ModuleSpec("liger_kernel", None)
    if ready:
        inner.LigerFusedLinearCrossEntropyLoss = Fused
    monkeypatch.setitem(sys.modules, "liger_kernel", top)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", inner)
    return made


def test_found_where_it_is_installed(fresh, monkeypatch):
    made = stand_in(monkeypatch)
    assert loss.liger() is not None and made == [{"reduction": "sum"}]


def test_a_package_that_cannot_run_is_passed_over(fresh, monkeypatch):
    stand_in(monkeypatch, ready=False)
    assert loss.liger() is None


def test_never_asked_on_a_cpu(fresh, monkeypatch):
    made = stand_in(monkeypatch)
    h, W, target = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
    want = torch.nn.functional.cross_entropy(h @ W.T, target, reduction="sum")
    assert loss.linear_cross_entropy(h, W, None, target).item() == pytest.approx(want.item(), rel=1e-5)
    assert not made


@pytest.mark.skipif(not HERE, reason="needs a GPU with liger_kernel")
@pytest.mark.parametrize("bias", [False, True])
def test_kernels_compute_our_loss(bias):
    torch.manual_seed(0)
    h, W = torch.randn(33, 64, device="cuda"), torch.randn(997, 64, device="cuda")
    b = torch.randn(997, device="cuda") if bias else None
    target = torch.randint(997, (33,), device="cuda")
    one, two = h.clone().requires_grad_(), h.clone().requires_grad_()
    want = loss.linear_cross_entropies(one, W, b, target).sum()
    got = loss.linear_cross_entropy(two, W, b, target)
    (3 * want).backward()
    (3 * got).backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-4)
