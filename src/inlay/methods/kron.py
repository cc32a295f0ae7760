"""Products other than low rank: LoHa (Hadamard), LoKr and KronA (Kronecker)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from inlay.core.edit import Call, Edit, Weights
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.start import kaiming, linears_only


@dataclass(frozen=True, kw_only=True)
class LoHa(Edit):
    """y + alpha/r ((a1 b1) * (a2 b2)) x, a Hadamard product of two low-rank matrices; its rank can reach r^2.

    Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098. a (D_out, r), b (r, D_in), b2 starts at zero. Multiplied as a
    rank-r^2 product where that is cheaper than forming the matrix.
    """

    kind = "loha"
    rank: int = 8
    """Rank r of each factor."""
    alpha: float = 8.0
    """Numerator of the scale alpha / r."""

    def weights(self, place: Place) -> dict[str, Tensor]:
        linears_only("LoHa", place)
        r = self.rank
        return {
            "a1": kaiming(place.d_out, r),
            "b1": kaiming(r, place.d_in),
            "a2": kaiming(place.d_out, r),
            "b2": torch.zeros(r, place.d_in),
        }

    def factors(self, w: Weights) -> tuple[Tensor, Tensor]:
        """The same update as a low-rank product: (D_out, r^2), (r^2, D_in)."""
        left = (w["a1"][:, :, None] * w["a2"][:, None, :]).flatten(1)
        right = (w["b1"][:, None, :] * w["b2"][None, :, :]).flatten(0, 1)
        return left, right

    def _low(self, place: Place) -> bool:
        return self.rank**2 * (place.d_in + place.d_out) < place.d_in * place.d_out

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if self._low(call.place):
            left, right = self.factors(w)
            return y + self.alpha / self.rank * linear(linear(x, right), left)
        return y + self.alpha / self.rank * linear(x, (w["a1"] @ w["b1"]) * (w["a2"] @ w["b2"]))


def split(n: int, factor: int = -1) -> tuple[int, int]:
    """n = small x large: `factor` if it divides n, else the largest divisor up to sqrt(n) (and up to `factor`).

    >>> split(128), split(128, 4), split(127)
    ((8, 16), (4, 32), (1, 127))
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    most = int(n**0.5) if factor < 0 else min(int(n**0.5), factor)
    small = next(d for d in range(most, 0, -1) if n % d == 0)
    return small, n // small


@dataclass(frozen=True, kw_only=True)
class LoKr(Edit):
    """y + s (w1 (x) w2) x, a Kronecker product that is never formed.

    LoKr: Yeh et al. 2024 (LyCORIS), arXiv:2309.14859; w1 (o1, i1), w2 (o2, i2) with D_out = o1 o2, D_in = i1 i2; w2
    (and w1 with `decompose_both`) is itself of rank r where r < max(o2, i2) / 2; s = alpha / r. KronA: Edalati et al.
    2022, arXiv:2212.10650: both factors whole (`whole`), s = 1 for alpha = rank. The second factor starts at zero.
    """

    kind = "lokr"
    rank: int = 8
    """Rank r of a decomposed factor."""
    alpha: float = 8.0
    """Numerator of the scale alpha / r."""
    factor: int = -1
    """Size of the first factor; -1: as square as the widths allow."""
    decompose_both: bool = False
    """Also give the first factor rank r."""
    whole: bool = False
    """Keep both factors whole (KronA)."""

    def weights(self, place: Place) -> dict[str, Tensor]:
        linears_only("LoKr", place)
        (o1, o2), (i1, i2), r = split(place.d_out, self.factor), split(place.d_in, self.factor), self.rank
        low1 = self.decompose_both and not self.whole and r < max(o1, i1) / 2
        low2 = not self.whole and r < max(o2, i2) / 2
        w = {"w1_a": kaiming(o1, r), "w1_b": kaiming(r, i1)} if low1 else {"w1": kaiming(o1, i1)}
        return w | ({"w2_a": torch.zeros(o2, r), "w2_b": kaiming(r, i2)} if low2 else {"w2": torch.zeros(o2, i2)})

    def factors(self, w: Weights) -> tuple[Tensor, Tensor]:
        """(w1, w2), whole."""
        return tuple(w[k] if k in w else w[f"{k}_a"] @ w[f"{k}_b"] for k in ("w1", "w2"))  # type: ignore[return-value]

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        w1, w2 = self.factors(w)
        x = x.unflatten(-1, (w1.shape[1], w2.shape[1]))
        return y + self.alpha / self.rank * (w1 @ linear(x, w2)).flatten(-2)


METHODS = (
    Method("loha", LoHa, "Hadamard product of two low-rank updates"),
    Method("lokr", LoKr, "Kronecker product, its larger factor of low rank"),
    Method("krona", LoKr, "Kronecker product of two whole factors", {"whole": True}),
)
