"""Measuring: interleaved rounds, fresh processes for memory, and what is recorded of a result."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks.json"
PACKAGES = ("torch", "numpy", "transformers", "peft", "accelerate", "lm_eval", "adapters", "trl")
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that say how threads wait for one another: they decide the time on a busy machine."""


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    workload: str
    metric: str
    """`times faster` (peer / ours) or `times the peer's` (ours / peer)."""
    ours: float
    peer: float
    unit: str
    peer_is: str
    ratio: float
    low: float
    high: float
    """Smallest and largest ratio of a round."""
    rounds: int
    note: str = ""
    cpu_ratio: float | None = None
    """The same ratio of CPU seconds (all threads), where time is compared."""


class Took(NamedTuple):
    """Seconds: by the clock, and of this process's CPUs."""

    wall: float
    cpu: float

    def since(self) -> Took:
        """What has passed since `clock` gave this."""
        now = clock()
        return Took(now.wall - self.wall, now.cpu - self.cpu)


def clock() -> Took:
    """Now; work sent to a GPU is waited for."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return Took(time.perf_counter(), time.process_time())


def total(parts: Iterable[Took]) -> Took:
    """One after the other."""
    walls, cpus = zip(*parts, strict=True)
    return Took(sum(walls), sum(cpus))


def rounds(
    variants: Mapping[str, Callable[[], object]], number: int, before: Callable[[], None] = lambda: None
) -> dict[str, list[Took]]:
    """Time of each variant in each round, one after another within a round; a first round is thrown away.

    A variant may return its own `Took`, where part of its work is not to be counted.

    Args:
        before: called before each round that counts.
    """
    found: dict[str, list[Took]] = {name: [] for name in variants}
    for turn in range(number + 1):
        if turn:
            before()
        for name, run in variants.items():
            began = clock()
            told = run()
            took = told if isinstance(told, Took) else began.since()
            if turn:
                found[name].append(took)
    return found


FASTER, SHARE = "times faster", "times the peer's"


def compare(
    workload: str, metric: str, ours: Sequence[float], peer: Sequence[float], unit: str, peer_is: str, note: str = ""
) -> Result:
    """One result from the numbers of every round; the ratio is the median of the rounds' own."""
    each = [p / o if metric == FASTER else o / p for o, p in zip(ours, peer, strict=True)]
    middle = round(statistics.median(each), 3), round(min(each), 3), round(max(each), 3)
    values = round(statistics.median(ours), 5), round(statistics.median(peer), 5)
    return Result(workload, metric, *values, unit, peer_is, *middle, len(each), note)


def faster(workload: str, ours: Sequence[Took], peer: Sequence[Took], peer_is: str, note: str = "") -> Result:
    """How many times faster by the clock, with the ratio of CPU seconds beside it."""
    walls, cpus = ([[t[i] for t in side] for side in (ours, peer)] for i in (0, 1))
    made = compare(workload, FASTER, *walls, "s", peer_is, note)
    return replace(made, cpu_ratio=compare(workload, FASTER, *cpus, "s", peer_is).ratio)


def peak(*arguments: str) -> float:
    """Peak resident MiB of a fresh `python -m benchmarks.child ...`."""
    return _child(*arguments)[-1]


def above(*arguments: str) -> float:
    """MiB that training adds, at its peak, to such a process that holds weights, adapter and all that it imports."""
    idle, most = _child(*arguments)
    return most - idle


def _child(*arguments: str) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.child", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if made.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{made.stderr[-2000:]}")
    return [float(x) for x in made.stdout.splitlines()[-1].split()]


def own_peak() -> float:
    """Peak resident MiB of this process. (Not getrusage's: that remembers the parent's size from before exec.)"""
    return _status("VmHWM")


def settle() -> float:
    """Give free memory back and let the peak begin anew, so that loading is not in it; resident MiB now."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # a C library without it
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # not allowed in some containers: then loading is in the peak
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "environment": {name: os.environ[name] for name in WAITING if name in os.environ},
        "python": platform.python_version(),
        "packages": found,
    }


@functools.cache
def state(package: Path | None = None) -> str:
    """Which Inlay was measured: its commit, with a + where files differ from it; the version where there is no git."""
    import inlay  # here: AdapterHub's environment, which uses this module too, has none

    package = package or Path(inlay.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(package), *words], capture_output=True, text=True, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # not the repository of a project that Inlay is installed in
        commit, changed = git("rev-parse", "--short=7", "HEAD").strip(), git("status", "--porcelain", ".")
    except (OSError, subprocess.CalledProcessError):
        return inlay.__version__
    return f"{commit}+" if changed else commit


def record(result: Result, command: str, load: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Put a result into the file, in place of an older one of the same workload and peer on
    this processor.

    Args:
        load: what ran beside it: `Watch.told`, and where noted `Watch.noted` and `beside`, the busy loops asked for.
    """
    there = json.loads(path.read_text()) if path.exists() else []
    here = machine()

    def same(r: Mapping) -> bool:
        return (r["workload"], r["peer_is"], r["machine"]["processor"]) == (
            result.workload, result.peer_is, here["processor"])  # fmt: skip

    there = [r for r in there if not same(r)]
    about = {"command": command, "date": date.today().isoformat(), "inlay": state(), "load": load, "machine": here}
    there.append({**asdict(result), **about})
    path.write_text(json.dumps(sorted(there, key=lambda r: r["workload"]), indent=1) + "\n")
