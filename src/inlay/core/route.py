"""Which row of a batch wears which adapters, and how rows are sent through edits.

A route is a list of steps: a *segment* is one adapter and the rows that wear it; a *stack* is many adapters that are
cut alike, one to a row, and one batched formula (`inlay.core.fold`). Four strategies make steps of a plan:

- `segments`: a step per adapter. It takes its rows out, edits them and puts them back;
- `select`: the same, but every adapter sees every row and keeps its own: more work, but shapes never depend on the plan
  and each row is the same to the last bit as alone in a batch of that shape;
- `stack`: a stack wherever the methods allow it, while nothing is trained;
- `auto`: stacks where adapters have few rows each and nothing is trained, and segments for all else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights
from inlay.core.errors import InlayError, unknown
from inlay.core.fold import Folded, Stack, Stacks

if TYPE_CHECKING:
    from inlay.core.layout import Layout

Worn = tuple[str, ...]
"""What one row wears: names of adapters, none for the bare model."""
STRATEGIES = ("auto", "segments", "select", "stack")


@dataclass(frozen=True, eq=False)
class Segment:
    """One adapter and the rows that wear it."""

    name: str
    rows: Tensor | None
    """Which rows (n,); None: every row."""
    span: slice | None
    """The same where they are neighbours."""
    mine: Tensor
    """The same as a mask (B,)."""

    def only(self, where: Tensor) -> Segment:
        """The same among these rows."""
        mine = self.mine[where]
        return Segment(self.name, None if self.rows is None else mine.nonzero()[:, 0], None, mine)


Step = Segment | Stack


@dataclass(frozen=True)
class Route:
    """One forward's routing; immutable, so that gradient checkpointing can replay the one a layer belongs to."""

    steps: tuple[Step, ...] = ()
    """In the order in which they are applied."""
    batch: int = 1
    first: Mapping[str, Tensor] = field(default_factory=dict)
    """positional adapter -> column where its reserved columns begin (B,)."""
    seen: int = 0
    training: bool = False
    layout: Layout | None = None
    """Set in a packed forward: rows are then single tokens, R W of them."""
    side: Mapping[str, Tensor] = field(default_factory=dict)

    def call(self, step: Step, place) -> Call:
        """The call as a step sees it, all rows."""
        first = self.first.get(step.name) if isinstance(step, Segment) else None
        return Call(place, self.training, self.seen, first, self.side)

    def only(self, where: Tensor) -> Route:
        """The same for some of the rows (of a packed batch: some of its tokens), each now a row of its own."""
        if any(isinstance(s, Stack) for s in self.steps):
            raise InlayError("rows cannot be picked from stacks: packed batches are routed in segments")
        steps = tuple(s.only(where) for s in self.steps if isinstance(s, Segment))
        first, side = ({k: v[where] for k, v in t.items()} for t in (self.first, self.side))
        return replace(self, steps=steps, batch=len(where), first=first, side=side, layout=None)


def read_plan(plan: Sequence[object], known: Mapping[str, Edit]) -> tuple[Worn, ...]:
    """Normalise a plan: each entry a name, None, `a+b`, or a tuple of names (worn together)."""
    rows = []
    for entry in plan:
        names = () if entry is None else tuple(entry.split("+")) if isinstance(entry, str) else tuple(entry)  # type: ignore
        for name in names:
            if name not in known:
                raise unknown("adapter", name, known, "Hang it first with add() or load().")
        if len(set(names)) < len(names):
            raise InlayError(f"the row plan {entry!r} names an adapter twice")
        rows.append(names)
    return tuple(rows)


