"""From encoded examples to batches: order, padding, digests. All of it a pure function of the seed and the step."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.core.errors import InlayError
from inlay.engine.example import IGNORED, Example, learned


@dataclass(frozen=True)
class Batch:
    """One micro-batch, padded on the right (B, T)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    learned: int
    """Tokens that count in the loss."""
    tokens: int
    """Tokens without padding."""


def usable(examples: Sequence[Example], what: str) -> list[Example]:
    """The examples that teach anything; raises InlayError if none does."""
    kept = [e for e in examples if learned(e)]
    if not kept:
        raise InlayError(
            f"none of the {len(examples)} {what} examples has a token to learn; raise the cutoff or look at the file"
        )
    return kept


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 over ids and labels, in order."""
    sha = hashlib.sha256()
    for e in examples:
        sha.update(len(e.input_ids).to_bytes(8, "little"))
        sha.update(array("q", [*e.input_ids, *e.labels]).tobytes())
    return sha.hexdigest()


def collate(rows: Sequence[Example], pad: int, device: torch.device) -> Batch:
    """Rows padded to the longest of them."""
    wide = max(len(r.input_ids) for r in rows)
    ids = torch.full((len(rows), wide), pad)
    mask = torch.zeros(len(rows), wide, dtype=torch.long)
    labels = torch.full((len(rows), wide), IGNORED)
    for i, r in enumerate(rows):
        n = len(r.input_ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(r.input_ids), torch.tensor(r.labels), 1
    count = int((labels[:, 1:] != IGNORED).sum())
    return Batch(ids.to(device), mask.to(device), labels.to(device), count, int(mask.sum()))


def order(lengths: Sequence[int], seed: int, epoch: int, group: int = 0) -> list[int]:
    """Indices of one epoch. With `group` > 0, runs of that many examples are of like length; the runs are shuffled."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    shuffled = torch.randperm(len(lengths), generator=draw).tolist()
    if not group:
        return shuffled
    # Sorted within random pools of 50 runs, not over everything: an epoch keeps most of its randomness.
    pool = 50 * group
    runs = []
    for start in range(0, len(shuffled), pool):
        near = sorted(shuffled[start : start + pool], key=lambda i: -lengths[i])
        runs += [near[i : i + group] for i in range(0, len(near), group)]
    short = [runs.pop()] if len(runs[-1]) < group else []  # a run that is not full must stay last
    runs = [runs[i] for i in torch.randperm(len(runs), generator=draw).tolist()] + short
    return [i for run in runs for i in run]


class Feed:
    """The examples of every optimizer step: `feed.step(7)` is always the same, so a position is just a step number.

    The last step of an epoch may have fewer examples than the others.
    """

    def __init__(self, examples: Sequence[Example], batch: int, seed: int, group: bool):
        self.examples, self.batch, self.seed, self.group = examples, batch, seed, group
        self.lengths = [len(e.input_ids) for e in examples]
        self.per_epoch = math.ceil(len(examples) / batch)
        self._epoch: tuple[int, list[int]] = (-1, [])

    def steps(self, epochs: float, steps: int | None) -> int:
        """Optimizer steps of the run."""
        return steps if steps is not None else max(1, math.ceil(epochs * self.per_epoch))

    def step(self, number: int) -> list[Example]:
        """The examples of optimizer step `number` (from 0)."""
        epoch, at = divmod(number, self.per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = epoch, order(self.lengths, self.seed, epoch, self.batch if self.group else 0)
        return [self.examples[i] for i in self._epoch[1][at * self.batch : (at + 1) * self.batch]]
