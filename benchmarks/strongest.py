"""LoRA against the fastest way of training with PEFT: each setting takes a step, the fastest are measured in rounds."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from benchmarks import texts
from benchmarks.asked import BATCH, PEFT, Asked
from benchmarks.bases import llama
from benchmarks.harness import SHARE, Result, Took, above, compare
from benchmarks.lengths import Row
from benchmarks.peers import PLAIN, Peers, Setting, Tuned, settings
from benchmarks.train import Ours, Side, alike, timed, turn

STRONGEST = "the strongest of PEFT's settings"
Measure = Callable[[Mapping[str, Callable[[], object]]], dict[str, list[Took]]]
"""Rounds of several variants: `Asked.measured`."""
MARGIN = 1.15
"""Settings whose first step took at most this much longer than the fastest one's are measured as well."""
FINALISTS = 2


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
            self.agreed[setting] = alike(losses, own, 1e-4 if dtype == "fp32" else 2e-3 if setting.autocast else 1e-3)
            self.first[setting] = took[-1]

    def side(self, setting: Setting, fresh: bool = False) -> Tuned:
        """One setting, from the adapter's first tensors if `fresh`."""
        peers = self.peers[setting.autocast]
        if fresh:
            peers.fresh()
        return peers.of(setting)

    def finalists(self) -> list[Setting]:
        """The settings that may be the fastest, by one step each."""
        ranked = sorted(self.first, key=lambda s: self.first[s].wall)
        limit = MARGIN * self.first[ranked[0]].wall
        return [s for s in ranked if self.first[s].wall <= limit][:FINALISTS]

    def tried(self) -> str:
        """Every setting with the time of its one step."""
        return "; ".join(f"{s} {took.wall:.2f} s" for s, took in self.first.items())

    def measured(self, steps: int, measure: Measure) -> tuple[dict[Setting | None, list[Took]], Setting]:
        """Time of `steps` steps in every round, ours under None; and the strongest setting: the least median."""
        sides: dict[Setting | None, Side] = {None: self.ours}
        sides |= {s: self.side(s) for s in dict.fromkeys([PLAIN, *self.finalists()])}
        names = {str(s): s for s in sides}
        took = measure({name: turn(sides[s], steps) for name, s in names.items()})
        walls = {names[n]: statistics.median(t.wall for t in each) for n, each in took.items()}
        best = min((s for s in sides if s is not None), key=lambda s: walls[s])
        return {names[n]: each for n, each in took.items()}, best


def strongest(asked: Asked) -> Iterator[Result]:
    """LoRA against PEFT + Trainer and against the fastest of PEFT's and TRL's settings, in time and memory."""
    for dtype, kind in product(asked.dtypes, asked.kinds):
        examples, what = asked.examples(asked.size, kind)
        with tempfile.TemporaryDirectory() as folder:
            trial = Trial(asked.size, examples, "lora", dtype, BATCH, Path(folder))
        took, best = trial.measured(asked.steps, asked.measured)
        for setting, peer_is in ((PLAIN, PEFT), (best, STRONGEST)):
            told = f"{what}; {trial.agreed[setting]}"
            if setting is best:
                told += f"; it is {best}; one step of each: {trial.tried()}"
            name = f"strongest lora {kind} {asked.size} {dtype}"
            yield timed(name, took[None], took[setting], examples, BATCH, peer_is, told)
        del trial
        yield from _memory(asked, kind, dtype, examples, best)


def _memory(asked: Asked, kind: str, dtype: str, examples: Sequence[Row], best: Setting) -> Iterator[Result]:
    """What training adds at its peak to a process that holds weights, adapter and imports."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "examples.json"
        texts.write(examples, file)
        common = (asked.size, str(file), "lora", dtype, str(BATCH), str(asked.steps), str(asked.threads))
        sides = {"ours": "ours"} | {str(s): str(settings(dtype).index(s)) for s in (PLAIN, best)}
        found: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(asked.rounds):
            for name, side in sides.items():
                found[name].append(above(side, *common))
    for setting, peer_is in ((PLAIN, PEFT), (best, STRONGEST)):
        name = f"memory above weights and imports, lora {kind} {asked.size} {dtype}"
        yield compare(name, SHARE, found["ours"], found[str(setting)], "MiB", peer_is, f"it is {setting}")
