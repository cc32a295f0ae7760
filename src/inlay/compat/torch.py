"""torch: operators and queries that are not public, each with what is done where it is missing.

oneDNN's operators (`torch.ops.mkldnn`) are tried on a small product before they are used for any other; which shapes
and processors they are used for is the matter of `inlay.core.product` and `inlay.core.processor`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def softmax_backward(grad: Tensor, p: Tensor) -> Tensor:
    """Gradient of the scores behind p = softmax(scores) over the last dimension: p (grad - sum(grad p)), of p's type.

    By `torch._softmax_backward_data` in one pass; by the formula if a torch has no such operator.
    """
    fused = getattr(torch, "_softmax_backward_data", None)
    if fused is None:
        wide = p.float()
        return (wide * (grad.float() - (grad.float() * wide).sum(-1, keepdim=True))).to(p.dtype)
    return fused(grad, p, -1, p.dtype)  # type: ignore[no-any-return]


def observed() -> bool:
    """Whether a compiler or a transform of functions (vmap, grad) traces what runs now.

    They see through plain operations only, so callers then leave out nodes and in-place forms of their own. A torch
    that does not tell counts as traced: slower, and right.
    """
    if torch.compiler.is_compiling():
        return True
    peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return peek is None or peek() is not None


@functools.cache
def has_onednn_linear() -> bool:
    """Whether oneDNN's product can be called, on weights as they are and reordered, and gives the right numbers.

    False leaves all products to PyTorch's own choice of library.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    with torch.device("cpu"), torch.no_grad():
        x, W, b = (torch.arange(n, dtype=torch.float32) for n in (6, 12, 4))
        x, W = x.view(2, 3), W.view(4, 3)
        want = (x[:, None] * W).sum(-1) + b
    try:
        return all(torch.allclose(onednn_linear(x, V, b), want) for V in (W, onednn_reorder(W)))
    except (AttributeError, RuntimeError, TypeError):  # no such operator, or with other arguments
        return False


def onednn_linear(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """x W^T + b by oneDNN, without gradients: x (..., D_in) not empty, W (D_out, D_in), b (D_out,) contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")  # type: ignore[no-any-return]


def onednn_reorder(W: Tensor) -> Tensor:
    """A copy of W (D_out, D_in) in the order in which oneDNN reads it; of use to `onednn_linear` only."""
    return torch.ops.mkldnn._reorder_linear_weight(W)  # type: ignore[no-any-return]


@functools.cache
def onednn_has_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor; False if a torch does not tell."""
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is not None and bool(asked())
