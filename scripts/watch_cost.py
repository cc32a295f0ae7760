"""What watching costs: CPU time of a watched run, parted into steps, probes and snapshots.

    python scripts/watch_cost.py --model tiny-llama --steps 200

Parts of one run are compared, since runs one after another differ by more than probes cost on a shared machine. The
table is measured before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from typing import Any

import torch

import inlay
from inlay.knowledge.measure import measure
from inlay.knowledge.track import Tracker, TrackSettings
from inlay.knowledge.wording import examples
from inlay.knowledge.world import World
from inlay.train import OptimSettings, RunSettings, TrainSettings, fit
from inlay.train.loop import Loop


def timed(cls: type, name: str, spent: dict[str, float]) -> None:
    """Add up the CPU time of a method."""
    real = getattr(cls, name)

    def method(self: Any, *args: Any, **more: Any) -> Any:
        start = time.process_time()
        try:
            return real(self, *args, **more)
        finally:
            spent[name] = spent.get(name, 0.0) + time.process_time() - start

    setattr(cls, name, method)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--items", type=int, default=360)
    parser.add_argument("--snapshots", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = inlay.load_base(args.model, device="cpu")
    host = inlay.attach(model).add("a", inlay.method("lora").make(rank=8), at="q,v", seed=0)
    world = World()
    items = world.edits(args.items)
    table = measure(host, tokenizer, items)
    watch = Tracker(
        tokenizer, items, world.retention(items, args.items // 2), TrackSettings(snapshots=args.snapshots), table
    )
    spent: dict[str, float] = {}
    for cls, name in ((Loop, "advance"), (Tracker, "soft"), (Tracker, "_take")):
        timed(cls, name, spent)
    with tempfile.TemporaryDirectory() as out:
        settings = TrainSettings(
            model=args.model,
            out=out,
            optim=OptimSettings(batch_size=args.batch, steps=args.steps),
            run=RunSettings(progress=False, loggers=("none",), save_every=0, async_save=False),
        )
        fit(host, "a", examples(items, tokenizer), [], settings, out, tokenizer, observers=[watch])
    told = {"steps": spent["advance"], "probes": spent["soft"], "snapshots": spent.get("_take", 0.0)}
    share = {f"{k}_percent_of_steps": round(100 * told[k] / told["steps"], 2) for k in ("probes", "snapshots")}
    print(json.dumps({**vars(args), "cpu_seconds": told, **share}, indent=1))


if __name__ == "__main__":
    main()
