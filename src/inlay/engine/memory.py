"""How much memory the system has left."""

from __future__ import annotations

from pathlib import Path


def available() -> int | None:
    """Bytes that could be claimed without swapping; None where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
