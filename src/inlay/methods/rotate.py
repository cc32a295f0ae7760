"""RoAd: pairs of outputs are turned and stretched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights
from inlay.core.errors import InlayError
from inlay.core.method import Method
from inlay.core.place import Place


@dataclass(frozen=True, kw_only=True)
class RoAd(Edit):
    """R y with R block-diagonal, one 2 x 2 block a pair of outputs (bias included).  Liao & Monz 2024,
    arXiv:2409.00119.

    A block is [[a11 cos t11, -a12 sin t12], [a21 sin t21, a22 cos t22]], computed as R1 * y + R2 * y^ with y^ = (-y2,
    y1, -y4, y3, ...). Variant 1 ties a and t within a block (D_out numbers a place), 2 within a row (2 D_out), 4 not
    at all (4 D_out). Starts at a = 1, t = 0. There, variant 4's angles t11 and t22 receive no gradient and never move
    (d cos t = 0 at t = 0).
    """

    kind = "road"
    at = "linear"
    variant: Literal[1, 2, 4] = 1
    """How much is tied within a block."""
    pairing: Literal["adjacent", "half"] = "adjacent"
    """Which outputs pair up: neighbours (the paper) or i with i + group/2 in each group (HF PEFT)."""
    group: int = 64
    """Group size for `half`."""

    def weights(self, place: Place) -> dict[str, Tensor]:
        if place.role == "embed":
            raise InlayError("RoAd turns a linear's outputs; leave the embedding out")
        if self.pairing == "half" and (self.group % 2 or place.d_out % self.group):
            raise InlayError(f"RoAd's groups of {self.group} do not fit the {place.d_out} outputs of {place.key!r}")
        if place.d_out % 2:
            raise InlayError(f"RoAd pairs outputs, and {place.key!r} has {place.d_out}")
        shape = {1: (place.d_out // 2,), 2: (place.d_out,), 4: (2, place.d_out)}[self.variant]
        return {"theta": torch.zeros(shape), "a": torch.ones(shape)}

    def _pairs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D_out) -> its first and second members (..., D_out / 2)."""
        if self.pairing == "adjacent":
            return t[..., 0::2], t[..., 1::2]
        cut = t.unflatten(-1, (-1, 2, self.group // 2))
        return cut[..., 0, :].flatten(-2), cut[..., 1, :].flatten(-2)

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        if self.pairing == "adjacent":
            return torch.stack([first, second], -1).flatten(-2)
        half = (-1, self.group // 2)
        return torch.stack([first.unflatten(-1, half), second.unflatten(-1, half)], -2).flatten(-3)

    def rows(self, w: Weights) -> tuple[Tensor, Tensor]:
        """(R1, R2), each (D_out,): the diagonal, and the off-diagonal magnitudes."""
        cos, sin = w["a"] * w["theta"].cos(), w["a"] * w["theta"].sin()
        if self.variant == 1:
            return self._join(cos, cos), self._join(sin, sin)
        return (cos, sin) if self.variant == 2 else (cos[0], sin[1])

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if self.pairing == "adjacent":
            y = y.to(w["a"].dtype)
            # A pair is a complex number: one block turns and stretches it as a product does, y^ is i y.
            z = torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous())
            if self.variant == 1:
                return torch.view_as_real(z * torch.polar(w["a"], w["theta"])).flatten(-2)
            R1, R2 = self.rows(w)
            return R1 * y + R2 * torch.view_as_real(1j * z).flatten(-2)
        R1, R2 = self.rows(w)
        first, second = self._pairs(y)
        return R1 * y + R2 * self._join(-second, first)


METHODS = (
    Method("road1", RoAd, "pairs of outputs turned and stretched, one angle and one factor a pair", {"variant": 1}),
    Method("road2", RoAd, "RoAd with an angle and a factor per output", {"variant": 2}),
    Method("road4", RoAd, "RoAd with four angles and factors a pair", {"variant": 4}),
)
