"""Matrix products of adapters and frozen layers, in the CPU library that `inlay.core.processor` chooses.

Both libraries give what `torch.nn.functional.linear` gives, to rounding, for every shape (0 and 1 included), memory
layout and type; tensors that oneDNN does not take go to PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from inlay.compat.torch import observed, onednn_linear
from inlay.core import processor

THIN = 32
"""Inner width up to which MKL, which adds in place, is the faster library for y += x W^T on AMD, too: such a product is
bound by reading and writing y, which oneDNN does twice."""
ROWS = 384
"""Rows at a time for which oneDNN's product is held before it is added: they stay in a core's cache."""
ALIGNMENT = 64
"""Bytes at whose multiples PyTorch's allocations start."""


def _onednn_serves(x: Tensor, W: Tensor, b: Tensor | None = None) -> bool:
    """Whether a product goes through oneDNN: chosen on this machine, and of a kind that oneDNN takes.

    It raises "could not create a primitive descriptor" for an inner width of 0. Autocast, where it is on, is left to
    PyTorch's operator, which knows it.
    """
    if not processor.prefers_onednn() or not all(
        t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.layout == torch.strided)
        for t in (x, W, b)
    ):
        return False
    return x.numel() > 0 and W.numel() > 0 and not torch.is_autocast_enabled("cpu")


def _dense(W: Tensor) -> Tensor:
    """A matrix that oneDNN reads as it is: with rows or columns one after another. It refuses overlapping ones."""
    (rows, columns), (down, right) = W.shape, W.stride()
    by_rows, by_columns = right == 1 and down >= columns, down == 1 and right >= rows
    return W if by_rows or by_columns else W.contiguous()


def onednn_product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b by oneDNN, without gradients.

    Args:
        x: (..., D_in), not empty.
        W: (D_out, D_in), dense, or as `inlay.compat.torch.onednn_reorder` made it.
        b: (D_out,).
    """
    # The operator ignores the stride of b.
    return onednn_linear(x, W, None if b is None else b.contiguous())


def product(x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """x W^T + b, without gradients: x (..., D_in), W (D_out, D_in), b (D_out,)."""
    return onednn_product(x, _dense(W), b) if _onednn_serves(x, W, b) else linear(x, W, b)


def add_product(onto: Tensor, x: Tensor, W: Tensor, s: float = 1.0) -> Tensor:
    """`onto` += s x W^T in place, without gradients: onto (N, D_out), x (N, D_in), W (D_out, D_in)."""
    if x.shape[-1] <= THIN or onto.dtype != x.dtype or not _onednn_serves(x, W):
        return onto.addmm_(x, W.t(), alpha=s)
    W = _dense(W)
    for part, given in zip(onto.split(ROWS), x.split(ROWS), strict=True):
        part.add_(onednn_product(given, W), alpha=s)
    return onto


def aligned(t: Tensor) -> Tensor:
    """The tensor, or a copy that starts where PyTorch's own allocations do.

    MKL sums in another order where an operand starts elsewhere, as views of a file do, so equal tensors give equal
    products only at equal alignments (Intel, "Introduction to Conditional Numerical Reproducibility").
    """
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


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


def rows(t: Tensor) -> Tensor:
    """(..., D) as a matrix (N, D), with N = 1 for a vector (D,)."""
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


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
    add_product(rows(onto), rows(x), W, s)
    return onto


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
    if _varied.on or observed():
        out = s * linear(linear(x, A), B)
        return out if onto is None else onto + out
    flat = None if onto is None else rows(onto)
    if not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
        h = product(rows(x), A)
        fresh = None if flat is None else flat.clone(memory_format=torch.contiguous_format)
        out = product(h, s * B) if fresh is None else add_product(fresh, h, B, s)
    else:
        out = _LowRank.apply(rows(x), A, B, s, flat)
    return out.view(*x.shape[:-1], len(B))
