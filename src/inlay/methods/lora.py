"""Low-rank adaptation and its variants: LoRA, rsLoRA, PiSSA, DoRA, AdaLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import dropout, embedding, linear

from inlay.core.edit import Call, Edit, LowRank, Weights, overwrites
from inlay.core.errors import InlayError, unknown
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import low_rank
from inlay.core.start import frozen_weight, kaiming


def column(A: Tensor, ids: Tensor) -> Tensor:
    """A x for the one-hot x that ids stand for at an embedding."""
    return embedding(ids, A.T)


Experts = Literal["separate", "shared", "shared-A"]
SHARED: dict[str, tuple[str, ...]] = {"separate": (), "shared": ("A", "B"), "shared-A": ("A",)}
"""What the experts of an expert parameter share."""


@dataclass(frozen=True, kw_only=True)
class LoRA(Edit):
    """y + s B A x,  A (rank, D_in), B (D_out, rank).

    s = alpha / rank (Hu et al. 2021, arXiv:2106.09685, eq. 3), or alpha / sqrt(rank) if `rank_stabilised`
    (Kalajdzievski 2023, arXiv:2312.03732). B starts at zero. Under `init="pissa"` (Meng et al. 2024,
    arXiv:2404.02948) A and B start at the top `rank` singular triplets of the frozen weight, y + s (B A - B0 A0) x:
    the base keeps its weight, the residual is implied.
    """

    kind = "lora"
    coarse: ClassVar[tuple[str, ...] | None] = ("A", "B", "_A0", "_B0")
    rank: int = 32
    """Inner width r. LLM-Adapters uses 32, the LoRA paper 1-64."""
    alpha: float = 64.0
    """Numerator of the scale."""
    dropout: float = 0.0
    """Probability of dropping an input of A while training; LLM-Adapters trains with 0.05."""
    rank_stabilised: bool = False
    """Divide alpha by sqrt(rank) instead of rank."""
    init: Literal["zero", "pissa"] = "zero"
    """Start: B = 0, or the top singular triplets of the frozen weight."""
    experts: Experts = "separate"
    """At expert parameters: an A and a B for each expert, one A and one B for all of them, or one A and a B each."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InlayError(f"rank must be at least 1, not {self.rank}")
        if self.experts not in SHARED:
            raise unknown("setting of experts", self.experts, SHARED)
        if self.init == "pissa" and self.experts != "separate":
            raise InlayError("PiSSA starts at the weight of each expert: it cannot share factors; use experts=separate")

    def shared_by_experts(self, place: Place) -> tuple[str, ...]:
        return SHARED[self.experts]

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    def weights(self, place: Place) -> dict[str, Tensor]:
        if self.init == "pissa":
            return self._principal(place)
        return {"A": kaiming(self.rank, place.d_in), "B": torch.zeros(place.d_out, self.rank)}

    def _principal(self, place: Place) -> dict[str, Tensor]:
        if place.role == "embed":
            raise InlayError("PiSSA starts from a linear's weight; leave the embedding out")
        if self.rank > min(place.d_in, place.d_out):
            raise InlayError(f"PiSSA of rank {self.rank} does not fit {place.key!r} ({place.d_out} x {place.d_in})")
        U, S, Vh = torch.linalg.svd(frozen_weight(place), full_matrices=False)
        root = (S[: self.rank] / self.scale).sqrt()
        A, B = root[:, None] * Vh[: self.rank], U[:, : self.rank] * root
        return {"A": A, "B": B, "_A0": A.clone(), "_B0": B.clone()}

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        plain = PLAIN[self.experts]
        if "_A0" not in w:
            return plain, {"A": w["A"], "B": self.scale * w["B"]}
        A, B = torch.cat([w["A"], w["_A0"]]), torch.cat([w["B"], -w["_B0"]], 1)
        return plain, {"A": A, "B": self.scale * B}

    def stacks(self, place: Place) -> bool:
        return place.role != "embed"

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        return side_by_side(parts) if self == PLAIN[self.experts] else None

    def low_rank(self, w: Weights, call: Call) -> LowRank | None:
        drops = self.dropout and call.training
        return None if drops or "_A0" in w else LowRank(w["A"], w["B"], self.scale)

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if not x.is_floating_point():
            return y + self.scale * linear(column(w["A"], x), w["B"])
        x = dropout(x, self.dropout, True) if self.dropout and call.training else x
        if "_A0" in w:  # less where it started; subtracted first, so that a fresh adapter changes nothing
            return y + (low_rank(x, w["A"], w["B"], self.scale) - low_rank(x, w["_A0"], w["_B0"], self.scale))
        return low_rank(x, w["A"], w["B"], self.scale, onto=y, over=call.spare)


def side_by_side(parts: Sequence[tuple[float, Weights]]) -> dict[str, Tensor]:
    """Factors of sum s B A."""
    return {"A": torch.cat([w["A"] for _, w in parts]), "B": torch.cat([s * w["B"] for s, w in parts], 1)}


