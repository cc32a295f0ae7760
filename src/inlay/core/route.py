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

import itertools
import math
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
    from inlay.core.place import Place

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

    def call(self, step: Step, place: Place, spare: bool = False) -> Call:
        """The call as a step sees it, all rows."""
        first = self.first.get(step.name) if self.first and isinstance(step, Segment) else None
        return Call(place, self.training, self.seen, first, self.side, spare)

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
    each: int = 1,
) -> Route | None:
    """The same rows with stacks for adapters that are cut alike, one for each so many rows (see `shares`); None where
    there is nothing to stack, or no room.

    A row's first adapters come before all second ones, so that each row meets its own in the order of the segments.
    """
    segments = {s.name: s for s in by_segments.steps if isinstance(s, Segment)}
    if len(segments) < 2:
        return None
    parts = {n: folded(n) for n in segments}
    device = next(iter(segments.values())).mine.device
    ranked = [sorted(names, key=order.__getitem__) for names in whole[::each]]
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
            steps.append(_segment(key, _each(rows, each), by_segments.batch, device))
            continue
        rows = _each(rows, each)
        everyone = len(rows) == by_segments.batch
        where = None if everyone else torch.tensor(rows, device=device)
        steps.append(Stack(wanted[key][0].cut, where, None if everyone else _span(rows), filled[key], each))
    return replace(by_segments, steps=tuple(steps))


def shares(whole: Sequence[Worn]) -> int:
    """The largest number n such that the batch is runs of n, 2n ... rows that wear the same: a stack then holds an
    adapter for each n rows (the beams of a prompt, say)."""
    return math.gcd(*(len(list(run)) for _, run in itertools.groupby(whole)))


def _each(rows: Sequence[int], n: int) -> list[int]:
    return [n * row + i for row in rows for i in range(n)]


Job = tuple[Step, Edit, Weights, "Place"]


def apply(now: Route, strategy: str, jobs: Sequence[Job], x: Tensor, y: Tensor | None, spare: bool = False) -> Tensor:
    """Run several adapters at one place: `before`, or `after` if there is y (B, T, D_out); x (B, T, D_in) or ids.

    Args:
        spare: whether what is edited is nobody else's and may be written over.
    """
    out = x if y is None else y
    writes = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    owns = writes and not torch.is_autocast_enabled(out.device.type)
    mine = spare and owns
    for job in jobs:
        step, given = job[0], (out,) if y is None else (x, out)
        if step.rows is None:
            new = _said(now, job, given, spare=mine)
            out, mine = new, mine and new is out
        elif strategy == "select" and isinstance(step, Segment):
            here = step.mine.view(-1, *[1] * (out.dim() - 1))
            out, mine = torch.where(here, _said(now, job, given), out), owns
        elif writes:
            where = step.span or step.rows
            out, mine = out if mine else out.clone(), True
            part = out[where]
            new = _said(now, job, (part,) if y is None else (x[where], part), where, spare=owns)
            if new is not part or step.span is None:
                out[where] = new
        else:
            new = _said(now, job, tuple(t[step.rows] for t in given), step.rows)
            out = out.index_copy(0, step.rows, new)
    return out


def _said(
    now: Route, job: Job, given: tuple[Tensor, ...], where: Tensor | slice | None = None, spare: bool = False
) -> Tensor:
    """What one step says of its rows: `before` of (x,), `after` of (x, y)."""
    step, edit, w, place = job
    fn: Callable[..., Tensor] = edit.before if len(given) == 1 else edit.after
    call = now.call(step, place, spare and hasattr(fn, "overwrites"))
    call = call if where is None else call.take(where)
    if isinstance(step, Segment) or step.each == 1:
        return fn(w, *given, call)
    edited, shared = given[-1], [step.shared(t) for t in given]
    new = fn(w, *shared, call)
    return edited if new is shared[-1] and edited.is_contiguous() else new.reshape(edited.shape)
