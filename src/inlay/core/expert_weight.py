"""A weight of experts that is adapted where it is multiplied: W + dW without dW.

The experts module runs as it is, by whichever implementation it was given (`eager`, `grouped_mm`, `batched_mm`), with
an `ExpertWeight` in the place of its parameter. Every product with it is the same product with the frozen numbers, to
the last bit, and then the adapters' formula on the rows of each expert: O(E r) memory, and nothing of dW is kept for
the backward pass. Any other operation gets the effective weights in full, which is exact and slow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._pytree import tree_map

from inlay.core.edit import Call, Edit
from inlay.core.errors import InlayError
from inlay.core.experts import ExpertLayout, ExpertWeights
from inlay.core.product import varied_rows


@dataclass(frozen=True, eq=False)
class ExpertEdit:
    """One adapter at an expert parameter, in one forward."""

    edit: Edit
    weights: ExpertWeights
    call: Call

    def after(self, expert: int, x: Tensor, y: Tensor) -> Tensor:
        """The edited output of one expert: x (n, D_in), y (n, D_out)."""
        call = Call(self.call.place.expert(expert), self.call.training)
        return self.edit.after(self.weights[expert], x[None], y[None], call)[0]


@dataclass(eq=False)
class ExpertUpdate:
    """What one group of rows adds to one expert parameter."""

    name: str
    """The parameter's whole path, for errors."""
    layout: ExpertLayout
    edits: Sequence[ExpertEdit]
    """In the order in which they are applied."""
    dtype: torch.dtype
    """The type in which edits are computed; their result is rounded once to that of the product."""
    rows: int = 0
    """Rows that products have edited so far."""
    whole: bool = False
    """Whether an operation asked for the effective weights in full."""

    def edit_rows(self, expert: int, x: Tensor, y: Tensor) -> Tensor:
        """y (n, D_out) = x (n, D_in) times one frozen matrix, edited."""
        self.rows += len(x)
        if not len(x):
            return y
        x, out = x.to(self.dtype), y.to(self.dtype)
        with varied_rows(), torch.autocast(y.device.type, enabled=False):
            for one in self.edits:
                out = one.after(expert, x, out)
        return out.to(y.dtype)

    def edit_sorted(self, counts: Sequence[int], x: Tensor, y: Tensor) -> Tensor:
        """The same for rows (S, ...) that stand expert by expert, `counts` of each; rows behind them are left alone."""
        sizes = [*counts, len(x) - sum(counts)]
        xs, ys = x.split(sizes), y.split(sizes)
        parts = [self.edit_rows(e, xs[e], ys[e]) for e in range(len(counts)) if counts[e]]
        return torch.cat([*parts, ys[-1]])

    def edit_selected(self, expert_S: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The same for rows (S, ...) in any order, each of the expert that `expert_S` names."""
        order = expert_S.argsort(stable=True)
        counts = torch.bincount(expert_S, minlength=self.layout.experts).tolist()
        edited = self.edit_sorted(counts, x[order], y[order])
        return edited[order.argsort()]

    def effective(self, stored: Tensor) -> Tensor:
        """W + dW of all experts, stored as W is: each expert's matrix is what its edits make of the identity."""
        if any(one.call.training and one.edit.draws for one in self.edits):
            raise InlayError(
                f"dropout cannot act at {self.name}, which this model does not multiply expert by expert; set dropout=0"
            )
        self.whole = True
        eye = torch.eye(self.layout.d_in, dtype=self.dtype, device=stored.device)
        made = []
        for e, W in enumerate(self.layout.matrices(stored)):  # (D_out, D_in)
            out = W.mT.to(self.dtype)
            for one in self.edits:
                out = one.after(e, eye, out)
            made.append(out.mT)
        return self.layout.matrices(torch.stack(made)).to(stored.dtype)


class ExpertWeight(Tensor):
    """W + dW of all experts, of one of them, or of a selection with one matrix a row."""

    stored: Tensor
    """The frozen numbers of what this stands for."""
    whole: Tensor
    """Those of all experts, as the module stores them."""
    update: ExpertUpdate
    picked: int | Tensor | None
    """Which expert, or which of them (S,); None: all (E, ...)."""
    reads_left: bool
    """Whether it is used as (..., D_in, D_out), for x @ W; else as (..., D_out, D_in)."""

    @staticmethod
    def of(whole: Tensor, update: ExpertUpdate) -> ExpertWeight:
        """For a parameter of an experts module."""
        return _made(whole, whole, update, None, update.layout.transposed)

    def full(self) -> Tensor:
        """The effective weights themselves."""
        W = self.update.effective(self.whole)
        W = W if self.picked is None else W[self.picked]
        return W if self.reads_left == self.update.layout.transposed else W.mT

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _READ_ONLY:
                return func(*args, **kwargs)
            rule = _RULES.get(getattr(func, "__name__", "")) or _GETTERS.get(func)
            made = rule(func, args, kwargs) if rule else NotImplemented
            if made is not NotImplemented:
                return made
            plain = [
                tree_map(lambda v: v.full() if isinstance(v, ExpertWeight) else v, part) for part in (args, kwargs)
            ]
            return func(*plain[0], **plain[1])


def _made(
    stored: Tensor, whole: Tensor, update: ExpertUpdate, picked: int | Tensor | None, reads_left: bool
) -> ExpertWeight:
    made = stored.detach().as_subclass(ExpertWeight)
    made.stored, made.whole, made.update, made.picked, made.reads_left = stored, whole, update, picked, reads_left
    return made


_READ_ONLY = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "is_meta", "is_cpu")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.stride, Tensor.data_ptr}
"""What looks at a tensor and not at its numbers."""


