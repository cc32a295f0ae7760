"""Seconds of a LoRA step beside busy processes, by number of threads and by how threads wait for each other.

python scripts/thread_cost.py --busy 1

OpenMP reads OMP_WAIT_POLICY when it is loaded, so each policy has processes of its own, in turns; numbers of threads
take turns within a process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

POLICIES = ("", "PASSIVE", "ACTIVE")


def main() -> None:
    """Print the median step of each case, and the least and most."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="60M", help="a size of benchmarks.bases")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--busy", type=int, default=0, help="processes that compute beside")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps", type=int, default=5, help="of each process and number, after one that is not counted"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print("\n" + json.dumps(child(asked.size, asked.threads, asked.steps)))
        return
    took: dict[str, dict[str, list[float]]] = {policy: {} for policy in POLICIES}
    with busy(asked.busy):
        for _ in range(asked.rounds):
            for policy in POLICIES:
                for number, seconds in one(policy).items():
                    took[policy].setdefault(number, []).extend(seconds)
    print(f"{asked.busy} busy processes, load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    for policy, by_number in took.items():
        for number, seconds in by_number.items():
            name = f"{number} threads, OMP_WAIT_POLICY {policy or 'not set'}"
            print(f"{name:40} {statistics.median(seconds):7.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """Within the block, so many processes compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def one(policy: str) -> dict[str, list[float]]:
    """Seconds of the steps of a fresh process, by its number of threads."""
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment |= {"OMP_WAIT_POLICY": policy} if policy else {}
    made = subprocess.run(
        [sys.executable, *sys.argv, "--child"], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(made.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def child(size: str, numbers: list[int], steps: int) -> dict[int, list[float]]:
    """Train a few steps with each number of threads."""
    from benchmarks.bound import Steps
    from inlay.threads import set_threads

    way = Steps(size, "fp32", "math")
    way.cut = way.cut[:1]
    seconds: dict[int, list[float]] = {number: [] for number in numbers}
    for step in range(steps + 1):
        for number in numbers:
            set_threads(number)
            began = time.monotonic()
            way.run("lora")
            if step:
                seconds[number].append(time.monotonic() - began)
    return seconds


if __name__ == "__main__":
    main()
