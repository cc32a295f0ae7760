"""What runs beside a measurement: busy loops that are asked for, and other processes that are not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

QUIET = 0.15
"""Cores: other processes that take more than this in the moment before a round make a warning."""
PAUSE = 0.5
"""Seconds that this moment lasts."""
TICKS = os.sysconf("SC_CLK_TCK")

# Ends by itself when the benchmark does, however that happens.
_LOOP = "import os\nwhile os.getppid() == {}:\n    for _ in range(10**6): pass"


@contextlib.contextmanager
def busy_cores(number: int) -> Iterator[None]:
    """Keep `number` cores busy with loops of ordinary priority, as users' other programs do."""
    command = [sys.executable, "-S", "-c", _LOOP.format(os.getpid())]
    loops = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def own_seconds() -> float:
    """CPU seconds of this process and its children, the running ones included."""
    spent = os.times()
    done = spent.user + spent.system + spent.children_user + spent.children_system
    return done + sum(_child_seconds(file) for file in Path("/proc").glob("[0-9]*/stat"))


def _child_seconds(file: Path) -> float:
    """CPU seconds of one process and its ended children, if it is a child of this one."""
    try:
        fields = file.read_text().rpartition(")")[2].split()  # behind the name, which may hold blanks
    except OSError:  # it has ended meanwhile
        return 0.0
    return sum(int(x) for x in fields[11:15]) / TICKS if int(fields[1]) == os.getpid() else 0.0


def machine_seconds() -> tuple[float, float]:
    """CPU seconds of all processes since boot, and those that the hypervisor took."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = (int(x) / TICKS for x in first)
    return user + nice + system + irq + softirq, steal


class Watch:
    """What else the machine did meanwhile: cores busy with other processes, and cores that the hypervisor took."""

    def __init__(self) -> None:
        self.began = self._now()
        self.last: dict[str, float] = {}
        self.rounds: list[tuple[float, float]] = []

    @staticmethod
    def _now() -> tuple[float, float, float, float]:
        busy, steal = machine_seconds()
        return time.monotonic(), busy, steal, own_seconds()

    def told(self) -> dict[str, float]:
        """Means in cores since this was last asked, and the load average now. One measurement may give several results
        at once: they share their means."""
        now = self._now()
        seconds, busy, steal, mine = (b - a for a, b in zip(self.began, now, strict=True))
        if seconds > 0.5 or not self.last:
            cores = {"others": (busy - mine) / seconds, "stolen": steal / seconds}
            self.last = {k: round(max(v, 0.0), 2) for k, v in cores.items()} | {"loadavg": round(os.getloadavg()[0], 2)}
            self.began = now
        return self.last

    def before_round(self) -> None:
        """Rest a moment and note (load average, cores busy with other processes); warn if they are not quiet."""
        average, began = os.getloadavg()[0], self._now()
        time.sleep(PAUSE)
        seconds, busy, _, mine = (b - a for a, b in zip(began, self._now(), strict=True))
        others = max(0.0, (busy - mine) / seconds)
        self.rounds.append((round(average, 2), round(others, 2)))
        if others > QUIET:
            print(f"warning: other processes take {others:.2f} cores (load average {average:.2f}): "
                  "this round is not one of a quiet machine", file=sys.stderr)  # fmt: skip

    def noted(self, rounds: int) -> dict[str, list[float]]:
        """Load average and others' cores before each of the last `rounds` rounds."""
        last = self.rounds[len(self.rounds) - rounds :]
        return {"loadavg_before": [a for a, _ in last], "others_before": [b for _, b in last]}
