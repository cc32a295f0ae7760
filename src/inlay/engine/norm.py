"""RMS norms of a frozen decoder as one node: fewer passes over the hidden states, and only x is kept.

Only norms are served whose `forward` is `RMS_NORM_BODY`; a trained weight, a hook's wrapper or another formula
(Gemma's 1 + w) goes the module's own way.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from inlay.compat.source import has_body
from inlay.compat.torch import observed
from inlay.compat.transformers import RMS_NORM_BODY
from inlay.engine.linear import forwards


class RMSNorm(torch.autograd.Function):
    """w * x / rms(x) over the last dimension, rms in float32; w (D,) is a constant."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, eps: float) -> Tensor:
        wide = x.float()
        mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        rate = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, w, rate)
        said = wide * rate if wide is x else wide.mul_(rate).to(x.dtype)
        return said.mul_(w)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        x, w, rate = ctx.saved_tensors
        own = g * w if g.dtype == torch.float32 else g.float().mul_(w.float())
        unit = x.float() * rate
        dot = (own * unit).sum(-1, keepdim=True).div_(-x.shape[-1])
        return own.addcmul_(unit, dot).mul_(rate).to(x.dtype), None, None


def _forward(norm: Any, x: Tensor) -> Tensor:
    if observed() or norm.weight.requires_grad:
        return type(norm).forward(norm, x)  # type: ignore[no-any-return]
    same = x.dtype == norm.weight.dtype and x.device == norm.weight.device
    return RMSNorm.apply(x, norm.weight, norm.variance_epsilon) if same else type(norm).forward(norm, x)  # type: ignore[no-any-return]


def rms_norms(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, the model's RMS norms are one node each."""
    found = [m for m in model.modules() if "forward" not in vars(m) and has_body(type(m).forward, RMS_NORM_BODY)]
    return forwards({m: functools.partial(_forward, m) for m in found})
