"""Frozen float32 linears on CPUs: forward and backward in the faster library (see `inlay.core.product`)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.fingerprint import readable
from inlay.core.processor import prefers_onednn
from inlay.core.product import product, rows


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b for x (N, D_in) and constant W and b: dx = dy W, and nothing but W is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(W)
        return product(x, W, b)

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        (W,) = ctx.saved_tensors
        return product(dy.contiguous(), W.t()), None, None


@contextlib.contextmanager
def forwards(of: Mapping[Any, Callable[..., Any]], fresh: bool = False) -> Iterator[None]:
    """Within the block, these modules compute by these functions; their hooks stay.

    Args:
        fresh: whether each call makes a tensor that nobody else holds, so that adapters may write over it.
    """
    before = {module: vars(module).get("forward") for module in of}
    for module, function in of.items():
        if fresh:
            function.fresh = True  # type: ignore[attr-defined]
        module.forward = function
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)  # a trainer may have taken it away already
            else:
                module.forward = own


def fast_linears(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Within the block, the model's frozen float32 linears compute by `FrozenLinear`, where that is worth it."""
    chosen = [m for m in model.modules() if prefers_onednn() and frozen(m) and m.weight.dtype == torch.float32]
    return forwards({m: functools.partial(plain, m) for m in chosen}, fresh=True)


def frozen(m: Any) -> bool:
    """Whether a module is a plain linear that is not trained, and whose forward is its own."""
    if type(m) is not nn.Linear and type(m).__name__ != "Conv1D" or "forward" in vars(m):
        return False
    return readable(m.weight) and not any(p.requires_grad for p in m.parameters(recurse=False))


def weight_of(m: Any) -> Tensor:
    """A linear's weight (D_out, D_in); transformers' Conv1D keeps it transposed."""
    return m.weight if isinstance(m, nn.Linear) else m.weight.t()


def plain(m: Any, x: Tensor) -> Tensor:
    """A frozen linear's output for x, in the faster library; under autocast, in autocast's type."""
    float32 = x.dtype == m.weight.dtype == torch.float32
    if not float32 or not prefers_onednn() or torch.is_autocast_enabled(x.device.type):
        return type(m).forward(m, x)
    # Flattened here: what a node makes of views inside itself may not be written in place, and Falcon does.
    W = weight_of(m)
    return FrozenLinear.apply(rows(x), W, m.bias).view(*x.shape[:-1], len(W))  # type: ignore[no-any-return]
