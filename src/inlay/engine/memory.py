"""What memory the system has left, and keeping what this process has already touched."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRIM, MAP = -1, -3
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD (malloc.h)."""
USUAL = {TRIM: 64 << 20, MAP: 32 << 20}
"""What glibc's thresholds grow to by themselves in a process that frees large blocks."""


def available() -> int | None:
    """Bytes that could be claimed without swapping; None where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)


@functools.cache
def _glibc() -> Any:
    """The C library, if it is glibc and nobody has tuned its heap from outside."""
    if platform.libc_ver()[0] != "glibc" or any(k.startswith(("MALLOC_", "GLIBC_TUNABLES")) for k in os.environ):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "mallopt") else None


_blocks = 0
"""Blocks that are open now, one within another or in several threads."""
_lock = threading.Lock()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within the block, memory that is freed stays with the process; under glibc only, and if nobody has tuned its heap
    from outside.

    By default glibc hands the top of its heap back whenever some 64 MiB of it are free, and a training step asks for it
    again a moment later: every page is then cleared and mapped anew, up to 170,000 of them in four steps of a 60M base
    in bfloat16.
    """
    global _blocks
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _blocks += 1
        for threshold in USUAL:
            library.mallopt(threshold, 2**31 - 1)
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                for threshold, usual in USUAL.items():
                    library.mallopt(threshold, usual)
