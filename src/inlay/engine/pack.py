"""Packs: sequences laid out in one batch, with the positions whose next token is scored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from inlay.compat.transformers import has_attention_interface
from inlay.core.errors import InlayError
from inlay.core.host import Host
from inlay.core.layout import Layout, rows_of
from inlay.engine.example import IGNORED, Example, unlearned

BUDGET = {"cpu": 768}
"""Tokens of a forward in float32 by kind of device: what keeps it busy, and no more memory than that."""
BUDGET_ELSEWHERE = 8192


def budget(of: Host | PreTrainedModel) -> int:
    """Tokens that a forward of a host or model should hold: on a CPU twice as many in 16 bits, which take the same
    memory."""
    return BUDGET[of.device.type] * 4 // of.dtype.itemsize if of.device.type in BUDGET else BUDGET_ELSEWHERE


@dataclass(frozen=True)
class Pack:
    """A packed batch (R, W), ready for a forward under `host.packed(pack.layout)` and `apart(host)`."""

    inputs: Mapping[str, Tensor]
    """What the decoder is called with."""
    layout: Layout
    scored_N: Tensor
    """Places in the flattened batch whose hidden state predicts a target, in the order of sequences and tokens."""
    target_N: Tensor
    """The ids they should predict."""
    tokens: int
    """Tokens of the sequences: neither virtual nor empty."""

    @property
    def learned(self) -> int:
        """Scored positions."""
        return len(self.target_N)


def pack(
    host: Host,
    ids: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    parents: Sequence[int | None] | None = None,
    filler: int = 0,
) -> Pack:
    """Sequences in one pack under the host's present plan.

    Args:
        labels: per token, its id where it is scored and -100 elsewhere. A token is predicted from the one before it:
            the last of its parent, for the first of a sequence that has one. Other first tokens are never scored.
        parents: see `inlay.core.layout.lay_out`; raises InlayError for a decoder that cannot be told positions (BLOOM).
        filler: id for virtual and empty columns; which one does not matter.
    """
    if parents is not None and not takes_positions(host.model) and any(p is not None for p in parents):
        raise InlayError(f"{type(host.model).__name__} counts positions by columns: continuations cannot be packed")
    layout, inputs = laid_out(host, ids, parents, filler, prompts=[unlearned(own) for own in labels])
    scored: list[int] = []
    target: list[int] = []
    for n, own in enumerate(labels):
        parent = parents[n] if parents is not None else None
        before = None if parent is None else layout.index(parent, len(ids[parent]) - 1)
        at = layout.index(n)
        for t, label in enumerate(own):
            if label == IGNORED or (t == 0 and before is None):
                continue
            scored.append(before if t == 0 else at + t - 1)  # type: ignore[arg-type]
            target.append(label)
    scored_N, target_N = (torch.tensor(t, dtype=torch.long, device=host.device) for t in (scored, target))
    if len(set(scored)) == len(scored):  # a parent's last token may be scored more than once
        layout = replace(layout, read_N=scored_N)
    return Pack(inputs, layout, scored_N, target_N, sum(map(len, ids)))


def laid_out(
    host: Host,
    ids: Sequence[Sequence[int]],
    parents: Sequence[int | None] | None = None,
    filler: int = 0,
    behind: int = 0,
    prompts: Sequence[int | None] | None = None,
) -> tuple[Layout, dict[str, Tensor]]:
    """(where sequences stand under the host's present plan, what the decoder is called with).

    Args:
        behind: positions that all sequences come after.
        prompts: see `inlay.core.layout.lay_out`.
    """
    # Attention of a decoder's own is dense over a row: rows no longer than they must be keep it from growing.
    layout = host.lay_out([len(s) for s in ids], parents, None if has_attention_interface(host.model) else 0, prompts)
    tokens = layout.fill(ids, filler).to(host.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if takes_positions(host.model):
        inputs["position_ids"] = layout.position_RW + behind
    return layout, inputs


def takes_positions(model: Any) -> bool:
    """Whether a decoder is told positions (BLOOM counts them itself: its ALiBi only looks at differences)."""
    return "position_ids" in inspect.signature(model.forward).parameters


def twice_biased(model: Any) -> bool:
    """Whether a decoder would add its ALiBi twice under attention of another name, as Falcon does in transformers 5.

    The difference can be smaller than a 16-bit base's rounding, so trying does not always tell.
    """
    return bool(getattr(model.config, "alibi", False))


def packs(examples: Sequence[Example], budget: int, shared: int = 0) -> list[list[Example]]:
    """Examples in groups of at most `budget` tokens (a longer one alone), each the content of one pack.

    Args:
        shared: tokens that all of them begin with, and that a pack holds once.
    """
    lengths = [len(e.input_ids) - shared for e in examples]
    return [[examples[i] for i in own] for own in rows_of(lengths, max(1, budget - shared))]
