"""One side of one workload in a process of its own; prints resident MiB before its steps and at their peak."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.bases import llama
from benchmarks.harness import own_peak, settle
from benchmarks.lengths import Row, rows
from benchmarks.train import Ours, Peer


def main(side: str, size: str, kind: str, method: str, dtype: str, batch: int, steps: int, threads: int) -> None:
    """Args:
    side: `ours`, `peer`, `empty`, or the number of a setting (`strongest.settings`).
    kind: of recorded lengths, or a file of examples (`texts.write`).
    """
    torch.set_num_threads(threads)
    chosen = _setting(int(side), dtype) if side.isdigit() else None
    model = llama(size, "fp32" if chosen is not None and chosen.autocast else dtype)
    examples = _examples(kind, batch * steps, model.config.vocab_size)
    if side == "empty":
        print(settle(), own_peak())
        return
    if chosen is not None:
        from benchmarks.strongest import Peers

        trained: Ours | Peer = Peers(model, method, examples, batch).of(chosen)
    else:
        trained = {"ours": Ours, "peer": Peer}[side](model, method, examples, batch)
    trained.warm()
    sum(float(p.sum()) for p in model.parameters())  # weights that are mapped from a file count only when read
    idle = settle()
    trained.steps(steps)
    print(idle, own_peak())


def _setting(number: int, dtype: str):  # type: ignore[no-untyped-def]
    from benchmarks.strongest import settings

    return settings(dtype)[number]


def _examples(kind: str, count: int, vocabulary: int) -> list[Row]:
    if not kind.endswith(".json"):
        return rows(kind, count, vocabulary)
    from benchmarks.texts import read

    return read(Path(kind))[:count]


if __name__ == "__main__":
    side, size, kind, method, dtype, *numbers = sys.argv[1:]
    main(side, size, kind, method, dtype, *map(int, numbers))
