"""Measuring: interleaved rounds, fresh processes for memory, and what is recorded of a result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parents[1] / "docs" / "benchmarks.json"
PACKAGES = ("torch", "transformers", "peft", "lm_eval", "adapters")


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


def rounds(variants: Mapping[str, Callable[[], object]], number: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, one after another within a round; a first round is thrown away.

    A variant may return its own seconds (a float), where part of its work is not to be counted.
    """
    found: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(number + 1):
        for name, run in variants.items():
            began = time.perf_counter()
            told = run()
            seconds = told if isinstance(told, float) else time.perf_counter() - began
            if turn:
                found[name].append(seconds)
    return found


def faster(workload: str, seconds: Mapping[str, list[float]], peer_is: str, note: str = "") -> Result:
    """`ours` against `peer`: how many times faster."""
    each = [p / o for p, o in zip(seconds["peer"], seconds["ours"], strict=True)]
    middle = {k: statistics.median(v) for k, v in seconds.items()}
    return Result(
        workload,
        "times faster",
        round(middle["ours"], 5),
        round(middle["peer"], 5),
        "s",
        peer_is,
        round(statistics.median(each), 3),
        round(min(each), 3),
        round(max(each), 3),
        len(each),
        note,
    )


def share(workload: str, ours: list[float], peer: list[float], unit: str, peer_is: str, note: str = "") -> Result:
    """How many times what the peer takes: memory, or time over a bound."""
    each = [o / p for o, p in zip(ours, peer, strict=True)]
    return Result(
        workload,
        "times the peer's",
        round(statistics.median(ours), 5),
        round(statistics.median(peer), 5),
        unit,
        peer_is,
        round(statistics.median(each), 3),
        round(min(each), 3),
        round(max(each), 3),
        len(each),
        note,
    )


def peak(*arguments: str) -> float:
    """Peak resident MiB of a fresh `python -m benchmarks.child ...`."""
    command = [sys.executable, "-m", "benchmarks.child", *arguments]
    made = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if made.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{made.stderr[-2000:]}")
    return float(made.stdout.split()[-1])


def own_peak() -> float:
    """Peak resident MiB of this process. (Not getrusage's: that remembers the parent's size from before exec.)"""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


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
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "packages": found,
    }


def record(result: Result, command: str, path: Path = RESULTS) -> None:
    """Put a result into the file, in place of an older one of the same workload and peer."""
    there = json.loads(path.read_text()) if path.exists() else []
    there = [r for r in there if (r["workload"], r["peer_is"]) != (result.workload, result.peer_is)]
    load = [round(x, 2) for x in os.getloadavg()]
    about = {"command": command, "date": date.today().isoformat(), "load": load, "machine": machine()}
    there.append({**asdict(result), **about})
    path.write_text(json.dumps(sorted(there, key=lambda r: r["workload"]), indent=1) + "\n")
