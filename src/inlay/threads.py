"""How many CPU threads to compute with: what this process may use, less what other processes keep busy.

PyTorch starts one thread per core that it sees and waits for all of them at the end of every operation. One core that
another process keeps busy then holds up all the others, and a container's CPU quota, which PyTorch does not read, stops
every thread in mid-operation once it is used up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from inlay.core.errors import InlayError

SAMPLE_SECONDS = 0.1
"""For how long the load of other processes is observed."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables by which a user chooses PyTorch's number of threads."""
_TOPOLOGY = Path("/sys/devices/system/cpu")
_CGROUPS = Path("/sys/fs/cgroup")
_last_default: int | None = None
"""What `set_threads(None)` set: not a user's choice when it is called again."""


@dataclass(frozen=True, kw_only=True)
class ThreadSettings:
    """What all commands that compute have in common; the command line obeys it before it runs one."""

    threads: int | None = None
    """CPU threads to compute with. If not given: as many as OMP_NUM_THREADS or MKL_NUM_THREADS says, else the cores
    that this process may use and that no other process keeps busy. Another number may round results differently."""


def set_threads(threads: int | None) -> int:
    """Set the number of CPU threads that PyTorch computes with, and return the number in use.

    Args:
        threads: the number, which may exceed the number of cores. None: leave what the user chose by
            `OMP_NUM_THREADS`, `MKL_NUM_THREADS` or `torch.set_num_threads`; otherwise take `default_threads()`.

    Raises:
        InlayError: if `threads` is below 1.
    """
    if threads is not None and threads < 1:
        raise InlayError(f"threads must be at least 1, not {threads}; leave it out for a sensible default.")
    import torch

    global _last_default
    if threads is None:
        if _chosen_by_user(torch.get_num_threads()):
            return torch.get_num_threads()
        threads = _last_default = default_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def keep_threads(threads: int | None) -> int:
    """Take the number of threads of a run that is resumed, so that sums keep their order, and return the number in use.

    Nothing changes where the number in use is the user's choice, or PyTorch's, or where this machine has fewer cores.
    """
    import torch

    now = torch.get_num_threads()
    if threads is not None and threads != now == _last_default and threads <= usable_cores():
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def default_threads() -> int:
    """Cores that this process may use and that no other process keeps busy; at least 1."""
    return max(1, min(usable_cores(), round(cpu_quota() - busy_elsewhere())))


def usable_cores() -> int:
    """Physical cores among the CPUs that this process may run on (its affinity); hyperthreads of a core count once."""
    return len({_core_of(cpu) for cpu in _affinity()})


def cpu_quota() -> float:
    """CPUs' worth of time that this process may use: the smallest quota of its control groups, or its affinity."""
    return min([*_quotas(), float(len(_affinity()))])


def busy_elsewhere(seconds: float = SAMPLE_SECONDS) -> float:
    """How many of this process's CPUs other processes keep busy now, observed for some time; 0 where unknown.

    Taken from /proc/stat and not from the load average, which remembers for minutes what has ended and notices late
    what has begun. Time of other machines on the same host ("steal") counts, time of low-priority ("nice") processes
    does not: they give way.
    """
    before, own = _busy_ticks(), time.process_time()
    if before is None:
        return 0.0
    start = time.monotonic()
    time.sleep(seconds)
    after, passed = _busy_ticks(), time.monotonic() - start
    if after is None:
        return 0.0
    others = (after - before) / os.sysconf("SC_CLK_TCK") - (time.process_time() - own)
    return max(0.0, others / passed)


def _chosen_by_user(now: int) -> bool:
    """Whether the number of threads is a user's choice: by the environment, or because no default explains it."""
    if any(os.environ.get(name) for name in THREAD_VARIABLES):
        return True
    return now not in (len(_affinity()), usable_cores(), os.cpu_count(), _last_default)


def _affinity() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> tuple[str, str] | int:
    """(socket, core) of a logical CPU; the CPU itself where the system does not tell."""
    folder = _TOPOLOGY / f"cpu{cpu}" / "topology"
    try:
        return (folder / "physical_package_id").read_text().strip(), (folder / "core_id").read_text().strip()
    except OSError:
        return cpu


def _busy_ticks() -> int | None:
    """Clock ticks that this process's CPUs have spent in user, system, interrupts and steal; None without /proc."""
    cpus = {f"cpu{c}" for c in _affinity()}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    # Columns (man 5 proc): user, nice, system, idle, iowait, irq, softirq, steal.
    return sum(int(line[i]) for line in lines if line and line[0] in cpus for i in (1, 3, 6, 7, 8))


def _quotas() -> Iterator[float]:
    """CPU quotas of this process's control groups and of all groups above them (versions 1 and 2), in CPUs."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        yield from _quotas_of(line)


def _quotas_of(line: str) -> Iterator[float]:
    """The quotas that one line of /proc/self/cgroup, `ID:CONTROLLERS:PATH`, puts this process under."""
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    # Version 1 mounts each set of controllers in a folder; version 2 is the root itself, or `unified` beside version 1.
    for root in {_CGROUPS / name for name in (("cpu", controllers) if controllers else ("", "unified"))}:
        folder = root / path.strip("/")
        for group in (folder, *folder.parents):
            if (quota := _quota(group)) is not None:
                yield quota
            if group == root:
                break


def _quota(folder: Path) -> float | None:
    """The quota set in one group's folder: `cpu.max` (version 2) or `cpu.cfs_quota_us` (version 1)."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
