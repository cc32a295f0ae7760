"""Which row of a batch wears which adapters, and three ways to send rows through edits.

`gather` takes each adapter's rows out, edits them and puts them back: least work, the default.
`select` lets every adapter see every row and keeps its own: more work, but shapes never depend on the plan and each row
is the same to the last bit as alone in a batch of that shape.
`stack` maps one edit over the rows of all adapters with equal settings (`torch.vmap`): one kernel however many
adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from inlay.core.edit import Call, Edit, Weights
from inlay.core.errors import InlayError, unknown

if TYPE_CHECKING:
    from inlay.core.layout import Layout

Worn = tuple[str, ...]
"""What one row wears: names of adapters, none for the bare model."""
STRATEGIES = ("gather", "select", "stack")


@dataclass(frozen=True)
class Route:
    """One forward's routing; immutable, so that gradient checkpointing can replay the one a layer belongs to."""

    rows: Mapping[str, Tensor | None] = field(default_factory=dict)
    """adapter -> the rows that wear it, in the order in which adapters were hung; None: every row."""
    mine: Mapping[str, Tensor] = field(default_factory=dict)
    """adapter -> the same as a mask (B,)."""
    batch: int = 1
    disjoint: bool = True
    """No row wears two adapters."""
    first: Mapping[str, Tensor] = field(default_factory=dict)
    """positional adapter -> column where its reserved columns begin (B,)."""
    seen: int = 0
    training: bool = False
    layout: Layout | None = None
    """Set in a packed forward: rows are then single tokens, R W of them."""
    side: Mapping[str, Tensor] = field(default_factory=dict)

    def call(self, name: str, place) -> Call:
        """The call as the adapter `name` sees it, all rows."""
        return Call(place, self.training, self.seen, self.first.get(name), self.side)

    def only(self, where: Tensor) -> Route:
        """The same for some of the rows (of a packed batch: some of its tokens), each now a row of its own."""
        mine = {n: m[where] for n, m in self.mine.items()}
        rows = {n: None if r is None else mine[n].nonzero()[:, 0] for n, r in self.rows.items()}
        first, side = ({k: v[where] for k, v in t.items()} for t in (self.first, self.side))
        return replace(self, rows=rows, mine=mine, batch=len(where), first=first, side=side, layout=None)


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


def route(plan: tuple[Worn, ...], order: Sequence[str], batch: int, device: torch.device) -> Route:
    """Turn a plan into row indices. `order` keeps one compiled graph for every plan over the same adapters."""
    whole = spread(plan, batch)
    wears = {n: [n in names for names in whole] for n in order if any(n in names for names in plan)}
    mine = {n: torch.tensor(w, device=device) for n, w in wears.items()}
    rows = {n: None if all(w) else mine[n].nonzero()[:, 0] for n, w in wears.items()}
    return Route(rows, mine, batch, all(len(names) < 2 for names in whole))


def route_packed(plan: tuple[Worn, ...], order: Sequence[str], layout: Layout) -> Route:
    """The same for the tokens of a packed batch; the plan names one entry per sequence, or one for all."""
    owner = layout.owner_RW.flatten()
    by_sequence = route(plan, order, len(layout.length_N), owner.device)
    stands = owner >= 0
    mine = {n: m[owner.clamp(min=0)] & stands for n, m in by_sequence.mine.items()}
    rows = {n: None if r is None else mine[n].nonzero()[:, 0] for n, r in by_sequence.rows.items()}
    return Route(rows, mine, len(owner), by_sequence.disjoint, first=layout.first, layout=layout)


Job = tuple[str, Edit, Weights, Call]


def apply(strategy: str, phase: str, jobs: list[Job], now: Route, x: Tensor, y: Tensor | None) -> Tensor:
    """Run one phase of several adapters at one place; x (B, T, D_in) or ids, y (B, T, D_out) or None in `before`."""
    out = x if y is None else y
    if strategy == "stack" and len(jobs) > 1 and now.disjoint:
        groups: dict[tuple, list[Job]] = {}
        for job in jobs:
            shapes = tuple((k, v.shape) for k, v in job[2].items())
            groups.setdefault((job[1], job[3].place.wiring, shapes), []).append(job)
        for group in groups.values():
            out = (
                _stacked(phase, group, now, x, y, out)
                if len(group) > 1
                else _each(phase, group, now, x, y, out, "gather")
            )
        return out
    return _each(phase, jobs, now, x, y, out, strategy)


def _each(phase: str, jobs: list[Job], now: Route, x: Tensor, y: Tensor | None, out: Tensor, strategy: str) -> Tensor:
    for name, edit, w, call in jobs:
        fn: Callable[..., Tensor] = getattr(edit, phase)
        args = (out,) if y is None else (x, out)
        rows = now.rows[name]
        if rows is None:
            out = fn(w, *args, call)
        elif strategy == "select":
            out = torch.where(now.mine[name].view(-1, *[1] * (out.dim() - 1)), fn(w, *args, call), out)
        else:
            out = out.index_copy(0, rows, fn(w, *(a[rows] for a in args), call.take(rows)))
    return out


def _stacked(phase: str, jobs: list[Job], now: Route, x: Tensor, y: Tensor | None, out: Tensor) -> Tensor:
    everyone = torch.arange(now.batch, device=out.device)
    per_job = [everyone if (r := now.rows[name]) is None else r for name, *_ in jobs]
    rows = torch.cat(per_job)
    slot = torch.cat([torch.full_like(r, i) for i, r in enumerate(per_job)])
    w = {k: torch.stack([job[2][k] for job in jobs])[slot] for k in jobs[0][2]}
    calls = [job[3].take(r) for job, r in zip(jobs, per_job, strict=True)]
    edit, call = jobs[0][1], calls[0]
    first = None if call.first_B is None else torch.cat([c.first_B for c in calls])  # type: ignore[misc]
    side = {k: v[rows] for k, v in now.side.items()}
    args = (out,) if y is None else (x, out)

    def one_row(w, first, side, *args):
        mine = replace(call, first_B=None if first is None else first[None], side={k: v[None] for k, v in side.items()})
        return getattr(edit, phase)(w, *(a[None] for a in args), mine)[0]

    dims = (0, None if first is None else 0, 0, *[0] * len(args))
    new = torch.vmap(one_row, in_dims=dims, randomness="different")(w, first, side, *(a[rows] for a in args))
    return out.index_copy(0, rows, new)
