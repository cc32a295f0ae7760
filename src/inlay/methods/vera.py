"""VeRA: two random matrices shared by every place, and two trained vectors a place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inlay.core.edit import Call, Edit, Weights
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import rows_product
from inlay.core.start import linears_only


@dataclass(frozen=True, kw_only=True)
class VeRA(Edit):
    """y + b * (B (d * (A x))),  trained d (rank,), b (D_out,).  Kopiczko et al. 2024, arXiv:2310.11454, eq. 2.

    A (rank, widest D_in) and B (widest D_out, rank) are frozen, Kaiming-uniform, shared by all places and cut to
    each; b starts at zero, d at `d_initial`.
    """

    kind = "vera"
    rank: int = 256
    """Inner width r."""
    d_initial: float = 0.1
    """Start of d."""
    projection_seed: int = 0
    """Seed of A and B."""

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        for place in places:
            linears_only("VeRA", place)
        generator = torch.Generator().manual_seed(self.projection_seed)

        def draw(*shape: int) -> Tensor:
            t = torch.empty(shape)
            # On meta only the shape is wanted, and a CPU generator is refused there.
            return t if t.is_meta else nn.init.kaiming_uniform_(t, a=0, generator=generator)

        return {
            "_A": draw(self.rank, max(p.d_in for p in places)),
            "_B": draw(max(p.d_out for p in places), self.rank),
        }

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {"d": torch.full((self.rank,), self.d_initial), "b": torch.zeros(place.d_out)}

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        return FOLDED, w

    def stacks(self, place: Place) -> bool:
        return True

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        A, B = w["_A"][..., : x.shape[-1]], w["_B"][..., : y.shape[-1], :]
        return y + w["b"] * rows_product(w["d"] * rows_product(x, A), B)


FOLDED = VeRA(rank=1)
"""What VeRA comes to, whatever its settings: they speak of its start only."""


METHODS = (Method("vera", VeRA, "trained vectors around random matrices that all places share"),)
