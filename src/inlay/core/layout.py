"""Packed batches: several sequences in one row, each blind to the others.

    row 0   [room room | a a a a][b b b][  ]
    row 1   [c c c][c1 c1][c2][         ]      c1 and c2 continue c, and do not see each other

A layout says where each of N sequences stands in R rows of W columns. A sequence may continue another one (`parent`):
it sees all of it, and its positions go on from there. Virtual tokens are laid out with the sequence that wears them, so
a packed forward is never widened. To the edits, a packed batch is a batch of R W rows of one token each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from inlay.core.edit import Edit
from inlay.core.errors import InlayError
from inlay.core.room import plan_room
from inlay.core.route import Worn


@dataclass(frozen=True)
class Family:
    """A sequence and all that continue it: neighbours in one row, and what attention must keep together."""

    row: int
    start: int
    length: int
    sizes: tuple[int, ...]
    """Tokens of its sequences, in reading order; all in one where it is plainly causal."""
    parents: tuple[int | None, ...]
    """Which of them each one continues."""

    @functools.cached_property
    def mask_TT(self) -> Tensor | None:
        """True where the token of a row sees the token of a column, on the CPU; None: plainly causal."""
        if len(self.sizes) == 1:
            return None
        ends = list(itertools.accumulate(self.sizes))
        mask = torch.zeros(self.length, self.length, dtype=torch.bool)
        for i, end in enumerate(ends):
            at: int | None = i
            while at is not None:
                mask[end - self.sizes[i] : end, ends[at] - self.sizes[at] : ends[at]] = True
                at = self.parents[at]
        return mask.tril_()

    @functools.cached_property
    def paths(self) -> list[tuple[tuple[int, ...], int]]:
        """(sequences from the first to one that nothing continues, how many of these stand in an earlier path)."""
        found, met = [], set[int]()
        for end in sorted(set(range(len(self.sizes))) - set(self.parents)):
            path: list[int] = []
            at: int | None = end
            while at is not None:
                path.append(at)
                at = self.parents[at]
            found.append((tuple(reversed(path)), len(met & set(path))))
            met |= set(path)
        return found


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed batch stand."""

    shape: tuple[int, int]
    """(R, W)."""
    row_N: tuple[int, ...]
    start_N: tuple[int, ...]
    """Column of a sequence's own first token, after its virtual ones."""
    length_N: tuple[int, ...]
    position_RW: Tensor
    """Position ids; 0 where nothing stands."""
    owner_RW: Tensor
    """Sequence of each token; -1 where nothing stands."""
    first: Mapping[str, Tensor]
    """positional adapter -> minus the token's place behind the adapter's first virtual token (R W,)."""
    families: tuple[Family, ...]
    """In reading order."""
    prompt_N: tuple[int, ...] = ()
    """Tokens of each sequence's prompt, counted from the beginning of what it continues."""
    read_N: Tensor | None = None
    """Places in the flattened batch whose last hidden state is read, each once; None: all may be."""
    made: dict[Any, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """What attention has made of this layout, for the layers that follow."""

    def to(self, device: torch.device) -> Layout:
        """The same with its tensors elsewhere."""
        moved = {n: t.to(device) for n, t in self.first.items()}
        position, owner = self.position_RW.to(device), self.owner_RW.to(device)
        return replace(self, position_RW=position, owner_RW=owner, first=moved, made={})

    def index(self, sequence: int, token: int = 0) -> int:
        """Where a token of a sequence stands in the flattened batch."""
        return self.row_N[sequence] * self.shape[1] + self.start_N[sequence] + token

    def fill(self, sequences: Sequence[Sequence[int]], empty: int) -> Tensor:
        """Values of every sequence's own tokens, laid out (R, W); `empty` elsewhere."""
        flat = torch.full((self.shape[0] * self.shape[1],), empty)
        for n, values in enumerate(sequences):
            at = self.index(n)
            flat[at : at + len(values)] = torch.tensor(values)
        return flat.view(self.shape)

    def sees(self) -> Tensor:
        """Who sees whom, (R, W, W), for attention that wants a dense mask; empty columns see themselves."""
        R, W = self.shape
        seen = torch.zeros(R, W, W, dtype=torch.bool, device=self.owner_RW.device)
        for f in self.families:
            inside = slice(f.start, f.start + f.length)
            seen[f.row, inside, inside] = True if f.mask_TT is None else f.mask_TT
        return seen.tril_() | torch.eye(W, dtype=torch.bool, device=seen.device)


def rows_of(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of the lengths in rows of at most `width`: first fit, longest first; a longer one gets its own row."""
    rows: list[list[int]] = []
    left: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = next((r for r, free in enumerate(left) if free >= lengths[i]), len(rows))
        if at == len(rows):
            rows.append([])
            left.append(max(width, lengths[i]))
        rows[at].append(i)
        left[at] -= lengths[i]
    return rows


def lay_out(
    lengths: Sequence[int],
    worn: Sequence[Worn],
    edits: Mapping[str, Edit],
    parents: Sequence[int | None] | None = None,
    width: int | None = None,
    prompts: Sequence[int | None] | None = None,
) -> Layout:
    """Place sequences in rows.

    Args:
        lengths: tokens of each sequence, at least 1.
        worn: what each wears. Virtual tokens stand before sequences without a parent.
        parents: the sequence that each one continues, which must stand before it in this list; it wears the same.
        width: columns of a row, at least those of the largest family (0: no more than those); None: one row.
        prompts: tokens of the prompt of each sequence that continues none; None: all of them.
    """
    parents = list(parents) if parents is not None else [None] * len(lengths)
    cpu = torch.device("cpu")
    space = plan_room([w if p is None else () for w, p in zip(worn, parents, strict=True)], edits, cpu)
    need = [0] * len(lengths) if space is None else space.need_B.tolist()
    root, behind, members = _trees(lengths, parents, need)
    if any(worn[i] != worn[r] for i, r in enumerate(root)):
        raise InlayError("a sequence that continues another one wears the same adapters")
    sizes = {r: need[r] + sum(lengths[i] for i in own) for r, own in members.items()}
    heads = list(members)
    rows = (
        [list(range(len(heads)))] if width is None else rows_of([sizes[r] for r in heads], max(width, *sizes.values()))
    )
    W = max(sum(sizes[heads[h]] for h in row) for row in rows)
    position, owner, place = (torch.full((len(rows), W), v) for v in (0, -1, -1))
    start, row_of = [0] * len(lengths), [0] * len(lengths)
    families = []
    for r, row in enumerate(rows):
        column = 0
        for head in (heads[h] for h in row):
            begin = column
            if n := need[head]:
                assert space is not None
                owner[r, column : column + n] = head
                position[r, column : column + n] = space.position_BR[head, :n]
                place[r, column : column + n] = torch.arange(n)
                column += n
            for i in members[head]:
                end = column + lengths[i]
                start[i], row_of[i], owner[r, column:end] = column, r, i
                position[r, column:end] = place[r, column:end] = torch.arange(behind[i], behind[i] + lengths[i])
                column = end
            families.append(_family(members[head], lengths, parents, need[head], (r, begin, column - begin)))
    flat, at, roots = owner.flatten(), place.flatten(), torch.tensor(root)
    offsets = {} if space is None else space.offset
    first = {n: torch.where(flat < 0, 1, o[roots[flat]] - at) for n, o in offsets.items()}
    ends = [lengths[r] if prompts is None or (p := prompts[r]) is None else p for r in root]
    return Layout(
        (len(rows), W),
        tuple(row_of),
        tuple(start),
        tuple(lengths),
        position,
        owner,
        first,
        tuple(families),
        tuple(ends),
    )


def _trees(
    lengths: Sequence[int], parents: Sequence[int | None], need: Sequence[int]
) -> tuple[list[int], list[int], dict[int, list[int]]]:
    """(each sequence's root, its first position, root -> its family in order)."""
    root: list[int] = []
    behind: list[int] = []
    members: dict[int, list[int]] = {}
    for i, p in enumerate(parents):
        if lengths[i] < 1 or (p is not None and not 0 <= p < i):
            raise InlayError(f"sequence {i} is empty or continues one that does not stand before it")
        root.append(i if p is None else root[p])
        behind.append(need[i] if p is None else behind[p] + lengths[p])
        members.setdefault(root[i], []).append(i)
    return root, behind, members


def _family(
    own: list[int], lengths: Sequence[int], parents: Sequence[int | None], need: int, where: tuple[int, int, int]
) -> Family:
    """A family; a chain without branches is plainly causal."""
    if all(parents[b] == a for a, b in zip(own, own[1:], strict=False)):
        return Family(*where, (where[2],), (None,))
    place = {i: n for n, i in enumerate(own)}
    sizes = (need + lengths[own[0]], *(lengths[i] for i in own[1:]))
    return Family(*where, sizes, tuple(None if (p := parents[i]) is None else place[p] for i in own))
