"""Hanging LoRA on 224 linears of a 32-layer model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from benchmarks.bases import ALL_LINEARS, llama
from benchmarks.harness import Took, clock


def ours() -> Took:
    """Time of attach and add."""
    import inlay

    model = llama("32-layer")
    began = clock()
    inlay.attach(model).add("a", inlay.method("lora").make(rank=8, alpha=16.0), at="linear")
    return began.since()


def peft() -> Took:
    """Time of get_peft_model."""
    import peft as hf

    model = llama("32-layer")
    began = clock()
    hf.get_peft_model(model, hf.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEARS))
    return began.since()


class Wrap(nn.Module):
    """The least that a wrapper can be."""

    def __init__(self, layer: Any):
        super().__init__()
        self.layer = layer
        self.A = nn.Parameter(torch.empty(8, layer.in_features))
        self.B = nn.Parameter(torch.zeros(layer.out_features, 8))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)


def bare() -> Took:
    """Time of replacing 224 modules by a wrapper."""
    model = llama("32-layer")
    began = clock()
    for path, m in list(model.named_modules()):
        if isinstance(m, nn.Linear) and path != "lm_head":
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, Wrap(m))
    return began.since()
