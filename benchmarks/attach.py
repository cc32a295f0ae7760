"""Hanging LoRA on 224 linears of a 32-layer model, and many adapters: load, switch, forward."""

from __future__ import annotations

import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bases import ALL_LINEARS, llama
from benchmarks.harness import Took, clock, rounds
from inlay.core import store
from inlay.methods import EDITS


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


def many(number: int, with_peft: bool) -> dict[str, float]:
    """Milliseconds to load the last of `number` adapters, to switch, and of a forward of 16 tokens, per side."""
    import peft as hf

    import inlay

    found: dict[str, float] = {}
    ids = torch.randint(3, 100, (1, 16))
    with tempfile.TemporaryDirectory() as folder:
        host = inlay.attach(llama("60M-blocks"))
        host.add("a0", inlay.method("lora").make(rank=8, alpha=16.0), at="linear", seed=0)
        inlay.save(host, "a0", Path(folder) / "ours")
        times = []
        for i in range(1, number):
            began = clock()
            store.shelve(host, Path(folder) / "ours", EDITS, f"a{i}")
            times.append(1e3 * began.since().wall)
        found["ours: first load"], found["ours: last load"] = times[0], sorted(times[-9:])[len(times[-9:]) // 2]
        began = clock()
        for i in range(20):
            host.use(f"a{i % number}")
        found["ours: switch"] = 50 * began.since().wall
        models = {"ours": host.model}
        if with_peft:
            model = hf.get_peft_model(
                llama("60M-blocks"), hf.LoraConfig(r=8, lora_alpha=16, target_modules=ALL_LINEARS), "a0"
            )
            model.save_pretrained(Path(folder) / "peft", selected_adapters=["a0"])
            times = []
            for i in range(1, number):
                began = clock()
                model.load_adapter(str(Path(folder) / "peft" / "a0"), f"a{i}")
                times.append(1e3 * began.since().wall)
            found["PEFT: first load"], found["PEFT: last load"] = times[0], sorted(times[-9:])[len(times[-9:]) // 2]
            began = clock()
            for i in range(4):
                model.set_adapter(f"a{i % number}")
            found["PEFT: switch"] = 250 * began.since().wall
            models["PEFT"] = model
        with torch.no_grad():
            took = rounds({side: partial(m, ids) for side, m in models.items()}, 20)
        found |= {f"{side}: forward": 1e3 * statistics.median(t.wall for t in times) for side, times in took.items()}
    return {k: round(v, 2) for k, v in found.items()}
