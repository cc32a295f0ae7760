"""torch: operators and queries that are not public, each with what is done where it is missing.

oneDNN's operators (`torch.ops.mkldnn`) are chosen and checked where the processor is known: `inlay.core.product` and
`inlay.engine.reorder`.
"""

from __future__ import annotations

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
