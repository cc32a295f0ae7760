"""Folding the next adapter of a kind: in runs of places that are alike, and not place by place.

A saved adapter of 56 places is over a hundred small tensors, and every call for each of them is dearer than what it
computes. But files of one kind of adapter have one layout, and in it the layers of a decoder follow each other at a
constant distance: all layers' tensors of one role are one strided view of the file, which a method that folds its
tensors one by one folds as a stack just as well. Which methods do is not declared but tried (`recipe`), once a kind.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.fold import Cut, Folded, fold, tall
from inlay.core.held import Layout
from inlay.core.place import Place


@dataclass(frozen=True)
class Cells:
    """Where a run's tensors of one name lie, as a stack (places, *shape)."""

    start: int
    size: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The stack itself."""
        return flat.as_strided(self.size, self.strides, flat.storage_offset() + self.start)


@dataclass(frozen=True)
class Run:
    """Places that are alike and lie at one distance."""

    first: Place
    given: Mapping[str, Cells]
    """Tensor -> where it lies in the file."""
    made: Mapping[str, Cells]
    """Folded tensor -> where it lies in the vector."""


@dataclass(frozen=True)
class Recipe:
    """How adapters of one kind, in files of one layout, are folded."""

    edit: Edit
    cut: Cut
    runs: Sequence[Run]

    @torch.no_grad()
    def fold(self, data: Tensor) -> Folded:
        """As `inlay.core.fold.fold`, from the tensors of a file as one vector."""
        flat = torch.empty(self.cut.size, dtype=data.dtype, device=data.device)
        for run in self.runs:
            _, made = self.edit.folded({k: cells.of(data) for k, cells in run.given.items()}, run.first)
            for k, t in made.items():
                run.made[k].of(flat).copy_(t)
        return Folded(self.cut, flat)


def recipe(
    edit: Edit, places: Sequence[Place], layout: Layout, dtype: torch.dtype, device: torch.device
) -> Recipe | None:
    """A recipe for the tensors of a layout, which are `edit`'s at these places; None if there is none.

    Tried with random tensors: only a fold that takes a stack apart place by place, and looks at nothing in which the
    places of a run differ, comes to what `fold` does, bit for bit.
    """
    if layout.dtype is None or not layout.dtype.is_floating_point or not layout.numbers:
        return None
    shapes: dict[str, dict[str, torch.Size]] = {p.key: {} for p in places}
    for name, (_, shape, _) in layout.entries.items():
        key, _, k = name.rpartition("/")
        if key not in shapes:  # what places share
            return None
        shapes[key][k] = shape
    begin = {name: (at - layout.begin) // layout.dtype.itemsize for name, (_, _, at) in layout.entries.items()}
    data = torch.rand(layout.numbers, generator=torch.Generator().manual_seed(0)).add_(0.5).to(device, dtype)
    tensors = {
        key: {k: data[begin[f"{key}/{k}"] :][: shape.numel()].view(shape) for k, shape in own.items()}
        for key, own in shapes.items()
    }
    want = fold(edit, places, tensors, dtype)
    made = Recipe(edit, want.cut, tuple(_runs(places, shapes, begin, want.cut)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same = torch.equal(made.fold(data).flat, want.flat)
    except Exception:  # shapes that do not go together, in whatever way a method finds out
        return None
    return made if same else None


def _runs(
    places: Sequence[Place], shapes: Mapping[str, Mapping[str, torch.Size]], begin: Mapping[str, int], cut: Cut
) -> Iterator[Run]:
    alike: dict[Hashable, list[Place]] = {}
    for p in places:
        laid = tuple((k, shape) for k, (_, shape) in cut.pieces[p.key].items())
        alike.setdefault((p.role, p.wiring, tuple(shapes[p.key].items()), laid), []).append(p)
    for own in alike.values():
        given, made = shapes[own[0].key], cut.pieces[own[0].key]
        starts = [[*(begin[f"{p.key}/{k}"] for k in given), *(cut.pieces[p.key][k][0] for k in made)] for p in own]
        for lo, hi, steps in _even(starts):
            cells = [
                _cells(start, step, hi - lo, shape, laid and tall(shape))
                for start, step, (shape, laid) in zip(
                    starts[lo],
                    steps,
                    [*((shape, False) for shape in given.values()), *((shape, True) for _, shape in made.values())],
                    strict=True,
                )
            ]
            yield Run(own[lo], dict(zip(given, cells, strict=False)), dict(zip(made, cells[len(given) :], strict=True)))


def _even(starts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(from, to, distances): the parts of a list of offsets in which each is as far behind the one before."""
    apart = [[b - a for a, b in zip(one, other, strict=True)] for one, other in pairwise(starts)]
    lo = 0
    while lo < len(starts):
        hi = lo + 1
        while hi < len(starts) and apart[hi - 1] == apart[lo] and min(apart[lo]) > 0:
            hi += 1
        yield lo, hi, apart[lo] if hi > lo + 1 else [0] * len(starts[lo])
        lo = hi


def _cells(start: int, step: int, places: int, shape: Sequence[int], transposed: bool) -> Cells:
    inner = (1, shape[0]) if transposed else tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return Cells(start, (places, *shape), (step, *inner))
