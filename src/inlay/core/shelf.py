"""Adapters that are worn and neither trained nor read: folded, nothing of them in the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.errors import InlayError
from inlay.core.fold import Folded, fold
from inlay.core.place import Place

if TYPE_CHECKING:
    from inlay.core.host import Host

Shapes = Mapping[str, torch.Size]


class Shelf(dict[str, Folded]):
    """A host's shelved adapters by name."""

    def __init__(self, host: Host):
        super().__init__()
        self._host = host
        self._expected: dict[tuple, tuple[list[Place], Shapes]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of folded adapters: float32, or float64 on a float64 base."""
        return torch.promote_types(torch.float32, self._host.dtype)

    def place(
        self, name: str, edit: Edit, at: str | tuple[str, ...] | None, tensors: Mapping[str, Tensor], check: bool
    ) -> None:
        """Fold an adapter and keep it; see `Host.shelve`."""
        host, device = self._host, self._host.device
        places = self._checked(name, edit, at, tensors) if check else host._places(host._spots(edit, at))
        everywhere = {k.removeprefix("shared/"): t.to(device) for k, t in tensors.items() if k.startswith("shared/")}
        own: dict[str, dict[str, Tensor]] = {p.key: {} for p in places}
        for key, t in tensors.items():
            place, _, k = key.rpartition("/")
            if place != "shared":
                own[place][k] = t.to(device)
        self[name] = fold(edit, places, {p: {**everywhere, **w} for p, w in own.items()}, self.dtype)

    def _checked(self, name: str, edit: Edit, at: str | tuple[str, ...] | None, tensors: Mapping) -> list[Place]:
        if (edit, at) not in self._expected:
            # Made once to learn the shapes: a thousand adapters of one kind are checked against one of them.
            places = self._host._places(self._host._spots(edit, at))
            common, made = self._host._start(edit, places, 0, torch.float32)
            shapes = {f"{p}/{k}": t.shape for p, w in {**made, "shared": common}.items() for k, t in w.items()}
            self._expected[edit, at] = [p for p in places if made[p.key] or common], shapes
        places, expected = self._expected[edit, at]
        same_shapes(name, expected, tensors)
        return places


def same_shapes(name: str, mine: Shapes, values: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly an adapter's."""
    problems = [f"missing {k}" for k in mine.keys() - values.keys()] + [
        f"unexpected {k}" for k in values.keys() - mine.keys()
    ]
    problems += [
        f"{k} is {tuple(values[k].shape)}, wanted {tuple(mine[k])}"
        for k in mine.keys() & values.keys()
        if values[k].shape != mine[k]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise InlayError(f"these tensors are not those of {name!r}: {'; '.join(sorted(problems)[:4])}{more}")
