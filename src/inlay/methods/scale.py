"""(IA)^3: learned element-wise rescaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights, overwrites
from inlay.core.method import Method
from inlay.core.place import Place


@dataclass(frozen=True, kw_only=True)
class IA3(Edit):
    """l * y at keys and values, W (l * x) + b before the MLP's last linear.  Liu et al. 2022, arXiv:2205.05638, sec.
    3.3.

    l starts at one; it has D_out entries where wired `output`, D_in where wired `input`.
    """

    kind = "ia3"
    at = "k,v,down"
    wirings = ("output", "input")

    def default_wiring(self, role: str) -> str:
        return "input" if role == "down" else "output"

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {"l": torch.ones(place.d_in if self.wiring_of(place) == "input" else place.d_out)}

    def stacks(self, place: Place) -> bool:
        return True

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        return {"l": 1 + sum(s * (w["l"] - 1) for s, w in parts)}  # type: ignore[dict-item]

    @overwrites
    def before(self, w: Weights, x: Tensor, call: Call) -> Tensor:
        return self._rescaled(w, x, call) if self.wiring_of(call) == "input" else x

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y if self.wiring_of(call) == "input" else self._rescaled(w, y, call)

    def _rescaled(self, w: Weights, t: Tensor, call: Call) -> Tensor:
        return t.mul_(w["l"]) if call.spare else t * w["l"]


METHODS = (Method("ia3", IA3, "element-wise rescaling of keys, values and the MLP's inner state"),)