PLAIN = {experts: LoRA(rank=1, alpha=1.0, experts=experts) for experts in get_args(Experts)}
"""B A x, by what experts share: what every low-rank update comes to."""


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """m (W + s B A) x / |W + s B A|, norms over each output row.  Liu et al. 2024, arXiv:2402.09353, eq. 5.

    Written as y + (m/n - 1)(y - b) + (m/n) s B A x with n = |W + s B A|, so that a fresh adapter changes nothing. The
    weight is never read: n^2 = |W|^2 + 2 s <B, W A^T> + s^2 <B, B A A^T> and W A^T = f(A) - b, so any frozen layer
    serves. As in sec. 4.3 of the paper, n is a constant in the backward pass.
    """

    kind = "dora"
    coarse = ("A", "B")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "zero":
            raise InlayError("DoRA starts at B = 0; use method 'pissa' for the principal start")

    def weights(self, place: Place) -> dict[str, Tensor]:
        if place.role == "embed":
            raise InlayError("DoRA's magnitude belongs to a linear's rows; leave the embedding out")
        square = frozen_weight(place).square().sum(1)
        return {**super().weights(place), "m": square.sqrt(), "_square": square}

    @torch.no_grad()
    def norm(self, w: Weights, place: Place) -> tuple[Tensor, Tensor | float]:
        """(n (D_out,), b)."""
        A, B, s, f = w["A"], w["B"], self.scale, place.f
        b = f(A.new_zeros(1, A.shape[1])) if place.has_bias else 0.0
        WAt = (f(A) - b).T  # (D_out, rank)
        square = w["_square"] + 2 * s * (B * WAt).sum(1) + s * s * (B * (B @ (A @ A.T))).sum(1)
        return square.clamp(min=0).sqrt(), b

    def gain(self, w: Weights, place: Place) -> tuple[Tensor, Tensor | float]:
        """(m / n (D_out,), b)."""
        n, b = self.norm(w, place)
        return w["m"] / n, b

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        gain, b = self.gain(w, place)
        bias = {"b": (1 - gain) * b[0]} if isinstance(b, Tensor) else {}
        return _Gained(experts="separate" if self.experts == "separate" else "shared-A"), {
            "A": w["A"],
            "B": self.scale * gain[:, None] * w["B"],
            "gain": gain,
            **bias,
        }

    def low_rank(self, w: Weights, call: Call) -> LowRank | None:
        drops = self.dropout and call.training
        norm = partial(self.norm, w, call.place)
        return None if drops else LowRank(w["A"], w["B"], self.scale, w["m"], norm=lambda: norm()[0])

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        A, B, s = w["A"], w["B"], self.scale
        gain, b = self.gain(w, call.place)
        x = dropout(x, self.dropout, True) if self.dropout and call.training else x
        scaled = torch.addcmul(y, y - b, gain - 1) if call.place.has_bias else gain * y
        return low_rank(x, A, (gain[:, None] * B).to(B.dtype), s, onto=scaled.to(x.dtype))


