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


def at_a_time(vocabulary: int) -> int:
    """Positions whose logits are held at a time."""
    return max(1, ROOM // vocabulary)


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(W h_n + b)[target_n] per position (N,) for frozen W, b.

    The gradient W^T (p - onehot) is made beside the loss, while a slice's logits are there, so that backward computes
    no logits again and nothing but a tensor of h's size is kept.
    """

    @staticmethod
    def forward(ctx, h_ND: Tensor, W_VD: Tensor, b_V: Tensor | None, target_N: Tensor) -> Tensor:
        step = at_a_time(len(W_VD))
        grad_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        loss_N = h_ND.new_empty(len(h_ND), dtype=torch.float32)
        for at in range(0, len(h_ND), step):
            part = slice(at, at + step)
            logits = product(h_ND[part], W_VD, b_V).float()
            target = target_N[part, None]
            # In place throughout: a slice is read and written while it is still in the processor's cache.
            logits.sub_(logits.amax(-1, keepdim=True))
            right = logits.gather(1, target)
            whole = logits.exp_().sum(-1, keepdim=True)
            loss_N[part] = (whole.log() - right)[:, 0]
            if grad_ND is not None:
                p = logits.div_(whole)
                p.scatter_add_(1, target, p.new_full(target.shape, -1.0))
                grad_ND[part] = product(p.to(W_VD.dtype), W_VD.t())
                del p
            del logits  # before the next slice is made
        ctx.save_for_backward(grad_ND)
        return loss_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):  # type: ignore[override]
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad_N.to(grad_ND.dtype)[:, None], None, None, None


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
