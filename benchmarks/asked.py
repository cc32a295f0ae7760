"""What the command line asked for, and how every workload measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import texts
from benchmarks.harness import Took, rounds
from benchmarks.lengths import Row
from benchmarks.load import Watch, busy_cores

PEFT = "PEFT + Trainer"
BATCH = 8


@dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    rounds: int
    steps: int
    sizes: tuple[str, ...]
    """Of `train` and `series`; the other workloads take the first."""
    threads: int
    data: Path | None
    quick: bool
    count: int
    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    dtypes: tuple[str, ...]
    beside: int = 0
    """Busy loops that run beside the rounds."""
    watch: Watch = field(default_factory=Watch)

    def measured(self, variants: Mapping[str, Callable[[], object]]) -> dict[str, list[Took]]:
        """The rounds that are asked for, beside the load that is asked for."""
        with busy_cores(self.beside):
            return rounds(variants, self.rounds, self.watch.before_round)

    def examples(self, size: str, kind: str) -> tuple[list[Row], str]:
        """Those of a round and of the batch before it that is not counted; and what they are."""
        return texts.examples(size, kind, BATCH * (self.steps + 1), self.data)

    @property
    def size(self) -> str:
        """The one base of workloads that take one."""
        return self.sizes[0]
