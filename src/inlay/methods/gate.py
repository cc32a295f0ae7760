"""A gate on any edit: what UniPELT adds to the methods it combines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights, phases
from inlay.core.errors import InlayError
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.product import rows_product
from inlay.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class Gated(Edit):
    """y + g(x) (edit(x, y) - y),  g(x) = sigmoid(v x + c), one number a token, from the layer's input.

    Mao et al. 2022 (UniPELT), arXiv:2110.07577, sec. 3.2, over any edit of a layer's output. v and c start at zero,
    so that g starts at 1/2. UniPELT itself is gated LoRA, a gated bottleneck and a prefix worn together:
    `use("prefix+gated-lora+gated-series")`; the paper gates its prefix too, by the mean over tokens, which an edit of
    single columns cannot see.
    """

    kind = "gated"
    edit: Edit = field(default_factory=LoRA)
    """The edit behind the gate."""

    def __post_init__(self) -> None:
        if phases(self.edit)[0] and self.edit.kind != "bottleneck" or self.edit.room:
            raise InlayError(f"a gate stands behind an edit of a layer's output; {self.edit.kind!r} is none")

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return self.edit.positional

    @property
    def draws(self) -> bool:
        return self.edit.draws

    @property
    def has_penalty(self) -> bool:
        return self.edit.has_penalty

    @property
    def has_after_step(self) -> bool:
        return self.edit.has_after_step

    def penalty(self, adapter: Mapping[str, Weights]) -> Tensor | None:
        return self.edit.penalty(adapter)

    def after_step(self, adapter: Mapping[str, Weights], step: int, total: int, state: dict[str, Tensor]) -> None:
        self.edit.after_step(adapter, step, total, state)

    def _inner(self, place: Place) -> Place:
        if self.edit.wirings and self.edit.wiring_of(place) == "input":
            raise InlayError(f"a gate stands behind an edit of a layer's output; {place.key!r} is edited at its input")
        return place

    def shared(self, places) -> dict[str, Tensor]:
        return self.edit.shared(places)

    def weights(self, place: Place) -> dict[str, Tensor]:
        if place.role == "embed":
            raise InlayError("a gate reads a layer's input features; leave the embedding out")
        return {
            **self.edit.weights(self._inner(place)),
            "gate": torch.zeros(1, place.d_in),
            "gate_bias": torch.zeros(1),
        }

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        edit, inner = self.edit.folded({k: t for k, t in w.items() if not k.startswith("gate")}, place)
        return Gated(edit=edit), {**inner, "gate": w["gate"], "gate_bias": w["gate_bias"]}

    def stacks(self, place: Place) -> bool:
        return self.edit.stacks(place)

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        g = torch.sigmoid(rows_product(x, w["gate"], w["gate_bias"]))
        return y + g * (self.edit.after(w, x, y, call) - y)


METHODS = (Method("gated", Gated, "an edit behind a gate (UniPELT); LoRA unless another is given from Python"),)
