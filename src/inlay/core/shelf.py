"""Adapters that are worn and neither trained nor read: folded, nothing of them in the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.errors import InlayError
from inlay.core.fold import Folded, fold
from inlay.core.held import Held, Layout
from inlay.core.place import Place
from inlay.core.product import aligned
from inlay.core.recipe import Recipe, recipe

if TYPE_CHECKING:
    from inlay.core.host import Host

Shapes = Mapping[str, torch.Size]
KINDS = 256
"""Kinds of adapters that are remembered."""


@dataclass
class _Kind:
    """What adapters of one edit at the same places have in common."""

    places: list[Place]
    shapes: Shapes
    recipes: WeakKeyDictionary[Layout, Recipe | None] = field(default_factory=WeakKeyDictionary)
    """Layout of a file -> how its tensors are folded."""


class Shelf(dict[str, Folded]):
    """A host's shelved adapters by name."""

    def __init__(self, host: Host):
        super().__init__()
        self._host = host
        self._kinds: dict[tuple, _Kind] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of folded adapters: float32, or float64 on a float64 base."""
        return torch.promote_types(torch.float32, self._host.dtype)

    def place(
        self, name: str, edit: Edit, at: str | tuple[str, ...] | None, tensors: Mapping[str, Tensor], check: bool
    ) -> None:
        """Fold an adapter and keep it; see `Host.shelve`."""
        if not check:
            self[name] = self._fold(edit, self._host._places(self._host._spots(edit, at)), tensors)
            return
        kind = self._kind(edit, at)
        if isinstance(tensors, Held) and (how := self._recipe(name, edit, kind, tensors.layout)) is not None:
            flat = tensors.flat()
            if not torch.stack(flat.aminmax()).isfinite().all():  # ten times as fast as asking each
                only_finite(name, tensors)
            self[name] = how.fold(flat.to(self._host.device, self.dtype))
            return
        same_shapes(name, kind.shapes, {k: t.shape for k, t in tensors.items()})
        only_finite(name, tensors)
        self[name] = self._fold(edit, kind.places, tensors)

    def _recipe(self, name: str, edit: Edit, kind: _Kind, layout: Layout) -> Recipe | None:
        if layout not in kind.recipes:
            same_shapes(name, kind.shapes, {k: shape for k, (_, shape, _) in layout.entries.items()})
            kind.recipes[layout] = recipe(edit, kind.places, layout, self.dtype, self._host.device)
        return kind.recipes[layout]

    def _fold(self, edit: Edit, places: list[Place], tensors: Mapping[str, Tensor]) -> Folded:
        device = self._host.device
        # Views of a file start anywhere: what is multiplied must stand as it does in a hung adapter, for equal bits.
        tensors = {k: aligned(t.to(device)) for k, t in tensors.items()}
        everywhere = {k.removeprefix("shared/"): t for k, t in tensors.items() if k.startswith("shared/")}
        own: dict[str, dict[str, Tensor]] = {p.key: {} for p in places}
        for key, t in tensors.items():
            place, _, k = key.rpartition("/")
            if place != "shared":
                own[place][k] = t
        return fold(edit, places, {p: {**everywhere, **w} for p, w in own.items()}, self.dtype)

    def _kind(self, edit: Edit, at: str | tuple[str, ...] | None) -> _Kind:
        host, known = self._host, self._kinds.get((edit, at))
        if known is None or not all(p.key in host.sites for p in known.places):
            # Made once to learn the shapes: a thousand adapters of one kind are checked against one of them.
            places = host._places(host._spots(edit, at))
            common, made = host._start(edit, places, 0, torch.float32)
            shapes = {f"{p}/{k}": t.shape for p, w in {**made, "shared": common}.items() for k, t in w.items()}
            if len(self._kinds) >= KINDS:
                self._kinds.clear()
            known = self._kinds[edit, at] = _Kind([p for p in places if made[p.key] or common], shapes)
        return known


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinity, None if there is none."""
    return next((k for k, t in tensors.items() if not t.is_meta and not bool(t.isfinite().all())), None)


def only_finite(name: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse an adapter's tensors if one holds NaN or an infinity."""
    if bad := not_finite(tensors):
        raise InlayError(f"the adapter {name!r} is damaged: {bad} holds values that are not finite; use another copy")


def same_shapes(name: str, mine: Shapes, theirs: Shapes) -> None:
    """Refuse tensors that are not exactly an adapter's."""
    if mine == theirs:
        return
    problems = [f"missing {k}" for k in mine.keys() - theirs.keys()]
    problems += [f"unexpected {k}" for k in theirs.keys() - mine.keys()]
    problems += [
        f"{k} is {tuple(theirs[k])}, wanted {tuple(mine[k])}"
        for k in mine.keys() & theirs.keys()
        if theirs[k] != mine[k]
    ]
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    raise InlayError(f"these tensors are not those of {name!r}: {'; '.join(sorted(problems)[:4])}{more}")
