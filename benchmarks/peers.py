"""The ways of training with PEFT that its users have on a CPU, of which `strongest` finds the fastest.

A setting is a trainer (transformers' Trainer, or TRL's SFTTrainer with its loss in slices), how a batch is laid out
(padded, or padding-free in one row), and how attention keeps the sequences of such a row apart: by the block-diagonal
mask that transformers derives from positions, or sequence by sequence, as kernels for variable lengths do on GPUs.

What else might make a peer faster is the same for all of them: no gradient checkpointing, fused AdamW, no dropout, and
in bf16 a base in bf16 with adapters in float32, as PEFT casts them, or autocast over a base in float32.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import Took
from benchmarks.lengths import Row
from benchmarks.train import Peer, collate, in_order, peft_config

BY_SEQUENCE = "by_sequence"
TRACES = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that trainers leave on a model."""


@dataclass(frozen=True)
class Setting:
    """One way of training with PEFT."""

    trl: bool = False
    """TRL's SFTTrainer, whose loss never holds all logits; otherwise transformers' Trainer."""
    flat: bool = False
    """The batch in one row, without padding."""
    attention: str = "sdpa"
    """`sdpa`, or `by_sequence` for rows that are flat."""
    autocast: bool = False
    """In bf16: a base in float32, computed in bf16 by autocast."""

    @property
    def shipped(self) -> bool:
        """Whether the peers bring all of it: on a CPU, attention by sequence is a function that the user registers."""
        return self.attention == "sdpa"

    def __str__(self) -> str:
        name = "TRL SFTTrainer" if self.trl else "PEFT + Trainer"
        details = {"padding-free": self.flat, "attention by sequence": self.attention == BY_SEQUENCE}
        return ", ".join([name, *(k for k, v in (details | {"autocast": self.autocast}).items() if v)])


LAYOUTS: tuple[dict[str, Any], ...] = ({}, {"flat": True}, {"flat": True, "attention": BY_SEQUENCE})
PLAIN = Setting()
"""What the other training benchmarks compare with."""


def settings(dtype: str) -> list[Setting]:
    """Those that can be tried here: without TRL's if it is not installed; in bf16 each also under autocast."""
    trainers = (False, True) if find_spec("trl") else (False,)
    autocast = (False, True) if dtype == "bf16" else (False,)
    return [Setting(trl, autocast=a, **way) for trl, way, a in itertools.product(trainers, LAYOUTS, autocast)]


def by_sequence(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sequence of a flat row alone; (1, heads, tokens, width) to (1, tokens, heads, width).

    ValueError where nobody says where sequences begin: a padded batch would be computed wrongly.
    """
    if cu_seq_lens_q is None or query.shape[0] != 1:
        raise ValueError(
            "attention by sequence needs cu_seq_lens_q and a batch of one row; use a padding-free collator"
        )
    lengths = cu_seq_lens_q.diff().tolist()
    parts = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """Attention by sequence needs no mask."""


class Peers:
    """A base and an adapter of PEFT's, trained in any setting. They share the weights; one setting runs at a time."""

    def __init__(self, model: Any, method: str, examples: Sequence[Row], size: int, adapter: Path | None = None):
        import peft
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface

        AttentionInterface.register(BY_SEQUENCE, by_sequence)
        AttentionMaskInterface.register(BY_SEQUENCE, _no_mask)
        self.examples, self.size = examples, size
        self.model = peft.get_peft_model(model, peft_config(method))
        if adapter is not None:
            self.model.save_pretrained(adapter)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def fresh(self) -> None:
        """Back to the adapter's first tensors."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in self.start:
                    p.copy_(self.start[name])

    def of(self, setting: Setting) -> Tuned:
        """One setting as a side of a comparison."""
        return Tuned(self, setting)


class Tuned(Peer):
    """PEFT in one setting."""

    def __init__(self, peers: Peers, setting: Setting):
        self.examples, self.size, self.model, self.setting = peers.examples, peers.size, peers.model, setting
        self.arguments = {"bf16": setting.autocast}

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        base = self.model.get_base_model()
        base.set_attn_implementation(self.setting.attention)
        try:
            return super().steps(number)
        finally:
            # accelerate (autocast) and TRL (its loss) put forwards of their own over the classes', and accelerate
            # leaves a model alone that it has prepared before: the next setting must find the model as it was.
            for model, name in itertools.product((self.model, base), TRACES):
                model.__dict__.pop(name, None)

    def warm(self) -> None:
        """Import all that steps need."""
        super().warm()
        if self.setting.trl:
            import trl.trainer.sft_trainer  # noqa: F401

    def _trainer(self, settings: dict[str, Any], data: list[dict[str, list[int]]], callback: Any) -> Any:
        """What trains in this setting."""
        if self.setting.trl:
            return self._sft(settings, data, callback)
        from transformers import Trainer, TrainingArguments

        collator, rows = flat if self.setting.flat else collate, cast(Any, data)
        args = TrainingArguments(**settings)
        return in_order(
            Trainer, model=self.model, args=args, train_dataset=rows, data_collator=collator, callbacks=[callback]
        )

    def _sft(self, settings: dict[str, Any], data: list[dict[str, list[int]]], callback: Any) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from inlay.models.base import load_tokenizer

        args = SFTConfig(
            **settings,
            gradient_checkpointing=False,  # TRL's default is True
            max_length=None,
            padding_free=self.setting.flat,
            dataset_kwargs={"skip_prepare_dataset": True},  # its rows are ids and labels
        )
        return in_order(
            SFTTrainer,
            model=self.model,
            args=args,
            train_dataset=Dataset.from_list(data),
            # Padding-free, TRL takes no collator but its own; that one asks a tokenizer for padding that it never adds.
            data_collator=None if self.setting.flat else collate,
            processing_class=load_tokenizer("tiny-llama"),
            callbacks=[callback],
        )


def flat(rows: Sequence[Any]) -> dict[str, Any]:
    """Rows one after another in one, with what kernels for variable lengths ask for (transformers' own collator)."""
    from transformers import DataCollatorWithFlattening

    return DataCollatorWithFlattening(return_flash_attn_kwargs=True)(list(rows))
