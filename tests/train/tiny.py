"""Tiny random bases, a tiny tokenizer and toy examples for the training tests."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch

import inlay
from inlay.train.settings import DataSettings, OptimSettings, RunSettings, TrainSettings

VOCAB = 61


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    labels: list[int]
    truncated: bool = False


def base(seed: int = 0, kind: str = "llama"):
    """A random decoder of two layers: `llama` (grouped key/value heads) or `gpt2` (with dropout of its own)."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def wearing(method: str = "lora", at: str | None = None, kind: str = "llama", seed: int = 0, **settings):
    """A host whose adapter `a` is fresh."""
    host = inlay.attach(base(seed, kind))
    if method in ("lora", "dora", "rslora", "adalora"):
        settings = {"rank": 4, **settings}
    row = inlay.method(method)
    return host.add("a", row.make(**settings), at=at or row.places, seed=5)


def rows(n: int, seed: int = 0, prompt: bool = False) -> list[Row]:
    """Counting upwards from a random start: something that can be learned. `prompt`: the first third is not."""
    draw = random.Random(seed)
    made = []
    for _ in range(n):
        start, length = draw.randrange(3, 20), draw.randrange(6, 14)
        ids = [start + i for i in range(length)]
        made.append(Row(ids, [-100] * (length // 3) + ids[length // 3 :] if prompt else list(ids)))
    return made


def settings(out: Path, **changes) -> TrainSettings:
    """Settings for a run of a second; `changes` are fields of any section."""
    base = {
        "batch_size": 4,
        "micro_batch": 2,
        "steps": 6,
        "lr": 1e-2,
        "warmup": 2,
        "progress": False,
        "loggers": ("none",),
        "save_every": 2,
    }
    values = {**base, **changes}

    def section(cls):
        return cls(**{k: values.pop(k) for k in list(values) if k in cls.__dataclass_fields__})

    made = {"data": section(DataSettings), "optim": section(OptimSettings), "run": section(RunSettings)}
    return TrainSettings(**{"model": "random", "out": out, **values, **made})


def copy(host, name: str = "a") -> dict[str, torch.Tensor]:
    """The adapter's tensors as they are now."""
    return {k: v.detach().clone() for k, v in host.tensors(name).items()}


def same(a, b) -> bool:
    """Equal to the last bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