def _index(func: Callable, args: tuple, kwargs: dict) -> Any:
    """W[e] of one expert, W[ids] with an expert a row."""
    W, which = args
    if not isinstance(W, ExpertWeight) or W.picked is not None:
        return NotImplemented
    if isinstance(which, Tensor) and not which.is_floating_point() and which.dtype != torch.bool:
        if which.dim() == 0:
            which = int(which)
        elif which.dim() == 1:
            return _made(W.stored[which], W.whole, W.update, which, W.reads_left)
    if isinstance(which, int) and not isinstance(which, bool):
        return _made(W.stored[which], W.whole, W.update, which % len(W.whole), W.reads_left)
    return NotImplemented


def _transpose(func: Callable, args: tuple, kwargs: dict) -> Any:
    """The last two axes exchanged."""
    W, *axes = args
    n = W.stored.dim() if isinstance(W, ExpertWeight) else 0
    if not n or kwargs or (axes and {a % n for a in axes} != {n - 1, n - 2}):
        return NotImplemented
    return _made(W.stored.mT, W.whole, W.update, W.picked, not W.reads_left)


def _linear(func: Callable, args: tuple, kwargs: dict) -> Any:
    """x (n, D_in) times one expert's W (D_out, D_in)."""
    x, W = _two(args, kwargs)
    if not isinstance(W, ExpertWeight) or isinstance(x, ExpertWeight) or not isinstance(W.picked, int) or x.dim() != 2:
        return NotImplemented
    _check(W, reads_left=False)
    return W.update.edit_rows(W.picked, x, linear(x, W.stored))


def _matmul(func: Callable, args: tuple, kwargs: dict) -> Any:
    """x @ W: of one expert, of all with x (E, n, D_in), or of a row each (S, 1, D_in); or W @ x of a row each."""
    a, b = _two(args, kwargs)
    if isinstance(a, ExpertWeight) and isinstance(b, Tensor) and isinstance(a.picked, Tensor):
        if b.dim() != 3 or b.shape[-1] != 1 or isinstance(b, ExpertWeight):
            return NotImplemented
        _check(a, reads_left=False)
        y = torch.bmm(a.stored, b)  # (S, D_out, 1)
        return a.update.edit_selected(a.picked, b[..., 0], y[..., 0])[..., None]
    if not isinstance(b, ExpertWeight) or isinstance(a, ExpertWeight) or a.dim() != b.stored.dim():
        return NotImplemented
    if isinstance(b.picked, int):
        _check(b, reads_left=True)
        return b.update.edit_rows(b.picked, a, a @ b.stored)
    if isinstance(b.picked, Tensor) and a.shape[1] != 1:
        return NotImplemented
    _check(b, reads_left=True)
    y = torch.bmm(a, b.stored)
    if isinstance(b.picked, Tensor):
        return b.update.edit_selected(b.picked, a[:, 0], y[:, 0])[:, None]
    return torch.stack([b.update.edit_rows(e, a[e], y[e]) for e in range(len(a))])


def _grouped(func: Callable, args: tuple, kwargs: dict) -> Any:
    """x (S, D_in) @ W (E, D_in, D_out) for rows that stand expert by expert; `offs` (E,) is where each expert's end."""
    x, W, *more = args
    offs = kwargs.get("offs", more[0] if more else None)
    others = len(more) > 1 or {k for k, v in kwargs.items() if v is not None} - {"offs"}
    if not isinstance(W, ExpertWeight) or isinstance(x, ExpertWeight) or W.picked is not None or offs is None or others:
        return NotImplemented
    _check(W, reads_left=True)
    y = func(x, W.stored, offs=offs)
    counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return W.update.edit_sorted(counts, x, y)


def _two(args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """The factors of a product; (None, None) where more is asked for."""
    return args if len(args) == 2 and not kwargs else (None, None)


def _check(W: ExpertWeight, reads_left: bool) -> None:
    if W.reads_left is not reads_left:
        raise InlayError(
            f"{W.update.name} is multiplied the other way round than its layout {W.update.layout} says; adapters "
            "cannot hang on it"
        )


Rule = Callable[[Callable, tuple, dict], Any]
_RULES: dict[str, Rule] = {
    "__getitem__": _index,
    "linear": _linear,
    **dict.fromkeys(("__matmul__", "matmul", "mm", "bmm"), _matmul),
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
}
"""Name of a function of torch or of `torch.ops.transformers` -> what it is here."""
_GETTERS: dict[Any, Rule] = {Tensor.mT.__get__: _transpose}  # type: ignore[attr-defined]
