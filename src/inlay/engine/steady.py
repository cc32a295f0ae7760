"""What depends on an adapter's tensors alone, made once an optimizer step and not once a pack.

Where an edit only turns or stretches what a frozen layer says (RoAd, DoRA's gain), the layer's weight is turned or
stretched instead: the edit then costs nothing in forward and in the gradient of the input, for a copy of the weight
that lives for a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from inlay.core.edit import LowRank

T = TypeVar("T")
CHUNK = 176
"""Rows at a time where two tensors are summed in float32: what a core's cache holds."""


class Steady:
    """Holds what was made in this step. Whoever changes tensors or begins a step calls `clear`."""

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Hashable, Any]] = {}

    def clear(self) -> None:
        """Forget everything."""
        self._made.clear()

    def get(self, key: Hashable, state: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, asked once as long as `state` is the same."""
        found = self._made.get(key)
        if found is None or found[0] != state:
            found = self._made[key] = state, make()
        return found[1]


@dataclass(frozen=True)
class Map:
    """A layer under its edit's gain or turn."""

    W: Tensor
    """gain * W, or R W (D_out, D_in), in the type of W."""
    b: Tensor | None
    """b, or R b."""
    B: Tensor | None = None
    """gain * B, in the type of B."""


@torch.no_grad()
def mapped(W: Tensor, b: Tensor | None, form: LowRank, gain: Tensor | None) -> Map | None:
    """The layer that says what the edit makes of it; None where its gradient could not be had from what it says."""
    if form.turn is None:
        assert gain is not None
        if not _invertible(gain):
            return None
        B = None if form.B is None else (gain[:, None] * form.B).to(form.B.dtype)
        return Map(W.float().mul(gain[:, None]).to(W.dtype), b, B)
    angle, length = form.turn
    if not _invertible(length):
        return None
    c = torch.polar(length.float(), angle.float())
    return Map(_turned(W, c), None if b is None else _turned(b[:, None], c)[:, 0])


def _invertible(length: Tensor) -> bool:
    return bool((length.abs() > 1e-6).all())


def _turned(W: Tensor, c: Tensor) -> Tensor:
    """c times neighbouring rows of W as complex numbers, rounded once."""
    said = torch.empty_like(W)
    for to, rows, part in zip(said.split(2 * CHUNK), W.split(2 * CHUNK), c.split(CHUNK), strict=True):
        rows = rows.float().unflatten(0, (-1, 2))
        re, im = part.real[:, None], part.imag[:, None]
        out = to.unflatten(0, (-1, 2)) if W.dtype == torch.float32 else torch.empty_like(rows)
        torch.mul(rows, re[:, None], out=out)
        out[:, 0].addcmul_(rows[:, 1], im, value=-1)
        out[:, 1].addcmul_(rows[:, 0], im)
        if W.dtype != torch.float32:
            to.copy_(out.flatten(0, 1))
    return said


def gain_gradient(g: Tensor, y: Tensor, gain: Tensor, b: Tensor | None) -> Tensor:
    """Of a gain (D,), from the gradient of y and y = gain * z + b, both (N, D)."""
    found = sum((p * q).sum(0).to(gain.dtype) for p, q in zip(g.split(CHUNK), y.split(CHUNK), strict=True))
    return (found if b is None else found - b * g.sum(0)) / gain  # type: ignore[operator, return-value]


def turn_gradients(g: Tensor, y: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Of angles and lengths (D / 2,), from the gradient of y and y = R z, both (N, D)."""
    s = g.new_zeros(g.shape[1] // 2, dtype=torch.complex64)
    for p, q in zip(g.split(CHUNK), y.split(CHUNK), strict=True):
        s += _pairs(p, copy=True).conj_physical_().mul_(_pairs(q)).sum(0)
    return s.imag.neg(), s.real / length


def _pairs(t: Tensor, copy: bool = False) -> Tensor:
    """Neighbours as complex numbers in float32."""
    return torch.view_as_complex(t.to(torch.float32, copy=copy).contiguous().unflatten(-1, (-1, 2)))
