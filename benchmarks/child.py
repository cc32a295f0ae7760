"""One side of one workload in a process of its own; prints its peak memory in MiB (`benchmarks.harness.peak`)."""

from __future__ import annotations

import sys

import torch

from benchmarks.bases import llama
from benchmarks.harness import own_peak
from benchmarks.lengths import rows
from benchmarks.train import Ours, Peer


def main(side: str, size: str, kind: str, method: str, dtype: str, batch: int, steps: int, threads: int) -> None:
    torch.set_num_threads(threads)
    model = llama(size, dtype)
    examples = rows(kind, batch * steps, model.config.vocab_size)
    if side == "empty":
        print(own_peak())
        return
    made = {"ours": Ours, "peer": Peer}[side](model, method, examples, batch)
    made.steps(steps)
    print(own_peak())


if __name__ == "__main__":
    side, size, kind, method, dtype, *numbers = sys.argv[1:]
    main(side, size, kind, method, dtype, *map(int, numbers))