@dataclass(frozen=True, kw_only=True)
class _Gained(Edit):
    """gain * y + b + B A x: what DoRA comes to."""

    experts: Experts = "separate"
    """As LoRA's; B is each expert's own in any case, for its gain is in it."""

    def shared_by_experts(self, place: Place) -> tuple[str, ...]:
        return SHARED[self.experts]

    def stacks(self, place: Place) -> bool:
        return True

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        gain = 1 + sum(s * (w["gain"] - 1) for s, w in parts)
        bias = {"b": sum(s * w["b"] for s, w in parts)} if "b" in parts[0][1] else {}
        return {**side_by_side(parts), "gain": gain, **bias}  # type: ignore[dict-item]

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        out = y if call.spare else None
        scaled = torch.addcmul(w["b"], y, w["gain"], out=out) if "b" in w else torch.mul(w["gain"], y, out=out)
        return low_rank(x, w["A"], w["B"], 1.0, onto=scaled, over=call.spare)


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Edit):
    """y + s P diag(E) Q x, ranks given to the places that need them.  Zhang et al. 2023, arXiv:2303.10512, sec. 3.

    Q (rank, D_in), E (rank,), P (D_out, rank); E starts at zero. A triplet's importance is the smoothed sensitivity
    |w g| of its parts; every `interval` steps between `warmup` and the last `final` share of training the least
    important values of E over all places are set to zero, on the paper's cubic schedule from `rank` to `target` per
    place on average.
    """

    kind = "adalora"
    rank: int = 12
    """Initial rank of each place."""
    target: int = 8
    """Average rank at the end."""
    alpha: float = 8.0
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Probability of dropping an input of Q while training."""
    warmup: float = 0.1
    """Share of the training before the first value is dropped."""
    final: float = 0.3
    """Share of the training at its end during which the ranks stay as they are."""
    interval: int = 10
    """Steps between two allocations."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orthogonality: float = 0.5
    """Weight of |P^T P - I|^2 + |Q Q^T - I|^2 in the loss."""
    experts: Literal["separate", "shared"] = "separate"
    """At expert parameters: triplets for each expert, each a place of its own when ranks are given, or the same for all
    of them."""

    def __post_init__(self) -> None:
        if self.experts not in ("separate", "shared"):
            raise unknown("setting of experts", self.experts, ("separate", "shared"))

    def shared_by_experts(self, place: Place) -> tuple[str, ...]:
        return ("Q", "E", "P") if self.experts == "shared" else ()

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {
            "Q": 0.02 * torch.randn(self.rank, place.d_in),
            "E": torch.zeros(self.rank),
            "P": 0.02 * torch.randn(place.d_out, self.rank),
        }

    def low_rank(self, w: Weights, call: Call) -> LowRank | None:
        drops = self.dropout and call.training
        return None if drops else LowRank(w["E"][:, None] * w["Q"], w["P"], self.alpha / self.rank)

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        return PLAIN[self.experts], {"A": w["E"][:, None] * w["Q"], "B": self.alpha / self.rank * w["P"]}

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if not x.is_floating_point():
            return y + self.alpha / self.rank * linear(column(w["Q"], x) * w["E"], w["P"])
        x = dropout(x, self.dropout, True) if self.dropout and call.training else x
        return low_rank(x, w["E"][:, None] * w["Q"], w["P"], self.alpha / self.rank, onto=y)

    def penalty(self, adapter: Mapping[str, Weights]) -> Tensor | None:
        eye = torch.eye(self.rank, device=next(iter(adapter.values()))["E"].device)
        pairs = [(P, Q) for w in adapter.values() for P, Q in zip(_matrices(w["P"]), _matrices(w["Q"]), strict=True)]
        terms = [(P.T @ P - eye).norm() + (Q @ Q.T - eye).norm() for P, Q in pairs]
        return self.orthogonality * sum(terms) / (2 * len(terms))

    @torch.no_grad()
    def after_step(self, adapter: Mapping[str, Weights], step: int, total: int, state: dict[str, Tensor]) -> None:
        if not 1 <= self.target <= self.rank:  # only training asks for it: files of other libraries hold any target
            raise InlayError(f"AdaLoRA's target {self.target} must lie between 1 and its rank {self.rank}")
        each = [self._importance(key, w, state).view(-1, self.rank) for key, w in adapter.items()]
        scores = torch.cat(each)  # (places, rank); each expert of an expert parameter is one
        begin, end = int(self.warmup * total), int((1 - self.final) * total)
        if step < begin or (step % self.interval and step < end):
            return
        left = max(0.0, 1 - (step - begin) / max(1, end - begin)) ** 3
        keep = round(len(scores) * (self.target + (self.rank - self.target) * left))
        floor = scores.flatten().topk(keep).values.min()
        mask = scores >= floor if step < end else state.setdefault("mask", scores >= floor)
        for (_, w), kept in zip(adapter.items(), mask.split([len(s) for s in each]), strict=True):
            w["E"].mul_(kept.view_as(w["E"]))

    def _importance(self, key: str, w: Weights, state: dict[str, Tensor]) -> Tensor:
        total = torch.zeros_like(w["E"])
        for name, over in (("E", ()), ("P", (-2,)), ("Q", (-1,))):
            p = w[name]
            now = (p * (p.grad if p.grad is not None else 0)).abs()
            smooth = state.setdefault(f"{key}/{name}/sensitivity", torch.zeros_like(p))
            doubt = state.setdefault(f"{key}/{name}/uncertainty", torch.zeros_like(p))
            smooth.mul_(self.beta1).add_(now, alpha=1 - self.beta1)
            doubt.mul_(self.beta2).add_((now - smooth).abs(), alpha=1 - self.beta2)
            total = total + ((smooth * doubt).mean(over) if over else smooth * doubt)
        return total


def _matrices(t: Tensor) -> Sequence[Tensor]:
    """One matrix, or those of each expert (E, p, q)."""
    return (t,) if t.dim() == 2 else t.unbind(0)


METHODS = (
    Method("lora", LoRA, "LoRA as LLM-Adapters trains it (rank 32, alpha 64)"),
    Method("rslora", LoRA, "LoRA scaled by alpha / sqrt(rank)", {"rank_stabilised": True}),
    Method("pissa", LoRA, "LoRA that starts at the principal singular triplets", {"init": "pissa", "alpha": 32.0}),
    Method("dora", DoRA, "LoRA with a trained magnitude per output"),
    Method("adalora", AdaLoRA, "low-rank updates whose ranks are allocated while training"),
)
