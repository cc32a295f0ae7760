"""Edits of edits: weighted sums, and one edit after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights, phases
from inlay.core.errors import InlayError
from inlay.core.place import Place


def own_name(part: int, name: str) -> str:
    """The name in a composition of a part's tensor; constants keep their `_`."""
    return f"_{part}:{name}" if name.startswith("_") else f"{part}:{name}"


@dataclass(frozen=True, kw_only=True)
class Composed(Edit):
    """Several edits that are one: what sums and chains share."""

    edits: tuple[Edit, ...] = ()
    """The parts."""
    where: tuple[tuple[str, ...], ...] = ()
    """The places at which each of them hangs."""

    def __post_init__(self) -> None:
        if len(self.edits) != len(self.where) or not self.edits:
            raise InlayError(f"a composition needs parts and their places: {len(self.edits)} and {len(self.where)}")
        for edit in self.edits:
            if edit.room:
                raise InlayError(
                    f"{edit.kind!r} adds virtual tokens, and a {self.kind} of adapters has one set of columns; "
                    "let rows wear it beside the others: use('a+b')"
                )

    @property
    def wirings(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(w for e in self.edits for w in e.wirings))

    @property
    def positional(self) -> bool:  # type: ignore[override]
        return any(e.positional for e in self.edits)

    @property
    def prompted(self) -> bool:
        return any(e.prompted for e in self.edits)

    @property
    def draws(self) -> bool:
        return any(e.draws for e in self.edits)

    @property
    def has_penalty(self) -> bool:
        return any(e.has_penalty for e in self.edits)

    @property
    def has_after_step(self) -> bool:
        return any(e.has_after_step for e in self.edits)

    def tokenised(self, tokenizer: Any) -> Edit:
        return replace(self, edits=tuple(e.tokenised(tokenizer) for e in self.edits))

    def acts(self, place: Place) -> tuple[bool, bool]:
        return True, True  # each part is wired in its own way

    def here(self, place: Place, phase: int | None = None) -> Iterator[tuple[int, Edit]]:
        """The parts that hang at a place (and have a `before`, phase 0, or an `after`, 1)."""
        for i, edit in enumerate(self.edits):
            if place.key in self.where[i] and (phase is None or phases(edit)[phase]):
                yield i, edit

    def own(self, w: Weights, part: int) -> Weights:
        """A part's tensors by their own names."""
        starts = (f"{part}:", f"_{part}:")
        return {k.partition(":")[2]: t for k, t in w.items() if k.startswith(starts)}

    def shared(self, places: Sequence[Place]) -> dict[str, Tensor]:
        return {
            own_name(i, k): t
            for i, e in enumerate(self.edits)
            for k, t in e.shared([p for p in places if p.key in self.where[i]]).items()
        }

    def weights(self, place: Place) -> dict[str, Tensor]:
        return {own_name(i, k): t for i, e in self.here(place) for k, t in e.weights(place).items()}

    def shared_by_experts(self, place: Place) -> tuple[str, ...] | None:
        found: list[str] = []
        for i, edit in self.here(place):
            shared = edit.shared_by_experts(place)
            if shared is None:
                return None
            found += [own_name(i, k) for k in shared]
        return tuple(found)

    def idle(self, call: Call, tokens: int) -> bool:
        return all(e.idle(call, tokens) for e in self.edits)

    def _adapter(self, adapter: Mapping[str, Weights], part: int) -> dict[str, Weights]:
        """A part's tensors at the places where it hangs (place key -> its own names)."""
        return {key: self.own(w, part) for key, w in adapter.items() if key in self.where[part]}

    def penalty(self, adapter: Mapping[str, Weights]) -> Tensor | None:
        """Sum of the parts' penalties; the scales of a sum weigh outputs, not these."""
        terms = [e.penalty(self._adapter(adapter, i)) for i, e in enumerate(self.edits) if e.has_penalty]
        given = [t for t in terms if t is not None]
        return torch.stack(given).sum() if given else None

    def after_step(self, adapter: Mapping[str, Weights], step: int, total: int, state: dict[str, Tensor]) -> None:
        for i, edit in enumerate(self.edits):
            if edit.has_after_step:
                prefix = f"{i}:"
                own = {k.removeprefix(prefix): t for k, t in state.items() if k.startswith(prefix)}
                edit.after_step(self._adapter(adapter, i), step, total, own)
                state.update({prefix + k: t for k, t in own.items()})

    def fold_parts(self, w: Weights, place: Place) -> list[tuple[int, Edit, Weights]]:
        """(part, its folded edit, tensors) of those that hang at a place."""
        return [(i, *e.folded(self.own(w, i), place)) for i, e in self.here(place)]


@dataclass(frozen=True, kw_only=True)
class Sum(Composed):
    """y + sum_i s_i (edit_i(x, y) - y), and likewise x + sum_i s_i (edit_i(x) - x) before the layer.

    Where the parts are linear this is the weighted sum of their updates of the weight, W + sum_i s_i dW_i: of LoRAs, a
    LoRA of the summed rank with factors side by side (not a sum of factors, which is another update).
    """

    kind = "sum"
    scales: tuple[float, ...] = ()
    """s_i."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.scales) != len(self.edits):
            raise InlayError(f"a sum of {len(self.edits)} adapters needs as many weights, not {len(self.scales)}")

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        parts = self.fold_parts(w, place)
        edit = parts[0][1]
        if all(e == edit for _, e, _ in parts):
            made = edit.summed([(self.scales[i], own) for i, _, own in parts])
            if made is not None:
                return edit, made
        where = ((place.key,),) * len(parts)
        rest = Sum(edits=tuple(e for _, e, _ in parts), where=where, scales=tuple(self.scales[i] for i, _, _ in parts))
        return rest, {own_name(n, k): t for n, (_, _, own) in enumerate(parts) for k, t in own.items()}

    def before(self, w: Weights, x: Tensor, call: Call) -> Tensor:
        out = x
        for i, edit in self.here(call.place, phase=0):
            out = out + self.scales[i] * (edit.before(self.own(w, i), x, call) - x)
        return out

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        out = y
        for i, edit in self.here(call.place, phase=1):
            out = out + self.scales[i] * (edit.after(self.own(w, i), x, y, call) - y)
        return out


@dataclass(frozen=True, kw_only=True)
class Chain(Composed):
    """edit_n(... edit_1(.)): each edits what the one before it said, as on a row that wears them all."""

    kind = "chain"

    def folded(self, w: Weights, place: Place) -> tuple[Edit, Weights]:
        parts = self.fold_parts(w, place)
        if len(parts) == 1:
            return parts[0][1:]
        rest = Chain(edits=tuple(e for _, e, _ in parts), where=((place.key,),) * len(parts))
        return rest, {own_name(n, k): t for n, (_, _, own) in enumerate(parts) for k, t in own.items()}

    def before(self, w: Weights, x: Tensor, call: Call) -> Tensor:
        for i, edit in self.here(call.place, phase=0):
            x = edit.before(self.own(w, i), x, call)
        return x

    def after(self, w: Weights, x: Tensor, y: Tensor, call: Call) -> Tensor:
        for i, edit in self.here(call.place, phase=1):
            y = edit.after(self.own(w, i), x, y, call)
        return y


EDITS = (Sum, Chain)
