"""Bottleneck adapters: series on either side of a layer, parallel to one linear or a whole sub-layer, and Compacter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.core.edit import Call, Edit, Weights, overwrites
from inlay.core.errors import InlayError
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import rows_product
from inlay.core.start import kaiming

Activation = Literal["tanh", "relu", "gelu", "silu", "sigmoid", "identity"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Edit):
    """f(z) = s U act(D z + c) + e,  D (size, width), U (D_out, size); c and e only with `bias`.

    wiring     edit                     source
    output     y' = y + f(y)            Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247
    input      y' = W (x + f(x)) + b    LLM-Adapters, Hu et al. 2023, arXiv:2304.01933 (its code, before gate and up)
    parallel   y' = y + f(x)            He et al. 2022, arXiv:2110.04366; LLM-Adapters, per linear

    U starts at zero. `start="normal"` is LLM-Adapters' published start, D and U from N(0, 0.02^2): it is not the
    identity.
    """

    kind = "bottleneck"
    at = "down"
    wirings = ("output", "input", "parallel")
    coarse: ClassVar[tuple[str, ...] | None] = ("D", "U", "c", "e")

    size: int = 256
    """Bottleneck width m."""
    activation: Activation = "tanh"
    """Non-linearity between D and U."""
    scale: float = 1.0
    """Factor s of the adapter's output."""
    learned_scale: bool = False
    """Train s, one number a place, from `scale` on."""
    bias: bool = False
    """Whether D and U have biases."""
    dropout: float = 0.0
    """Probability of dropping an input of D while training."""
    wiring: Literal["auto", "output", "input", "parallel"] = "auto"
    """Where a placement names no wiring. `auto`: input at q, k, v, gate and up, output elsewhere."""
    start: Literal["identity", "normal"] = "identity"
    """`normal` is LLM-Adapters' published, non-identity start."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InlayError(f"the bottleneck's size must be at least 1, not {self.size}")

    def default_wiring(self, role: str) -> str:
        if self.wiring != "auto":
            return self.wiring
        return "input" if role in ("q", "k", "v", "qkv", "gate", "up", "gate_up") else "output"

    def _ends(self, place: Place) -> tuple[int, int]:
        """(width read, width written)."""
        if place.role in ("embed", "head"):
            raise InlayError(f"a bottleneck cannot hang at {place.role!r}: it takes or gives a vocabulary")
        wiring = self.wiring_of(place)
        return (place.d_out if wiring == "output" else place.d_in), (place.d_in if wiring == "input" else place.d_out)

    def weights(self, place: Place) -> dict[str, Tensor]:
        d_in, d_out = self._ends(place)
        w = {"D": kaiming(self.size, d_in), "U": torch.zeros(d_out, self.size)}
        if self.start == "normal":
            w = {k: 0.02 * torch.randn(v.shape) for k, v in w.items()}
        return w | self._extras(d_out)

    def _extras(self, d_out: int) -> dict[str, Tensor]:
        w = {"c": torch.zeros(self.size), "e": torch.zeros(d_out)} if self.bias else {}
        return w | ({"s": torch.full((1,), float(self.scale))} if self.learned_scale else {})

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        s = w.get("s", self.scale)
        scaled = {k: s * w[k] if k in ("U", "e") else w[k] for k in ("D", "U", "c", "e") if k in w}
        return Bottleneck(activation=self.activation, wiring=self.wiring_of(place)), scaled  # type: ignore[arg-type]

    def stacks(self, place: Place) -> bool:
        return True

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        """Hidden units side by side."""
        found = {"D": torch.cat([w["D"] for _, w in parts]), "U": torch.cat([s * w["U"] for s, w in parts], 1)}
        if all("c" in w for _, w in parts):
            found["c"] = torch.cat([w["c"] for _, w in parts])
            found["e"] = sum(s * w["e"] for s, w in parts)  # type: ignore[assignment]
        return found if "c" in found or not any("c" in w for _, w in parts) else None

    def f(self, w: Weights, z: Tensor, call: Call) -> Tensor:
        """The bottleneck itself: (..., width) -> (..., D_out)."""
        z = F.dropout(z, self.dropout, True) if self.dropout and call.training else z
        inner = ACTIVATIONS[self.activation](rows_product(z, w["D"], w.get("c")))
        out = rows_product(inner, w["U"], w.get("e"))
        return out if "s" not in w and self.scale == 1.0 else w.get("s", self.scale) * out

    def _with(self, t: Tensor, w: Weights, z: Tensor, call: Call) -> Tensor:
        """t + f(z)."""
        said = self.f(w, z, call)
        return t.add_(said) if call.spare else t + said

    @overwrites
    def before(self, w: Weights, x: Tensor, call: Call) -> Tensor:
        return self._with(x, w, x, call) if self.wiring_of(call) == "input" else x

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        wiring = self.wiring_of(call)
        return y if wiring == "input" else self._with(y, w, x if wiring == "parallel" else y, call)


@dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """A bottleneck whose matrices are sums of Kronecker products, D = sum_i A_i (x) (s_i t_i^T).

    Karimi Mahabadi et al. 2021, arXiv:2106.04647: the n matrices A_i (n, n) are shared by all places (one set for D,
    one for U), s_i (width / n, 1) and t_i (1, size / n) belong to the place. t of U starts at zero.
    """

    kind = "compacter"
    coarse = None
    at = "o,down"
    size: int = 24
    """Bottleneck width; a multiple of n."""
    activation: Activation = "gelu"
    """Non-linearity between D and U."""
    bias: bool = True
    """Whether D and U have biases."""
    n: int = 4
    """Number of Kronecker terms; every width must be a multiple of it."""

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        return {"A_down": 0.1 * torch.randn(self.n, self.n, self.n), "A_up": 0.1 * torch.randn(self.n, self.n, self.n)}

    def weights(self, place: Place) -> dict[str, Tensor]:
        d_in, d_out = self._ends(place)
        if bad := [d for d in (d_in, d_out, self.size) if d % self.n]:
            raise InlayError(f"Compacter's n = {self.n} does not divide {bad[0]} at {place.key!r}")
        n, m = self.n, self.size // self.n
        w = {
            "D_s": torch.randn(n, d_in // n, 1) * (n / d_in) ** 0.5,
            "D_t": torch.randn(n, 1, m),
            "U_s": torch.randn(n, m, 1) * m**-0.5,
            "U_t": torch.zeros(n, 1, d_out // n),
        }
        return w | self._extras(d_out)

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        D, U = (self._matrix(w[f"A_{k}"], w[f"{m}_s"], w[f"{m}_t"]) for k, m in (("down", "D"), ("up", "U")))
        whole = {"D": D, "U": U, **{k: w[k] for k in ("c", "e", "s") if k in w}}
        return super().folded(whole, place)

    def f(self, w: Weights, z: Tensor, call: Call) -> Tensor:
        z = F.dropout(z, self.dropout, True) if self.dropout and call.training else z
        inner = ACTIVATIONS[self.activation](self._phm(w["A_down"], w["D_s"], w["D_t"], z) + w.get("c", 0.0))
        return w.get("s", self.scale) * (self._phm(w["A_up"], w["U_s"], w["U_t"], inner) + w.get("e", 0.0))

    def _matrix(self, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """(sum_i A_i (x) s_i t_i)^T, the product formed."""
        return sum(torch.kron(a, left @ right) for a, left, right in zip(A, s, t, strict=True)).T  # type: ignore

    def _phm(self, A: Tensor, s: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """z (sum_i A_i (x) s_i t_i), the product never formed."""
        inner = torch.einsum("ipq,...pd,ids->...iqs", A, z.unflatten(-1, (self.n, -1)), s)
        return torch.einsum("...iqs,ise->...qe", inner, t).flatten(-2)


METHODS = (
    Method("series", Bottleneck, "LLM-Adapters' series adapter: after the MLP's last linear, size 256"),
    Method(
        "parallel",
        Bottleneck,
        "LLM-Adapters' parallel adapter: beside single linears",
        {"wiring": "parallel"},
        "up,down",
    ),
    Method(
        "houlsby",
        Bottleneck,
        "bottlenecks after attention and after the MLP",
        {"size": 64, "activation": "gelu", "bias": True, "wiring": "output"},
        "o,down",
    ),
    Method(
        "pfeiffer",
        Bottleneck,
        "one bottleneck a block, after the MLP",
        {"size": 48, "activation": "relu", "bias": True, "wiring": "output"},
        "down",
    ),
    Method(
        "he-parallel",
        Bottleneck,
        "one scaled bottleneck parallel to the whole MLP",
        {"size": 512, "activation": "relu", "bias": True, "scale": 4.0, "wiring": "parallel"},
        "mlp",
    ),
    Method("compacter", Compacter, "bottlenecks from shared Kronecker factors"),
)
