"""Rotary positions as one node: three passes over queries and keys, where the decoder's own code takes a dozen.

Decoders look their function up in their module; within the block it is replaced there, if it is the known one.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.compat.source import has_body
from inlay.compat.torch import observed
from inlay.compat.transformers import ROTARY, ROTARY_BODIES
from inlay.core.host import Host


class Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin for x (..., D); cos and sin are constants of a shape that x broadcasts."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        (a, b), (s, t) = x.chunk(2, -1), sin.chunk(2, -1)
        y = x * cos
        u, v = y.chunk(2, -1)
        u.addcmul_(b, s, value=-1)
        v.addcmul_(a, t)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        (a, b), (s, t) = g.chunk(2, -1), sin.chunk(2, -1)
        dx = g * cos
        u, v = dx.chunk(2, -1)
        u.addcmul_(b, t)
        v.addcmul_(a, s, value=-1)
        return dx, None, None


def _served(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    alike = x.dtype == cos.dtype == sin.dtype and x.shape[-1] == cos.shape[-1] and x.shape[-1] % 2 == 0
    return alike and not observed() and not cos.requires_grad


def _apply(plain: Callable[..., Any], q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
    if not (_served(q, cos, sin) and _served(k, cos, sin)):
        return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotary.apply(q, cos, sin), Rotary.apply(k, cos, sin)


@contextlib.contextmanager
def rotary(host: Host) -> Iterator[None]:
    """Within the block, the decoder's rotary positions are one node each for queries and keys."""
    homes = (sys.modules[c.__module__] for c in type(host.model).__mro__)  # FSDP2 puts a class of its own before them
    home: Any = next((h for h in homes if ROTARY in vars(h)), None)
    plain = None if home is None else vars(home)[ROTARY]
    if plain is None or not all(has_body(vars(home).get(name), body) for name, body in ROTARY_BODIES.items()):
        yield
        return
    setattr(home, ROTARY, functools.partial(_apply, plain))
    try:
        yield
    finally:
        setattr(home, ROTARY, plain)
