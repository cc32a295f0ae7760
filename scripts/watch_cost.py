"""What watching costs: CPU time of runs with and without a tracker, one after the other in turns, on one thread.

    python scripts/watch_cost.py --model tiny-llama --steps 300 --items 360
    python scripts/watch_cost.py --model ~/.cache/inlay/worlds/llama-... --steps 400 --batch 32

Printed are the tracker's parts of its own runs' steps, which is the exact number, and the difference between runs with
and without it, which the noise of a shared machine is part of. The table is measured before, as `know measure` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from typing import Any

import torch

import inlay
from inlay.knowledge.items import Item
from inlay.knowledge.measure import measure
from inlay.knowledge.table import Table
from inlay.knowledge.track import Tracker, TrackSettings
from inlay.knowledge.wording import examples
from inlay.knowledge.world import World
from inlay.train import OptimSettings, RunSettings, TrainSettings, fit
from inlay.train.loop import Loop

PARTS = ((Loop, "advance"), (Tracker, "begin"), (Tracker, "before_step"), (Tracker, "after_step"), (Tracker, "soft"))


def timed(cls: type, name: str, spent: dict[str, float]) -> None:
    """Add up the CPU time of a method."""
    real = getattr(cls, name)

    def method(self: Any, *args: Any, **more: Any) -> Any:
        start = time.thread_time()
        try:
            return real(self, *args, **more)
        finally:
            spent[name] = spent.get(name, 0.0) + time.thread_time() - start

    setattr(cls, name, method)


def facts(n: int) -> tuple[list[Item], list[Item]]:
    """(n edits, half as many known facts): of one world, and of further ones where it has too few."""
    items: list[Item] = []
    kept: list[Item] = []
    for seed in range(math.ceil(n / 1000)):
        world = World(seed, strangers=0)
        own = world.edits(min(1000, n - len(items)))
        kept += [dataclasses.replace(i, id=f"{seed}-{i.id}") for i in world.retention(own, len(own) // 2)]
        items += [dataclasses.replace(i, id=f"{seed}-{i.id}") for i in own]
    return items, kept


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=int, default=360)
    parser.add_argument("--budget", type=float, default=0.05, help="0: no limit")
    parser.add_argument("--turns", type=int, default=2, help="runs with a tracker, and as many without")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = inlay.load_base(args.model, device="cpu")
    host = inlay.attach(model)
    items, kept = facts(args.items)
    rows = examples(items, tokenizer)
    with tempfile.TemporaryDirectory() as kept_in:  # as `know measure` leaves it, and as `know watch --table` reads it
        table = Table.load(measure(host, tokenizer, items).save(f"{kept_in}/table"))
    spent: dict[str, float] = {}
    for cls, name in PARTS:
        timed(cls, name, spent)
    whole: dict[str, list[float]] = {"watched": [], "plain": []}
    parts: list[dict[str, float]] = []
    told = ""
    for turn in range(2 * args.turns):
        watched = turn % 2 == 0
        watch = Tracker(tokenizer, items, kept, TrackSettings(budget=args.budget or None), table)
        host.add("a", inlay.method("lora").make(rank=8), at="q,v", seed=0)
        spent.clear()
        with tempfile.TemporaryDirectory() as out:
            settings = TrainSettings(
                model=args.model,
                out=out,
                optim=OptimSettings(batch_size=args.batch, steps=args.steps, lr=3e-3),
                run=RunSettings(progress=False, loggers=("none",), save_every=0, async_save=False),
            )
            began = time.thread_time()
            fit(host, "a", rows, [], settings, out, tokenizer, observers=[watch] if watched else [])
            whole["watched" if watched else "plain"].append(time.thread_time() - began)
        host.remove("a")
        if watched:
            told = watch.told
            probes, all_of_it = spent["soft"], spent["begin"] + spent["before_step"] + spent["after_step"]
            parts.append({**spent, "share": all_of_it / spent["advance"], "of_probes": probes / spent["advance"]})
    share = statistics.median(p["share"] for p in parts)
    probes = statistics.median(p["of_probes"] for p in parts)
    apart = min(whole["watched"]) / min(whole["plain"]) - 1
    percent = {"all": share, "probes": probes, "runs_apart": apart}
    found = {"watched": told, "percent_of_steps": {k: round(100 * v, 2) for k, v in percent.items()}}
    print(json.dumps({**vars(args), **found, "cpu_seconds": {**whole, "parts": parts}}, indent=1))


if __name__ == "__main__":
    main()
