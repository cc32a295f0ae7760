"""Products other than low rank: LoHa (Hadamard), LoKr and KronA (Kronecker)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from inlay.core.edit import Call, Edit, Weights
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import rows_product
from inlay.core.start import kaiming, linears_only


@dataclass(frozen=True, kw_only=True)
class LoHa(Edit):
    """y + alpha/r ((a1 b1) * (a2 b2)) x, a Hadamard product of two low-rank matrices; its rank can reach r^2.

    Hyeon-Woo et al. 2022 (FedPara), arXiv:2108.06098. a (D_out, r), b (r, D_in), b2 starts at zero. Multiplied as a
    rank-r^2 product where that is cheaper than forming the matrix, and through the r x r matrix of each token where
    they are few.
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
        left = (w["a1"][..., :, None] * w["a2"][..., None, :]).flatten(-2)
        right = (w["b1"][..., :, None, :] * w["b2"][..., None, :, :]).flatten(-3, -2)
        return left, right

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        return HADAMARD, {**w, "a1": self.alpha / self.rank * w["a1"]}

    def stacks(self, place: Place) -> bool:
        return True

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        rank, d_in, d_out = w["b1"].shape[-2], x.shape[-1], y.shape[-1]
        if (x.shape[-2] if w["b1"].dim() == 3 else x.shape[:-1].numel()) < rank:
            update = self._few(w, x)
        elif rank**2 * (d_in + d_out) < d_in * d_out:
            left, right = self.factors(w)
            update = rows_product(rows_product(x, right), left)
        else:
            update = rows_product(x, (w["a1"] @ w["b1"]) * (w["a2"] @ w["b2"]))
        return y + self.alpha / self.rank * update

    def _few(self, w: Weights, x: Tensor) -> Tensor:
        """The sum over i, j of (a1_i * a2_j) (b1_i . diag(x) b2_j), no matrix of which is larger than r x D."""
        a1, b1, a2, b2 = (w[k].unsqueeze(-3) for k in ("a1", "b1", "a2", "b2"))
        inner = (b1 * x.unsqueeze(-2)) @ b2.mT  # (B, T, r, r)
        return ((a1 @ inner) * a2).sum(-1)


HADAMARD = LoHa(rank=1, alpha=1.0)
"""What LoHa comes to, whatever its rank and scale."""


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

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        w1, w2 = self.factors(w)
        return KRONECKER, {"w1": self.alpha / self.rank * w1, "w2": w2}

    def stacks(self, place: Place) -> bool:
        return True

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        w1, w2 = self.factors(w)
        x = x.unflatten(-1, (w1.shape[-1], w2.shape[-1]))
        if w1.dim() == 3:  # a pair a row: tokens share their row's factors
            h = rows_product(x.flatten(1, 2), w2).unflatten(1, x.shape[1:3]).transpose(1, 2)  # (B, i1, T, o2)
            return y + torch.bmm(w1, h.flatten(2)).unflatten(2, h.shape[2:]).transpose(1, 2).flatten(-2)
        return y + self.alpha / self.rank * (w1 @ linear(x, w2)).flatten(-2)


KRONECKER = LoKr(rank=1, alpha=1.0, whole=True)
"""What LoKr and KronA come to, whatever their ranks and scale."""

METHODS = (
    Method("loha", LoHa, "Hadamard product of two low-rank updates"),
    Method("lokr", LoKr, "Kronecker product, its larger factor of low rank"),
    Method("krona", LoKr, "Kronecker product of two whole factors", {"whole": True}),
)
