"""LoRA against the fastest way of training with PEFT: each setting takes a step, the fastest are measured in rounds."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import bound, texts
from benchmarks.asked import BATCH, PEFT, Asked
from benchmarks.bases import llama
from benchmarks.harness import SHARE, Result, Took, above, compare
from benchmarks.lengths import Row
from benchmarks.peers import PLAIN, Peers, Setting, Tuned, settings
from benchmarks.train import Ours, alike, batches, timed, turn

SHIPPED = "the fastest setting of PEFT and TRL"
STRONGEST = "the fastest, attention by sequence included"
LIMIT = "its matrix products alone, at the rate measured here"
Measure = Callable[[Mapping[str, Callable[[], object]]], dict[str, list[Took]]]
"""Rounds of several variants: `Asked.measured`."""
NEAR = {"fp32": 1e-4, "bf16": 1e-2}
"""Losses may differ by this much, relatively. In bf16 sides round in different places (a base of 30 layers: 4e-3, and
2e-4 to 4e-3 from the float32 loss), by which the few tokens of a small batch do not average out."""


class Trial:
    """Ours and every setting on the same base, adapter, examples and batches; both compute the same losses."""

    def __init__(self, size: str, examples: Sequence[Row], method: str, dtype: str, batch: int, folder: Path):
        self.peers = {False: Peers(llama(size, dtype), method, examples, batch, folder / "a")}
        self.ours = Ours(llama(size, dtype), method, examples, batch, folder / "a")
        if any(s.autocast for s in settings(dtype)):
            self.peers[True] = Peers(llama(size, "fp32"), method, examples, batch)
            self.peers[True].start = self.peers[False].start
        self.agreed: dict[Setting, str] = {}
        self.first: dict[Setting, Took] = {}
        """Time of each setting's second step."""
        losses = self.ours.steps(2)[0]
        for setting in settings(dtype):
            own, took = self.side(setting, fresh=True).steps(2)
            self.agreed[setting] = alike(losses, own, NEAR[dtype])
            self.first[setting] = took[-1]

    def side(self, setting: Setting, fresh: bool = False) -> Tuned:
        """One setting, from the adapter's first tensors if `fresh`."""
        peers = self.peers[setting.autocast]
        if fresh:
            peers.fresh()
        return peers.of(setting)

    def fastest(self) -> list[Setting]:
        """By one step each: the fastest that the peers ship, and the fastest of all."""
        ranked = sorted(self.first, key=lambda s: self.first[s].wall)
        return [next(s for s in ranked if s.shipped), ranked[0]]

    def tried(self) -> str:
        """Every setting with the time of its one step."""
        return "; ".join(f"{s} {took.wall:.2f} s" for s, took in self.first.items())

    def measured(self, steps: int, measure: Measure) -> tuple[list[Took], dict[Setting, list[Took]]]:
        """Time of `steps` steps in every round: ours, and those of the settings that matter."""
        peers = {str(s): s for s in dict.fromkeys([PLAIN, *self.fastest()])}
        took = measure({"ours": turn(self.ours, steps)} | {n: turn(self.side(s), steps) for n, s in peers.items()})
        return took["ours"], {s: took[n] for n, s in peers.items()}


def rows_of(peers: Mapping[Setting, Sequence[Took]]) -> dict[str, Setting]:
    """Peers of the table: Trainer as it is, the fastest setting that the peers ship, and the fastest of all."""

    def median(setting: Setting) -> float:
        return statistics.median(t.wall for t in peers[setting])

    return {
        PEFT: PLAIN,
        SHIPPED: min((s for s in peers if s.shipped), key=median),
        STRONGEST: min(peers, key=median),
    }


def strongest(asked: Asked) -> Iterator[Result]:
    """LoRA against PEFT + Trainer and against the fastest of PEFT's and TRL's settings, in time and memory."""
    for dtype, kind in product(asked.dtypes, asked.kinds):
        examples, what = asked.examples(asked.size, kind)
        name = f"lora {kind} {asked.size} {dtype}"
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(asked.size, examples, "lora", dtype, BATCH, Path(folder))
        ours, peers = trial.measured(asked.steps, asked.measured)
        table = rows_of(peers)
        for peer_is, setting in table.items():
            told = f"{what}; {trial.agreed[setting]}"
            if peer_is != PEFT:
                told += f"; it is {setting}; one step of each: {trial.tried()}"
            yield timed(f"strongest {name}", ours, peers[setting], examples, BATCH, peer_is, told)
        yield _limit(f"strongest {name}", dtype, trial.ours.host.model.config, ours, examples)
        del trial
        yield from _memory(name, asked, dtype, examples, table)


def _limit(name: str, dtype: str, config: Any, ours: Sequence[Took], examples: Sequence[Row]) -> Result:
    """Ours over the time that its products take: what is left to gain but for fewer or faster products."""
    rates = bound.gemm(dtype, config)
    least = bound.work(config, batches(examples[BATCH:], BATCH)) / max(rates.values())
    return compare(name, SHARE, [t.wall for t in ours], [least] * len(ours), "s", LIMIT, bound.told(rates))


def _memory(
    name: str, asked: Asked, dtype: str, examples: Sequence[Row], table: Mapping[str, Setting]
) -> Iterator[Result]:
    """What training adds at its peak to a process that holds weights, adapter and imports."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.json"
        texts.write(examples, file)
        common = (asked.size, str(file), "lora", dtype, str(BATCH), str(asked.steps), str(asked.threads))
        sides = {"ours": "ours"} | {str(s): str(settings(dtype).index(s)) for s in table.values()}
        found: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(asked.rounds):
            for side, number in sides.items():
                found[side].append(above(number, *common))
    for peer_is, setting in table.items():
        yield compare(
            f"memory above weights and imports, {name}", SHARE, found["ours"], found[str(setting)], "MiB", peer_is,
            f"it is {setting}",
        )  # fmt: skip
