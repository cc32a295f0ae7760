"""What measuring costs over the one greedy pass that it needs anyway: CPU time on one thread, in turns.

python scripts/measure_cost.py --model tiny-llama --items 10000
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import inlay
from inlay.evaluate import GenerateSettings, generate
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, answer_limit, measure


def took(work: Callable[[], object]) -> float:
    """Seconds of CPU."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main() -> None:
    """Print both and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-llama", help="embedded base, folder, or Hub id")
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = inlay.load_base(asked.model, device="cpu")
    host, how = inlay.attach(model), MeasureSettings()
    places = ("Paris", "Lima", "Oslo", "Cairo", "Quito")
    items = [Item(f"i{n}", f"Person {n} was born in", places[n % len(places)]) for n in range(asked.items)]
    greedy = GenerateSettings(
        max_new_tokens=answer_limit(tokenizer, items, how), batch_size=how.batch_size, stop=how.wording.stop
    )
    prompts = how.wording.prompts(tokenizer, [i.prompt for i in items])
    passes, tables = [], []
    for _ in range(asked.rounds):
        passes.append(took(lambda: generate(host, tokenizer, prompts, None, greedy)))
        tables.append(took(lambda: measure(host, tokenizer, items, how)))
    ratios = [b / a for a, b in zip(passes, tables, strict=True)]
    told = f"one greedy pass {statistics.median(passes):.1f} s, measured {statistics.median(tables):.1f} s"
    print(f"{asked.items} items: {told}")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
