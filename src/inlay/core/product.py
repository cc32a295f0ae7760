"""Matrix products of the adapters, in whichever of PyTorch's CPU libraries is the faster one.

PyTorch multiplies float32 matrices on CPUs with Intel's MKL, which keeps to AVX2 on processors of other makers.
oneDNN, which every build has too, uses what the processor offers: on an AMD EPYC with AVX-512, 2.2 times the rate,
from the same tensors in place. The choice rests on the maker's name, not on a measurement, so that two runs on one
machine compute the same bits.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


@functools.cache
def has_other() -> bool:
    """Whether there is oneDNN beside MKL, and PyTorch lets it be called."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def slow_default() -> bool:
    """Whether float32 products are better left to oneDNN on this machine."""
    if not has_other():
        return False
    info = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (info.read_text() if info.is_file() else platform.processor())


def _served(*tensors: Tensor | None) -> bool:
    return all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in tensors)


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b, without gradients: x (..., D_in), W (D_out, D_in), b (D_out,)."""
    if slow_default() and _served(x, W, b):
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return linear(x, W, b)


def add_product(onto: Tensor, x: Tensor, W: Tensor, s: float = 1.0) -> Tensor:
    """`onto` += s x W^T in place, without gradients: onto (N, D_out), x (N, D_in), W (D_out, D_in)."""
    if slow_default() and _served(onto, x, W):
        return onto.add_(product(x, W), alpha=s)
    return onto.addmm_(x, W.t(), alpha=s)


def _uncast(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def plain(ctx: Any, x: Tensor, *rest: Any) -> Any:
        if not torch.is_autocast_enabled(x.device.type):
            return fn(ctx, x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return fn(ctx, x, *rest)

    return plain


class _LowRank(torch.autograd.Function):
    """y + s B A x over rows: x (N, D_in), y (N, D_out). Autocast is off inside: types stay as given."""

    @staticmethod
    @_uncast
    def forward(ctx, x: Tensor, A: Tensor, B: Tensor, s: float, y: Tensor | None) -> Tensor:
        h = product(x, A)
        ctx.save_for_backward(x, A, B, h)
        ctx.s = s
        out = product(h, s * B)
        return out if y is None else out.add_(y)

    @staticmethod
    @_uncast
    def backward(ctx, g: Tensor):  # type: ignore[override]
        x, A, B, h = ctx.saved_tensors
        dh = product(g, (ctx.s * B).t())
        dx = product(dh, A.t()) if ctx.needs_input_grad[0] else None
        dA = product(dh.t(), x.t()) if ctx.needs_input_grad[1] else None
        # As (R, D_out), transposed: the product with few rows is the fast one.
        dB = product(h.t(), g.t()).t().mul_(ctx.s) if ctx.needs_input_grad[2] else None
        return dx, dA, dB, None, g if ctx.needs_input_grad[4] else None


def rows_product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b with one W (D_out, D_in) for all rows, or one a row (B, D_out, D_in), b (D_out,) or (B, 1, D_out)."""
    if W.dim() == 2:
        return linear(x, W, b)
    return torch.bmm(x, W.mT) if b is None else torch.baddbmm(b, x, W.mT)


def add_rows_product(onto: Tensor, x: Tensor, W: Tensor, s: float = 1.0) -> Tensor:
    """`onto` += s x W^T in place, without gradients: onto (N, T, D_out), x (N, T, D_in), W as for `rows_product`."""
    if W.dim() == 3:
        return onto.baddbmm_(x, W.mT, alpha=s)
    if not onto.is_contiguous():
        return onto.add_(product(x, W), alpha=s)
    add_product(onto.view(-1, onto.shape[-1]), x.reshape(-1, x.shape[-1]), W, s)
    return onto


def looked_on() -> bool:
    """Whether a compiler or a transform of functions (vmap) looks on: they see through plain operations only."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


class _Varied(threading.local):
    on = False


_varied = _Varied()


@contextlib.contextmanager
def varied_rows() -> Iterator[None]:
    """In this block `low_rank` uses PyTorch's default library, in the backward pass too.

    oneDNN prepares code for each number of rows and keeps it: with experts, whose rows differ at every call, that took
    190 MiB on a model of 4 layers of 8.
    """
    before, _varied.on = _varied.on, True
    try:
        yield
    finally:
        _varied.on = before


def low_rank(x: Tensor, A: Tensor, B: Tensor, s: float, onto: Tensor | None = None, over: bool = False) -> Tensor:
    """s B A x, added to `onto` if given; A (R, D_in), B (D_out, R). Backward keeps x, A x and the factors only.

    A and B may also be stacks, one pair a row: x (N, T, D_in), A (N, R, D_in), B (N, D_out, R).

    Args:
        over: write the result over `onto`; without gradients (see `Call.spare`).
    """
    if over and onto is not None:
        return add_rows_product(onto, product(x, A) if A.dim() == 2 else torch.bmm(x, A.mT), B, s)
    if A.dim() == 3:
        h = torch.bmm(x, A.mT)
        return s * torch.bmm(h, B.mT) if onto is None else torch.baddbmm(onto, h, B.mT, alpha=s)
    if _varied.on or looked_on():
        out = s * linear(linear(x, A), B)
        return out if onto is None else onto + out
    flat = None if onto is None else onto.flatten(0, -2)
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        h = product(x.flatten(0, -2), A)
        if flat is None:
            return product(h, s * B).unflatten(0, x.shape[:-1])
        if slow_default() and _served(flat, h, B):
            return torch.add(flat, product(h, B), alpha=s).view(onto.shape)  # type: ignore[union-attr]
        return torch.addmm(flat, h, B.t(), alpha=s).view(onto.shape)  # type: ignore[union-attr]
    return _LowRank.apply(x.flatten(0, -2), A, B, s, flat).unflatten(0, x.shape[:-1])  # type: ignore[no-any-return]
