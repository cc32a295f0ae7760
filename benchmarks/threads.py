"""Steps with fewer and more threads, which is best beside what else keeps the machine busy."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from benchmarks.asked import BATCH, PEFT, Asked
from benchmarks.harness import Result, Took
from benchmarks.train import agree, pair, timed, turn


def threads(asked: Asked) -> Iterator[Result]:
    """LoRA with 1, 2 ... threads, up to those asked for: against as many as that, and against PEFT with the same."""
    numbers = range(1, max(asked.threads, os.cpu_count() or 1) + 1)
    for dtype, kind in product(asked.dtypes, asked.kinds):
        examples, what = asked.examples(asked.size, kind)
        with tempfile.TemporaryDirectory() as folder:
            ours, peer = pair(asked.size, examples, "lora", dtype, BATCH, Path(folder) / "a")
            told = f"{what}; {agree(ours, peer, 2, 1e-4 if dtype == 'fp32' else 1e-2)}"
        runs = {(side, n): turn(own, asked.steps) for n in numbers for side, own in (("ours", ours), ("peer", peer))}
        took = asked.measured({f"{side} {n}": _with(n, run) for (side, n), run in runs.items()})
        for n in numbers:
            name = f"threads {n} lora {kind} {asked.size} {dtype}"
            yield timed(name, took[f"ours {n}"], took[f"peer {n}"], examples, BATCH, f"{PEFT}, threads {n}", told)
            if n < numbers[-1]:
                most = f"ours, threads {numbers[-1]}"
                yield timed(name, took[f"ours {n}"], took[f"ours {numbers[-1]}"], examples, BATCH, most, told)


def _with(number: int, run: Callable[[], Took]) -> Callable[[], Took]:
    """A variant that computes on so many threads."""

    def limited() -> Took:
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            return run()
        finally:
            torch.set_num_threads(before)

    return limited
