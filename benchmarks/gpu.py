"""A 7B-shaped LLaMA of random weights in bf16 on a GPU: `inlay.train` against PEFT + Trainer, with and without Liger.

Both sides stay on the device, so a side's memory is its own weights and adapter and what its steps add to all that is
there. A smoke test runs on a CPU too, where memory is not measured.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import bound
from benchmarks.bases import llama
from benchmarks.harness import SHARE, Result, Took, clock, compare, faster, rounds
from benchmarks.lengths import Row, about
from benchmarks.train import Ours, Peer, Side, alike, turn

MIB = 2**20
GEMM = "the GEMM rate, measured beside it"


class Held:
    """A side, with the device memory that it holds and needs.

    Args:
        memory: what tells it, with the three functions of `torch.cuda`; None: nothing does.
    """

    def __init__(self, make: Callable[[], Side], memory: Any = torch.cuda):
        self.memory = memory
        before = memory.memory_allocated() if memory else 0
        self.side = make()
        self.held = memory.memory_allocated() - before if memory else 0
        self.peaks: list[float] = []
        """MiB, of every `steps` so far."""

    def steps(self, number: int) -> tuple[list[float], list[Took]]:
        """(losses, time) of so many optimizer steps from the first example on."""
        if not self.memory:
            return self.side.steps(number)
        self.memory.reset_peak_memory_stats()
        before = self.memory.memory_allocated()
        told = self.side.steps(number)
        self.peaks.append((self.memory.max_memory_allocated() - before + self.held) / MIB)
        return told


class Products:
    """The model's largest matrix products, one after another: what the device multiplies at, in the same run."""

    tokens, number = 4096, 20

    def __init__(self, config: Any, device: str):
        d, m = config.hidden_size, config.intermediate_size
        self.x = torch.randn(self.tokens, d, dtype=torch.bfloat16, device=device)
        self.W = torch.randn(m, d, dtype=torch.bfloat16, device=device)
        self.flop = 2.0 * self.tokens * d * m * self.number

    def run(self) -> Took:
        """Time of all."""
        began = clock()
        for _ in range(self.number):
            self.x @ self.W.T
        return began.since()


def sides(size: str, examples: Sequence[Row], batch: int, device: str, adapter: Path) -> dict[str, Held]:
    """`ours` and its peers by name, all from one start; Liger's only where it is installed."""
    liger = {"PEFT + Trainer + Liger": {"use_liger_kernel": True}}
    peers: dict[str, dict[str, Any]] = {"PEFT + Trainer": {}}
    peers |= liger if device == "cuda" and importlib.util.find_spec("liger_kernel") else {}
    memory = torch.cuda if device == "cuda" else None
    made = {
        name: Held(lambda a=arguments: Peer(llama(size, "bf16", device), "lora", examples, batch, adapter, **a), memory)
        for name, arguments in peers.items()
    }
    return {"ours": Held(lambda: Ours(llama(size, "bf16", device), "lora", examples, batch, adapter), memory)} | made


def measure(size: str, examples: Sequence[Row], batch: int, turns: int, device: str, folder: Path) -> Iterator[Result]:
    """Time and tokens a second, peak memory, and model-FLOPs utilisation; the first batch is not counted."""
    made = sides(size, examples, batch, device, folder / "a")
    losses = {name: side.steps(2)[0] for name, side in made.items()}
    told = {name: alike(losses["ours"], losses[name], 1e-3) for name in made if name != "ours"}
    config = llama(size, "bf16", "meta").config
    products = Products(config, device)
    steps = len(examples) // batch - 1
    took = rounds({"GEMM": products.run, **{name: turn(side, steps) for name, side in made.items()}}, turns)
    rates = [products.flop / t.wall for t in took.pop("GEMM")]
    peaks = {name: side.peaks[-turns:] for name, side in made.items()}
    counted = examples[batch:]
    told = {name: f"{about(counted, batch)}; {note}" for name, note in told.items()}
    yield from results(f"gpu train lora alpaca {size} bf16", config, counted, took, peaks, rates, told)


def results(
    name: str,
    config: Any,
    examples: Sequence[Row],
    took: Mapping[str, Sequence[Took]],
    peaks: Mapping[str, Sequence[float]],
    rates: Sequence[float],
    told: Mapping[str, str],
) -> Iterator[Result]:
    """Rows of the table from the numbers of every round.

    Model-FLOPs utilisation is tokens a second x FLOP a token, over the rate of products that the device reached in the
    same round. FLOP are those of `bound.work`: forward and gradient of the input, neither padding nor recomputation.
    """
    tokens = sum(len(e.input_ids) for e in examples)
    each = bound.work(config, [[e] for e in examples]) / tokens
    speed = {side: [tokens / t.wall for t in own] for side, own in took.items()}
    for peer, note in told.items():
        yield faster(name, took["ours"], took[peer], peer, note)
        both = speed["ours"], speed[peer]
        yield compare(f"{name}, throughput", SHARE, *both, unit="tokens/s", peer_is=peer, note="real tokens")
        if peaks["ours"]:
            yield compare(f"{name}, peak memory", SHARE, peaks["ours"], peaks[peer], "MiB", peer)
    used = {side: [v * each / rate for v, rate in zip(own, rates, strict=True)] for side, own in speed.items()}
    reached = [v * each / 1e12 for v in speed["ours"]]
    note = "; ".join(f"{peer} {statistics.median(used[peer]):.3f}" for peer in told)
    title = f"{name}, model-FLOPs utilisation"
    yield compare(title, SHARE, reached, [r / 1e12 for r in rates], "TFLOP/s", GEMM, note)