def spread(plan: tuple[Worn, ...], batch: int) -> tuple[Worn, ...]:
    """The plan for a batch of this many rows: one entry serves all, and beam search repeats each row."""
    if batch % len(plan):
        raise InlayError(
            f"the plan names {len(plan)} rows but the batch has {batch}; name one adapter per row, or one for all"
        )
    return tuple(names for names in plan for _ in range(batch // len(plan)))


def _segment(name: str, rows: Sequence[int], batch: int, device: torch.device) -> Segment:
    mine = torch.zeros(batch, dtype=torch.bool)
    where = torch.tensor(rows)
    mine[where] = True
    whole = len(rows) == batch
    return Segment(name, None if whole else where.to(device), None if whole else _span(rows), mine.to(device))


def _span(rows: Sequence[int]) -> slice | None:
    neighbours = rows[-1] - rows[0] + 1 == len(rows)
    return slice(rows[0], rows[-1] + 1) if neighbours else None


def _wearers(whole: Sequence[Worn]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, names in enumerate(whole):
        for n in names:
            found.setdefault(n, []).append(row)
    return found


def route(plan: tuple[Worn, ...], order: Mapping[str, int], batch: int, device: torch.device) -> Route:
    """Turn a plan into segments. `order` keeps one compiled graph for every plan over the same adapters."""
    wearers = _wearers(spread(plan, batch))
    return Route(tuple(_segment(n, wearers[n], batch, device) for n in sorted(wearers, key=order.__getitem__)), batch)


def route_packed(plan: tuple[Worn, ...], order: Mapping[str, int], layout: Layout) -> Route:
    """The same for the tokens of a packed batch; the plan names one entry per sequence, or one for all."""
    owner = layout.owner_RW.flatten()
    by_sequence = route(plan, order, len(layout.length_N), owner.device)
    stands = owner >= 0
    steps = []
    for s in by_sequence.steps:
        assert isinstance(s, Segment)
        mine = s.mine[owner.clamp(min=0)] & stands
        steps.append(Segment(s.name, None if s.rows is None else mine.nonzero()[:, 0], None, mine))
    return Route(tuple(steps), len(owner), first=layout.first, layout=layout)


def stacked(
    by_segments: Route,
    whole: Sequence[Worn],
    order: Mapping[str, int],
    folded: Callable[[str], Folded],
    stacks: Stacks,
) -> Route | None:
    """The same rows with stacks for adapters that are cut alike; None where there is nothing to stack, or no room.

    A row's first adapters come before all second ones, so that each row meets its own in the order of the segments.
    """
    segments = {s.name: s for s in by_segments.steps if isinstance(s, Segment)}
    if len(segments) < 2:
        return None
    parts = {n: folded(n) for n in segments}
    device = next(iter(segments.values())).mine.device
    ranked = [sorted(names, key=order.__getitem__) for names in whole]
    wanted: dict[Hashable, list[Folded]] = {}
    plans: list[tuple[Hashable | str, list[int]]] = []
    for level in range(max(map(len, ranked))):
        groups: dict[Hashable, list[int]] = {}
        for row, names in enumerate(ranked):
            if level < len(names):
                one = parts[names[level]]
                groups.setdefault(one.cut.alike if one.cut.stacks else names[level], []).append(row)
        # In an order that does not depend on who wears what: a compiled graph holds for every plan over these adapters.
        first = {key: min(order[ranked[row][level]] for row in rows) for key, rows in groups.items()}
        for key, rows in sorted(groups.items(), key=lambda group: first[group[0]]):
            if isinstance(key, str):
                plans.append((key, rows))
            else:
                wanted[level, key] = [parts[ranked[row][level]] for row in rows]
                plans.append(((level, key), rows))
    if not wanted or not stacks.fits(wanted):
        return None
    filled = stacks.fill(wanted)
    steps: list[Step] = []
    for key, rows in plans:
        if isinstance(key, str):
            steps.append(_segment(key, rows, by_segments.batch, device))
            continue
        everyone = len(rows) == by_segments.batch
        where = None if everyone else torch.tensor(rows, device=device)
        steps.append(Stack(wanted[key][0].cut, where, None if everyone else _span(rows), filled[key]))
    return replace(by_segments, steps=tuple(steps))


Job = tuple[Step, Edit, Weights, Call]


def apply(strategy: str, jobs: Sequence[Job], x: Tensor, y: Tensor | None) -> Tensor:
    """Run several adapters at one place: `before`, or `after` if there is y (B, T, D_out); x (B, T, D_in) or ids."""
    out = x if y is None else y
    mine = False
    for step, edit, w, call in jobs:
        fn: Callable[..., Tensor] = edit.before if y is None else edit.after
        args = (out,) if y is None else (x, out)
        if step.rows is None:
            out, mine = fn(w, *args, call), False
        elif strategy == "select" and isinstance(step, Segment):
            out, mine = torch.where(step.mine.view(-1, *[1] * (out.dim() - 1)), fn(w, *args, call), out), True
        elif not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            where = step.span or step.rows
            out, mine = out if mine else out.clone(), True
            own = call.take(where)
            out[where] = fn(w, out[where], own) if y is None else fn(w, x[where], out[where], own)
        else:
            out = out.index_copy(0, step.rows, fn(w, *(a[step.rows] for a in args), call.take(step.rows)))
    return out
