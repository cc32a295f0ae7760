"""Beginnings that training examples share, computed once: the template around every prompt, mostly.

    [Below is an instruction ...] ─┬─ [What is 3 + 4? ...] ─ [7]
                                   └─ [What is ─┬─ 2 + 5? ...] ─ [7]
                                                └─ 9 - 1? ...] ─ [8]

What a token says depends on what stands before it and on nothing else; so alike beginnings have alike states, forward
and backward, until dropout or an edit treats their tokens differently. The last token of a prompt is never shared, for
its neighbour is learned: each example's loss is read from tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.compat.transformers import has_attention_interface
from inlay.core.host import Host
from inlay.core.layout import Layout
from inlay.engine.cache import dropped
from inlay.engine.example import IGNORED, unlearned
from inlay.engine.pack import takes_positions

LEAST = 8
"""Tokens that a beginning must have to be computed once for all."""


@dataclass
class Sequences:
    """Examples as sequences that may continue one another: what `inlay.engine.pack.pack` is given. The examples' own
    ends come last, in their order."""

    ids: list[list[int]]
    labels: list[list[int]]
    parents: list[int | None]

    def add(self, ids: list[int], labels: list[int], parent: int | None) -> int:
        """Its number."""
        self.ids.append(ids)
        self.labels.append(labels)
        self.parents.append(parent)
        return len(self.ids) - 1

    def places(self, layout: Layout, examples: int) -> list[Tensor]:
        """Where the tokens of each example stand in the flattened batch, from its first to its last."""
        here = [torch.arange(layout.index(n), layout.index(n) + own) for n, own in enumerate(layout.length_N)]
        for n, p in enumerate(self.parents):
            here[n] = here[n] if p is None else torch.cat((here[p], here[n]))
        return here[len(here) - examples :]

    @property
    def tokens(self) -> int:
        """What is computed."""
        return sum(map(len, self.ids))


def alike(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    ordered = [list(row) for row in rows]
    low, high = min(ordered), max(ordered)
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def beginning(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> int:
    """Tokens that all examples share and that are computed once; 0 if these are too few."""
    found = alike([_head(*e) for e in zip(ids, labels, strict=True)]) if len(ids) > 1 else 0
    return found if found >= LEAST else 0


def laid(host: Host, ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Sequences:
    """The examples as they are computed under the host's present plan: as a `tree`, where that is the same."""
    grown = tree(ids, labels)
    alone = all(p is None for p in grown.parents)
    return grown if alone or not refused(host) else whole(ids, labels)


def whole(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Sequences:
    """Each example by itself."""
    return Sequences(list(ids), list(labels), [None] * len(ids))


def tree(ids: Sequence[list[int]], labels: Sequence[list[int]]) -> Sequences:
    """What the examples begin with, each branch of `LEAST` tokens or more once, and how each one ends."""
    heads = [_head(*e) for e in zip(ids, labels, strict=True)]
    made = Sequences([], [], [])
    placed: list[tuple[int | None, int]] = [(None, 0)] * len(heads)

    def grow(group: list[int], parent: int | None, above: int) -> None:
        known = alike([heads[i] for i in group])
        if known - above >= LEAST:
            parent = made.add(heads[group[0]][above:known], [IGNORED] * (known - above), parent)
            above = known
        onwards: dict[int, list[int]] = {}
        for i in group:
            placed[i] = parent, above
            if len(heads[i]) > known:
                onwards.setdefault(heads[i][known], []).append(i)
        for own in onwards.values():
            if len(own) > 1:
                grow(own, parent, above)

    if len(heads) > 1:
        grow(list(range(len(heads))), None, 0)
    for row, own, (parent, above) in zip(ids, labels, placed, strict=True):
        made.add(row[above:], own[above:], parent)
    return made


def _head(ids: list[int], labels: list[int]) -> list[int]:
    """What may be shared of an example."""
    return ids[: max(0, unlearned(labels) - 1)]


def refused(host: Host, training: bool | None = None) -> str:
    """Why, under the host's present plan, alike beginnings are not computed once; empty if they may be.

    Args:
        training: whether the model trains; by default as it is now.
    """
    if not (has_attention_interface(host.model) and takes_positions(host.model)):
        return "this decoder is not told where a sequence goes on"
    if len(host.plan) > 1 or host.side:
        return "rows wear different adapters, or are given inputs of their own"
    worn = [host.edits[n] for n in host.plan[0]]
    if any(e.prompted for e in worn):
        return "edits of a prompt's last tokens treat alike tokens differently"
    training = host.model.training if training is None else training
    if training and (drawn := dropped(host.model) or next((e.kind for e in worn if e.draws), "")):
        return f"dropout is drawn for each example ({drawn})"
    return ""
