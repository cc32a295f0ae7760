"""What watching costs: CPU time of a run without a tracker, with its probes, and with probes and snapshots.

    python scripts/watch_cost.py --model tiny-llama --steps 200

Runs are interleaved and their medians compared. The table is measured beforehand; its time is printed beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

import torch

import inlay
from inlay.knowledge.measure import measure
from inlay.knowledge.track import Tracker, TrackSettings
from inlay.knowledge.wording import examples
from inlay.knowledge.world import World
from inlay.train import OptimSettings, RunSettings, TrainSettings, fit


def seconds(args: argparse.Namespace, watch: TrackSettings | None) -> tuple[float, float]:
    """CPU seconds of one run, and of measuring the table."""
    model, tokenizer = inlay.load_base(args.model, device="cpu")
    host = inlay.attach(model).add("a", inlay.method("lora").make(rank=8), at="q,v", seed=0)
    world = World()
    items = world.edits(args.items)
    kept = world.retention(items, args.items // 2)
    rows = examples(items, tokenizer)
    with tempfile.TemporaryDirectory() as out:
        settings = TrainSettings(
            model=args.model, out=out,
            optim=OptimSettings(batch_size=args.batch, steps=args.steps),
            run=RunSettings(progress=False, loggers=("none",), save_every=0, async_save=False),
        )  # fmt: skip
        begin = time.process_time()
        table = measure(host, tokenizer, items) if watch else None
        observers = [Tracker(tokenizer, items, kept, watch, table)] if watch else []
        start = time.process_time()
        fit(host, "a", rows, [], settings, out, tokenizer, observers=observers)
        return time.process_time() - start, start - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=int, default=360)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"bare": None, "probes": TrackSettings(snapshots=0), "probes and snapshots": TrackSettings()}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(args.rounds):
        for name, watch in kinds.items():
            spent, table = seconds(args, watch)
            found[name].append(spent)
    middle = {name: statistics.median(times) for name, times in found.items()}
    extra = {name: round(100 * (t / middle["bare"] - 1), 1) for name, t in middle.items()}
    print(
        json.dumps(
            {**vars(args), "cpu_seconds": found, "median": middle, "percent_more": extra, "table": table}, indent=1
        )
    )


if __name__ == "__main__":
    main()
