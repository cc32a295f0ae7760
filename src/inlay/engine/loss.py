"""Cross entropy of a frozen head's logits, a slice of positions at a time: the logits never exist all at once."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from inlay.core.product import product

ROOM = 1 << 22
"""Logits held at a time: 16 MiB in float32, which allocators hand out again without asking the system."""
PRODUCT = 1 << 24
"""The same where the head's weight is read for them twice: 64 MiB, so that reading it is little beside multiplying."""
NEAR = 1 << 19
"""Numbers that a processor's cache holds while a few passes go over them."""


def at_a_time(vocabulary: int) -> int:
    """Positions whose logits are held at a time."""
    return max(1, ROOM // vocabulary)


def in_one_product(vocabulary: int) -> int:
    """Positions whose logits are held at a time by `LinearCrossEntropy`."""
    return max(1, PRODUCT // vocabulary)


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(W h_n + b)[target_n] per position (N,) for frozen W, b.

    The gradient W^T (p - onehot) is made beside the loss, while a slice's logits are there, so that backward computes
    no logits again and nothing but a tensor of h's size is kept.
    """

    @staticmethod
    def forward(ctx, h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, target_N: Tensor) -> Tensor:
        step, few = in_one_product(len(W_VD)), max(1, NEAR // len(W_VD))
        few = few if h_ND.device.type == "cpu" else step
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        loss_N = h_ND.new_empty(len(h_ND), dtype=torch.float32)
        for at in range(0, len(h_ND), step):
            part = slice(at, at + step)
            logits = product(h_ND[part], W_VD, b_V)
            for own, target, loss in zip(
                logits.split(few), target_N[part, None].split(few), loss_N[part].split(few), strict=True
            ):
                _entropy(own, target, loss, grad_ND is not None)
            if grad_ND is not None:
                grad_ND[part] = product(logits, W_VD.t())
            del logits  # before the next slice is made
        ctx.save_for_backward(grad_ND)
        return loss_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_N.to(grad_ND.dtype)[:, None], None, None, None


def _entropy(logits_NV: Tensor, target_N1: Tensor, loss_N: Tensor, gradient: bool) -> None:
    """Write the cross entropy of a few positions to `loss_N` and, if asked, its gradient over their logits. In place
    throughout: they are read and written while they are still in the processor's cache."""
    x = logits_NV.float()
    x.sub_(x.amax(-1, keepdim=True))
    right = x.gather(1, target_N1)
    whole = x.exp_().sum(-1, keepdim=True)
    loss_N.copy_((whole.log() - right)[:, 0])
    if gradient:
        x.div_(whole).scatter_add_(1, target_N1, x.new_full(target_N1.shape, -1.0))
        if x is not logits_NV:
            logits_NV.copy_(x)


@functools.cache
def liger() -> Any:
    """Liger's fused linear cross entropy, summed; None where it is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:  # it is there, its compiler is not
        return None
    return LigerFusedLinearCrossEntropyLoss(reduction="sum")


def linear_cross_entropy(h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, target_N: Tensor) -> Tensor:
    """Summed cross entropy in float32; no gradient reaches W and b. On a GPU by Liger's kernels, if installed."""
    if h_ND.device.type == "cuda" and len(h_ND) and (kernels := liger()) is not None:
        return kernels(W_VD, h_ND, target_N, b_V).float()
    return linear_cross_entropies(h_ND, W_VD, b_V, target_N).sum(dtype=torch.float64).float()


def linear_cross_entropies(h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, target_N: Tensor) -> Tensor:
    """Cross entropy of each position (N,), float32; no gradient reaches W and b."""
    return LinearCrossEntropy.apply(h_ND, W_VD, b_V, target_N)  # type: ignore[no-any-return]
