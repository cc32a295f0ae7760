"""A plan made ready: its routes for batches of one size, in segments and in stacks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.edit import phases
from inlay.core.fold import Folded, fold
from inlay.core.room import plan_room
from inlay.core.route import Route, route, shares, spread, stacked

if TYPE_CHECKING:
    from inlay.core.host import Host

MANY = 4
"""Rows an adapter, on average, from which `auto` sends segments: a product of their own is then as fast as a row's part
in a product of all, and reads the adapter once."""


class Folds:
    """Hung adapters, folded: kept while their tensors stay as they are.

    A write through `Tensor.data` leaves no mark on a tensor. So all is folded anew by `Host.use`, after a forward with
    gradients, and when a tensor's version says so; within `Host.steady` only by the last two.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[object], Folded]] = {}

    def get(self, host: Host, name: str) -> Folded:
        """The adapter as it is now."""
        if (shelved := host.shelf.get(name)) is not None:
            return shelved
        versions, kept = _versions(host.tensors(name).values()), self._kept.get(name)
        if kept is None or kept[0] != versions:
            with torch.inference_mode(False):
                places = [s.places[name] for s in host.sites.values() if name in s.places]
                made = fold(host.edits[name], places, host.by_place(name), host.shelf.dtype)
            self._kept[name] = kept = versions, made
        return kept[1]

    def forget(self) -> None:
        """Whatever was kept may be out of date."""
        self._kept.clear()


def _versions(tensors: Iterable[Tensor]) -> list[object]:
    # Tensors made under inference_mode count no versions: a fresh object is like nothing kept.
    return [object() if t.is_inference() else (id(t), t._version) for t in tensors]


class Ready:
    """The host's present plan, for batches of so many rows."""

    def __init__(self, host: Host, batch: int):
        self.batch = batch
        self.whole = spread(host.plan, batch)
        with torch.inference_mode(False):  # a plan made while evaluating may be trained under later
            self.segments = route(host.plan, host.order, batch, host.device)
            self.room = plan_room(self.whole, host.edits, host.device)
        if any(phases(host.edits[n])[0] for names in self.whole for n in names):
            for site in host.sites.values():
                site.listen(self.segments.steps)
        self._stacked: Route | None = None
        self._of: list[Folded] | None = None
        # A compiled graph can only find stacks, not make them. Else they are made by the first forward that wants them:
        # packed forwards, and the plan that a with-block returns to, may never do.
        if host.strategy == "stack" and not torch.is_grad_enabled():
            self._stack(host)

    def route(self, host: Host, training: bool) -> Route:
        """For a forward."""
        if torch.is_grad_enabled():
            host.folds.forget()
            return self.segments
        if training:
            return self.segments
        if not torch.compiler.is_compiling():
            self._stack(host)
        return self._stacked or self.segments

    def _stack(self, host: Host) -> None:
        # A compiled graph, which asks for `stack`, must not depend on who sits by whom.
        each = shares(self.whole) if host.strategy == "auto" else 1
        worn = sum(map(len, self.whole)) // each
        if len(self.segments.steps) < 2 or not (
            host.strategy == "stack" or (host.strategy == "auto" and worn < MANY * len(self.segments.steps))
        ):
            return
        now = [host.folds.get(host, s.name) for s in self.segments.steps]  # type: ignore[union-attr]
        if self._of is None or any(a is not b for a, b in zip(self._of, now, strict=True)):
            by_name = {s.name: one for s, one in zip(self.segments.steps, now, strict=True)}  # type: ignore[union-attr]
            self._of = now
            self._stacked = stacked(self.segments, self.whole, host.order, by_name.__getitem__, host.stacks, each)
