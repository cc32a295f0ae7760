"""Adapters as flat vectors: what is kept of an adapter that is worn and not trained, and many of them side by side.

An adapter is *folded* once (`Edit.folded`: scales multiplied in, cosines taken), and its tensors are laid one after
another in one vector. Adapters that are cut alike stand in the rows of one matrix, put there by one copy each; at every
place a stack is then a batched tensor, a view of that matrix, and one batched formula serves all rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.core.edit import Edit, Weights
from inlay.core.place import Place

SHARED = ""
"""Where tensors stand that all places share."""


@dataclass(frozen=True, eq=False)
class Cut:
    """How an adapter lies in its vector."""

    edits: Mapping[str, Edit]
    """place key -> the folded edit."""
    wirings: Mapping[str, str]
    pieces: Mapping[str, Mapping[str, tuple[int, tuple[int, ...]]]]
    """place key, or SHARED -> tensor -> (offset, shape)."""
    size: int
    alike: Hashable
    """Equal for adapters that are cut alike."""
    stacks: bool
    """Whether every place's formula takes a stack of tensors."""

    def views(self, flat: Tensor) -> dict[str, Weights]:
        """place key -> tensors, as parts of one vector (size,), or of rows (n, size): matrices (n, p, q), vectors
        (n, 1, p)."""

        def part(at: int, shape: tuple[int, ...]) -> Tensor:
            own, wide = (
                flat[..., at : at + math.prod(shape)],
                shape if len(shape) > 1 or flat.dim() == 1 else (1, *shape),
            )
            return own.unflatten(-1, wide[::-1]).mT if _tall(shape) else own.unflatten(-1, wide)

        found = {key: {k: part(*p) for k, p in own.items()} for key, own in self.pieces.items()}
        shared = found.pop(SHARED, {})
        return {key: shared | own for key, own in found.items()}


@dataclass(frozen=True, eq=False)
class Folded:
    """An adapter as one vector."""

    cut: Cut
    flat: Tensor

    @functools.cached_property
    def at(self) -> Mapping[str, Weights]:
        """place key -> what its edit is given: views of `flat`, made when somebody asks: a stack never does."""
        return self.cut.views(self.flat)

    def loose(self) -> dict[str, Tensor]:
        """Its tensors by the names that `Host.tensors` gives."""
        shared = {f"shared/{k}": next(iter(self.at.values()))[k] for k in self.cut.pieces[SHARED]}
        own = {f"{p}/{k}": w[k] for p, w in self.at.items() for k in self.cut.pieces[p]}
        return shared | own

    @property
    def bytes(self) -> int:
        """Of memory."""
        return self.flat.nbytes


@torch.no_grad()
def fold(edit: Edit, places: Sequence[Place], tensors: Mapping[str, Weights], dtype: torch.dtype) -> Folded:
    """Lay an adapter out.

    Args:
        places: where it hangs, wirings included.
        tensors: place key -> what `edit` is given there; tensors that places share are the same objects everywhere.
        dtype: of the vector.
    """
    # In the vector's type before anything is computed: on a float64 base, cosines of float32 angles are float64 too.
    wide = {id(t): t.to(dtype) if t.is_floating_point() else t for w in tensors.values() for t in w.values()}
    tensors = {key: {k: wide[id(t)] for k, t in w.items()} for key, w in tensors.items()}
    first = tensors[places[0].key]
    shared = {k: t for k, t in first.items() if len(places) > 1 and all(tensors[p.key].get(k) is t for p in places)}
    edits: dict[str, Edit] = {}
    pieces: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {SHARED: {}}
    parts: list[Tensor] = []
    at = 0
    for place in places:
        edits[place.key], made = edit.folded(tensors[place.key], place)
        pieces[place.key] = {}
        for k, t in made.items():
            home = pieces[SHARED if shared.get(k) is t else place.key]
            if k not in home:
                home[k] = at, tuple(t.shape)
                parts.append((t.mT if _tall(t.shape) else t).reshape(-1))
                at += t.numel()
    wirings = {p.key: p.wiring for p in places}
    alike = tuple((p.key, p.wiring, edits[p.key], tuple(pieces[p.key].items())) for p in places)
    stacks = not pieces[SHARED] and all(edits[p.key].stacks(p) for p in places)
    cut = Cut(edits, wirings, pieces, at, alike, stacks)
    return Folded(cut, torch.cat(parts).to(dtype))


def _tall(shape: tuple[int, ...]) -> bool:
    """Whether a tensor stands transposed in its vector: batched products with few inner features are five times faster
    when the long side is the contiguous one."""
    return len(shape) == 2 and shape[0] > shape[1]


@dataclass(eq=False)
class Stack:
    """Adapters that are cut alike, one to a row; some rows of the batch wear it."""

    cut: Cut
    rows: Tensor | None
    """Rows of the batch (n,); None: all of them, in order."""
    span: slice | None
    """The same rows where they are neighbours."""
    at: Mapping[str, Weights]
    """place key -> stacked tensors."""


@dataclass(eq=False)
class Stacks:
    """The matrices behind stacks, kept from one plan to the next: a new plan writes only the rows that changed."""

    room: int
    """Bytes that they may take."""
    _held: dict[Hashable, tuple[Tensor, list[Folded | None]]] = field(default_factory=dict)
    _views: dict[Hashable, tuple[int, dict[str, Weights]]] = field(default_factory=dict)

    def fits(self, wanted: Mapping[Hashable, list[Folded]]) -> bool:
        """Whether these stacks (key -> adapter of each row) find room."""
        return sum(len(own) * own[0].bytes for own in wanted.values()) <= self.room

    def fill(self, wanted: Mapping[Hashable, list[Folded]]) -> dict[Hashable, dict[str, Weights]]:
        """The same, stacked: key -> place key -> tensors. What an earlier call gave may be overwritten."""
        found = {}
        for old in [k for k in self._held if k not in wanted]:
            del self._held[old], self._views[old]
        for key, own in wanted.items():
            flat, stood = self._held.get(key, (None, []))
            if flat is None or len(own) > len(flat):
                # Under inference_mode(False): a plan made while evaluating may serve outside of it.
                with torch.inference_mode(False):
                    flat, stood = own[0].flat.new_empty(len(own), own[0].cut.size), [None] * len(own)
                self._held[key] = flat, stood
                self._views.pop(key, None)
            for i, one in enumerate(own):
                if stood[i] is not one:
                    flat[i].copy_(one.flat)
                    stood[i] = one
            if self._views.get(key, (0,))[0] != len(own):
                self._views[key] = len(own), own[0].cut.views(flat[: len(own)])
            found[key] = self._views[key][1]
        return found
