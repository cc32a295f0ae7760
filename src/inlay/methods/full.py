"""The baselines: full fine-tuning and BitFit, written as edits so that they mix, merge and save like every other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.core.edit import Call, Edit, Weights, overwrites
from inlay.core.method import Method
from inlay.core.place import Place


@dataclass(frozen=True, kw_only=True)
class Full(Edit):
    """y + Delta x + delta: every weight and bias moves freely, as an offset from the frozen one.

    The gradient of an offset is the gradient of the weight, so with an optimizer without weight decay this is full
    fine-tuning of the linears and embeddings; a norm's gain g is trained as g (1 + gain). One matrix serves a tied
    embedding and head. Tables of learned positions (GPT-2, OPT) and 3-D expert tensors stay frozen: they are not
    called as layers.
    """

    kind = "full"
    at = "embed,linear,norm,head"

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        tied = [p for p in places if p.tied]
        if not tied:
            return {}
        vocabulary, width = max(tied[0].d_in, tied[0].d_out), min(tied[0].d_in, tied[0].d_out)
        return {"tied": torch.zeros(vocabulary, width)}

    def weights(self, place: Place) -> dict[str, Tensor]:
        w = {}
        if place.role == "norm":
            w["gain"] = torch.zeros(place.d_out)
        elif not place.tied:
            w["delta"] = torch.zeros((place.d_in, place.d_out) if place.role == "embed" else (place.d_out, place.d_in))
        if place.has_bias:
            w["bias"] = torch.zeros(place.d_out)
        return w

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        if "gain" in w:
            y = y + w["gain"] * (y - call.place.f(torch.zeros_like(y[..., :1, :])))
        else:
            delta = w["tied"] if call.place.tied else w["delta"]
            y = y + (F.linear(x, delta) if x.is_floating_point() else F.embedding(x, delta))
        return y + w["bias"] if "bias" in w else y


@dataclass(frozen=True, kw_only=True)
class BitFit(Edit):
    """y + delta: only biases move.  Ben Zaken et al. 2022, arXiv:2106.10199. A decoder without biases has nothing to
    train unless `new`."""

    kind = "bitfit"
    at = "linear,norm"
    new: bool = False
    """Also add biases where the base has none (they cannot be merged there)."""

    def stacks(self, place: Place) -> bool:
        return True

    def summed(self, parts: Sequence[tuple[float, Weights]]) -> Weights | None:
        return {"bias": sum(s * w["bias"] for s, w in parts)}  # type: ignore[dict-item]

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {"bias": torch.zeros(place.d_out)} if place.has_bias or self.new else {}

    @overwrites
    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        return y.add_(w["bias"]) if call.spare else y + w["bias"]


METHODS = (
    Method("full", Full, "full fine-tuning, as offsets from the frozen weights"),
    Method("bitfit", BitFit, "biases only"),
)
