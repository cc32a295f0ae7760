"""A 7B-shaped LLaMA of random weights in bf16 on a GPU: `inlay.train` against PEFT + Trainer, with and without Liger.

Both sides stay on the device, so a side's memory is its own weights and adapter and what its steps add to all that is
there.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bases import llama
from benchmarks.harness import Took
from benchmarks.lengths import Row
from benchmarks.train import Ours, Peer, Side

MIB = 2**20


class Held:
    """A side, with the device memory that it holds and needs."""

    def __init__(self, make: Callable[[], Side]):
        before = torch.cuda.memory_allocated()
        self.side = make()
        self.held = torch.cuda.memory_allocated() - before
        self.peaks: list[float] = []
        """MiB, of every `steps` so far."""

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        told = self.side.steps(number)
        self.peaks.append((torch.cuda.max_memory_allocated() - before + self.held) / MIB)
        return told


def sides(size: str, examples: Sequence[Row], batch: int, device: str, adapter: Path) -> dict[str, Held]:
    """`ours` and its peers by name, all from one start; Liger's only where it is installed."""
    liger = {"PEFT + Trainer + Liger": {"use_liger_kernel": True}}
    peers: dict[str, dict[str, Any]] = {"PEFT + Trainer": {}}
    peers |= liger if importlib.util.find_spec("liger_kernel") else {}
    made = {
        name: Held(lambda a=arguments: Peer(llama(size, "bf16", device), "lora", examples, batch, adapter, **a))
        for name, arguments in peers.items()
    }
    return {"ours": Held(lambda: Ours(llama(size, "bf16", device), "lora", examples, batch, adapter))} | made
