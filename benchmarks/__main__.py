"""Run the benchmarks.

python -m benchmarks                       all of them, at full size, results into docs/benchmarks.{json,md,png}
python -m benchmarks train memory          some of them
python -m benchmarks --quick               a smoke test on tiny models; nothing is recorded
python -m benchmarks choice --data DIR     with real test files (LLM-Adapters' layout: ARC-Easy/test.json ...)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import attach, bound, report
from benchmarks.bases import llama
from benchmarks.choice import Choice
from benchmarks.generate import Generation
from benchmarks.harness import Result, faster, machine, peak, record, rounds, share
from benchmarks.lengths import about, rows
from benchmarks.train import METHODS, Ours, Peer, agree, pair, turn

PEFT = "PEFT + Trainer"
BATCH = 8


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    rounds: int
    steps: int
    size: str
    threads: int
    data: Path | None
    quick: bool
    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]


def train(asked: Asked) -> Iterator[Result]:
    """Seconds per optimizer step."""
    for dtype in asked.dtypes:
        for method in asked.methods:
            for kind in asked.kinds if method == "lora" else asked.kinds[:1]:
                examples = rows(kind, BATCH * (asked.steps + 1), llama(asked.size).config.vocab_size)
                with tempfile.TemporaryDirectory() as folder:
                    ours, peer = pair(asked.size, examples, method, dtype, BATCH, Path(folder) / "a")
                    told = agree(ours, peer, 2, 1e-4 if dtype == "fp32" else 2e-2)
                seconds = rounds({"ours": turn(ours, asked.steps), "peer": turn(peer, asked.steps)}, asked.rounds)
                note = f"{about(examples, BATCH)}; {told}"
                yield faster(f"train {method} {kind} {asked.size} {dtype}", seconds, PEFT, note)


def upper(asked: Asked) -> Iterator[Result]:
    """Adapters in the upper half, activations cached, second epoch on; PEFT adapts every layer."""
    examples = rows("math", BATCH * (asked.steps + 1), llama(asked.size).config.vocab_size)
    layers = llama(asked.size).config.num_hidden_layers
    ours = Ours(llama(asked.size), "lora", examples, BATCH, at=f"linear@last{layers // 2}")
    ours.loop.way.remember(ours.name, ours.examples, "ram")
    peer = Peer(llama(asked.size), "lora", examples, BATCH)
    seconds = rounds({"ours": turn(ours, asked.steps), "peer": turn(peer, asked.steps)}, asked.rounds)
    note = "ours trains the upper half only, the peer every layer: not the same adapter"
    yield faster(f"train upper half cached math {asked.size} fp32", seconds, PEFT, note)


def memory(asked: Asked) -> Iterator[Result]:
    """Peak resident memory of a fresh process, and the same above an idle process with the model loaded."""
    for kind in asked.kinds:
        common = [asked.size, kind, "lora", "fp32", str(BATCH), str(asked.steps), str(asked.threads)]
        found = {side: [peak(side, *common) for _ in range(min(3, asked.rounds))] for side in ("ours", "peer", "empty")}
        idle = statistics.median(found["empty"])
        note = f"of which {idle:.0f} MiB are Python, PyTorch and the weights"
        yield share(f"memory lora {kind} {asked.size} fp32", found["ours"], found["peer"], "MiB", PEFT, note)
        above = [[x - idle for x in found[side]] for side in ("ours", "peer")]
        yield share(f"memory above the model, lora {kind} {asked.size} fp32", *above, "MiB", PEFT)


def cost(asked: Asked) -> Iterator[Result]:
    """A step over the frozen forward and backward."""
    for dtype in asked.dtypes:
        steps = bound.Steps(asked.size, dtype, "math")
        runs = {str(n): partial(steps.run, n) for n in (None, *bound.METHODS)}
        seconds = rounds(runs, asked.rounds)
        rate = bound.gemm(dtype, asked.threads)
        note = f"matrix products run at {rate['ours']} GFLOP/s here ({rate['default']} in PyTorch's default library)"
        for name in bound.METHODS:
            over = "frozen forward + backward in the same engine"
            yield share(f"cost {name} {asked.size} {dtype}", seconds[name], seconds["None"], "s", over, note)


def choice(asked: Asked) -> Iterator[Result]:
    """Multiple choice."""
    if asked.data is None:
        print("choice needs --data: skipped", file=sys.stderr)
        return
    for name, form in (("ARC-Easy", "adapter"), ("ARC-Easy", "text"), ("openbookqa", "adapter"), ("boolq", "adapter")):
        side = Choice(asked.data, name, form, 4 if asked.quick else 48, "small" if asked.quick else asked.size)
        told = side.agree()
        seconds = rounds({"ours": side.ours, "harness": side.harness, "alone": side.one_by_one}, asked.rounds)
        for peer, peer_is in (("harness", "lm_eval HFLM, batch 16"), ("alone", "one forward per option")):
            both = {"ours": seconds["ours"], "peer": seconds[peer]}
            yield faster(f"choice {name} ({form} prompts) {asked.size}", both, peer_is, told)


def generate(asked: Asked) -> Iterator[Result]:
    """Generation."""
    if asked.data is None:
        print("generate needs --data: skipped", file=sys.stderr)
        return
    side = Generation(asked.data, 8 if asked.quick else 96)
    told = side.agree()
    runs = {"ours": side.ours, "8": lambda: side.peer(8), "1": lambda: side.peer(1)}
    seconds = rounds(runs, asked.rounds)
    for peer, peer_is in (("8", "transformers generate, batch 8"), ("1", "transformers generate, one at a time")):
        both = {"ours": seconds["ours"], "peer": seconds[peer]}
        yield faster("generate math prompts tiny-llama", both, peer_is, told)


def hang(asked: Asked) -> Iterator[Result]:
    """Attach time, and many adapters."""
    seconds = rounds({"ours": attach.ours, "peer": attach.peft, "bare": attach.bare}, asked.rounds)
    yield faster("attach LoRA to 32 layers, 224 places", seconds, "PEFT get_peft_model")
    bare = {"ours": seconds["ours"], "peer": seconds["bare"]}
    yield faster("attach LoRA to 32 layers, 224 places", bare, "a bare wrapper module")
    for number in (3,) if asked.quick else (100, 1000):
        found = attach.many(number, with_peft=number <= 100)
        note = "; ".join(f"{k} {v} ms" for k, v in found.items())
        if "PEFT: last load" in found:
            for what in ("last load", "switch", "forward"):
                both = {"ours": [found[f"ours: {what}"] / 1e3], "peer": [found[f"PEFT: {what}"] / 1e3]}
                yield faster(f"{number} adapters, 56 places: {what}", both, "PEFT", note)
        else:
            alone = [found["ours: last load"]], [found["ours: first load"]]
            yield share(f"{number} adapters, 56 places: last load", *alone, "ms", "its own first load", note)


WORKLOADS = {f.__name__: f for f in (train, upper, memory, cost, choice, generate, hang)}


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds that count")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of a round")
    parser.add_argument("--size", default="60M", help="base: small, 60M, 7B")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, help="real test files")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--kinds", nargs="+", default=["math", "commonsense", "alpaca"])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, nothing recorded")
    given = parser.parse_args()
    if unknown := set(given.workloads) - set(WORKLOADS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; there are {', '.join(WORKLOADS)}")
    torch.set_num_threads(given.threads)
    number, steps, size = (1, 1, "tiny") if given.quick else (given.rounds, given.steps, given.size)
    lists = (tuple(given.methods), tuple(given.kinds), tuple(given.dtypes))
    asked = Asked(number, steps, size, given.threads, given.data, given.quick, *lists)
    if given.quick:
        asked = Asked(number, steps, size, given.threads, given.data, True, ("lora", "prefix"), *lists[1:])
    command = "python -m benchmarks " + " ".join(sys.argv[1:])
    print(machine())
    for name in given.workloads or WORKLOADS:
        for result in WORKLOADS[name](asked):
            print(f"{result.workload:60s} {result.ratio:8.2f} ({result.low:.2f}-{result.high:.2f}) {result.metric}, "
                  f"{result.peer_is}; {result.note}", flush=True)  # fmt: skip
            if not given.quick:
                record(result, command.strip())
    if not given.quick:
        report.write()


if __name__ == "__main__":
    main()
