"""Adapters as flat vectors: what is kept of an adapter that is worn and not trained, and many of them side by side.

An adapter is *folded* once (`Edit.folded`: scales multiplied in, cosines taken), and its tensors are laid one after
another in one vector. Adapters that are cut alike stand in the rows of one matrix, put there by one copy each; at every
place a stack is then a batched tensor, a view of that matrix, and one batched formula serves all rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from inlay.core.edit import Edit, Weights
from inlay.core.experts import fold_weights
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
    lengths: tuple[int, ...]
    """Of the pieces, in their order in the vector."""
    constants: Weights
    """What all places share and nobody trains: not in the vector, but once in memory for all adapters that have it."""

    def views(self, flat: Tensor) -> dict[str, Weights]:
        """place key -> tensors, as parts of one vector (size,), or of rows (n, size): matrices (n, p, q), vectors
        (n, 1, p)."""

        def part(at: int, shape: tuple[int, ...]) -> Tensor:
            wide = shape if len(shape) > 1 or flat.dim() == 1 else (1, *shape)
            return _shaped(flat[..., at : at + math.prod(shape)], wide)

        found = {key: {k: part(*p) for k, p in own.items()} for key, own in self.pieces.items()}
        shared = found.pop(SHARED, {})
        return {key: {**own, **shared, **self.constants} for key, own in found.items()}


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
        first = next(iter(self.at.values()))
        shared = {f"shared/{k}": first[k] for k in (*self.cut.constants, *self.cut.pieces[SHARED])}
        own = {f"{p}/{k}": w[k] for p, w in self.at.items() for k in self.cut.pieces[p]}
        return shared | own

    @property
    def bytes(self) -> int:
        """Of memory, constants left out."""
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
    made = [(p, *fold_weights(edit, tensors[p.key], p)) for p in places]
    first = made[0][2]
    shared = {k: t for k, t in first.items() if len(made) > 1 and all(w.get(k) is t for _, _, w in made)}
    constants = {k: _constant(t) for k, t in shared.items() if k.startswith("_")}
    cut = _cut(made, {k: t for k, t in shared.items() if k not in constants}, constants)
    flat = torch.empty(cut.size, dtype=dtype, device=first[next(iter(first))].device)
    laid = [t for k, t in shared.items() if k not in constants]
    laid += [t for _, _, w in made for k, t in w.items() if k not in shared]
    for piece, t in zip(flat.split(cut.lengths), laid, strict=True):
        _shaped(piece, t.shape).copy_(t)
    return Folded(cut, flat)


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is told from others by being the same object."""

    tensor: Tensor


_CONSTANTS: WeakValueDictionary[Hashable, Constant] = WeakValueDictionary()
_CUTS: WeakValueDictionary[Hashable, Cut] = WeakValueDictionary()
"""A thousand adapters of one kind share one cut, and only the first of them makes it."""


def _constant(t: Tensor) -> Constant:
    key = t.shape, t.dtype, t.device, float(t.sum())
    if (known := _CONSTANTS.get(key)) is None or not torch.equal(known.tensor, t):
        known = _CONSTANTS[key] = Constant(t.clone())
    return known


def _cut(made: Sequence[tuple[Place, Edit, Weights]], shared: Weights, constants: Mapping[str, Constant]) -> Cut:
    """How folded tensors lie: what all places share first, then place by place."""
    once = shared.keys() | constants.keys()
    own = [(p.key, tuple((k, t.shape) for k, t in w.items() if k not in once)) for p, _, w in made]
    alike = (
        tuple((p.key, p.wiring, e, _stacks(e, p)) for p, e, _ in made),
        ((SHARED, tuple((k, t.shape) for k, t in shared.items())), *own),
        tuple(constants.items()),
    )
    if (known := _CUTS.get(alike)) is not None:
        return known
    pieces: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
    lengths: list[int] = []
    for key, shapes in alike[1]:
        pieces[key] = {}
        for k, shape in shapes:
            pieces[key][k] = sum(lengths), tuple(shape)
            lengths.append(shape.numel())
    stacks = not shared and all(_stacks(e, p) for p, e, _ in made)
    edits, wirings = {p.key: e for p, e, _ in made}, {p.key: p.wiring for p, _, _ in made}
    kept = {k: c.tensor for k, c in constants.items()}
    cut = _CUTS[alike] = Cut(edits, wirings, pieces, sum(lengths), alike, stacks, tuple(lengths), kept)
    return cut


def _stacks(edit: Edit, place: Place) -> bool:
    """Whether a formula takes a stack here; at experts, tensors are stacks already."""
    return not place.experts and edit.stacks(place)


def _shaped(piece: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A piece of a vector (..., p q) as a tensor (..., p, q)."""
    return piece.view(*piece.shape[:-1], *shape[::-1]).mT if tall(shape) else piece.view(*piece.shape[:-1], *shape)


def tall(shape: tuple[int, ...]) -> bool:
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
    each: int = 1
    """Neighbouring rows that share an adapter."""

    def shared(self, t: Tensor) -> Tensor:
        """(n, T, ...) of the rows -> (n / each, each T, ...) of the adapters."""
        return t.contiguous().view(-1, self.each * t.shape[1], *t.shape[2:])


@dataclass(eq=False)
class Stacks:
    """The matrices behind stacks, kept while there is room: a new plan writes only the rows that changed."""

    room: int
    """Bytes that they may take."""
    _held: dict[Hashable, tuple[Tensor, list[Callable[[], Folded | None]]]] = field(default_factory=dict)
    _views: dict[Hashable, tuple[int, dict[str, Weights]]] = field(default_factory=dict)

    def fits(self, wanted: Mapping[Hashable, list[Folded]]) -> bool:
        """Whether these stacks (key -> adapter of each row) find room."""
        return sum(len(own) * own[0].bytes for own in wanted.values()) <= self.room

    def fill(self, wanted: Mapping[Hashable, list[Folded]]) -> dict[Hashable, dict[str, Weights]]:
        """The same, stacked: key -> place key -> tensors. What an earlier call gave may be overwritten."""
        found = {}
        self._make_room(wanted)
        for key, own in wanted.items():
            flat, stood = self._held.pop(key, (None, []))
            if flat is None or len(own) > len(flat):
                # Under inference_mode(False): a plan made while evaluating may serve outside of it.
                with torch.inference_mode(False):
                    flat, stood = own[0].flat.new_empty(len(own), own[0].cut.size), [_nobody] * len(own)
                self._views.pop(key, None)
            self._held[key] = flat, stood  # at the end: the most recently used
            for i, one in enumerate(own):
                if stood[i]() is not one:
                    flat[i].copy_(one.flat)
                    stood[i] = ref(one)  # an adapter may leave while its copy stands here
            if self._views.get(key, (0,))[0] != len(own):
                self._views[key] = len(own), own[0].cut.views(flat[: len(own)])
            found[key] = self._views[key][1]
        return found

    def _make_room(self, wanted: Mapping[Hashable, list[Folded]]) -> None:
        """Let go of the least recently used, so that these fit beside what stays."""
        sizes = {key: flat.nbytes for key, (flat, _) in self._held.items()}
        sizes |= {key: max(len(own) * own[0].bytes, sizes.get(key, 0)) for key, own in wanted.items()}
        for old in [k for k in self._held if k not in wanted]:
            if sum(sizes.values()) <= self.room:
                break
            del self._held[old], self._views[old], sizes[old]


def _nobody() -> None:
    """In the place of a reference to the adapter that stands in a row: none does yet."""
