"""The versions of other libraries that Inlay is tested with: the single source of `pyproject.toml`'s lower bounds.

Only package metadata is read; nothing is imported. Below `oldest`, importing Inlay (for an optional library: its first
use) fails with the command that cures it. Above `newest`, one warning is given per library, since what Inlay assumes of
a library is also checked where it is used; `INLAY_UNTESTED=1` silences it.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from dataclasses import dataclass
from importlib import metadata

SILENT = "INLAY_UNTESTED"
"""Environment variable: set to 1, versions newer than the tested ones are used without a warning."""


@dataclass(frozen=True)
class Range:
    """The versions of one library that passed the tests.

    Args:
        package: its name for pip.
        oldest: lowest version that is supported; also the lower bound in `pyproject.toml`.
        newest: highest version that was tested.
        required: whether Inlay itself needs the library (else an extra does).
    """

    package: str
    oldest: str
    newest: str
    required: bool = False


TESTED = (
    Range("torch", "2.6", "2.15.0", required=True),
    Range("transformers", "5.2", "5.24.0", required=True),
    Range("numpy", "2.0", "2.5.5", required=True),
    Range("accelerate", "1.4", "1.15.0"),
    Range("peft", "0.18", "0.21.2"),
    Range("trl", "1.0", "1.16.0"),
    Range("lm_eval", "0.4.9", "0.4.13"),
    Range("gradio", "6.0", "6.31.0"),
)
OLDEST_PYTHON = (3, 10)
"""Also `requires-python` in `pyproject.toml`."""
RANGES = {r.package: r for r in TESTED}
_checked: set[str] = set()


class VersionError(ImportError):
    """An installed library is older than the oldest version that Inlay works with."""


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version up to its first part that is none: `2.13.0+cpu` is (2, 13, 0), `5.0.0rc1` (5, 0, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def compare(a: str, b: str) -> int:
    """-1, 0 or 1: whether version `a` is older than, equal to or newer than `b`; missing parts count as 0.

    A pre-release (`5.0.0rc1`, `2.6.0.dev1`) is older than its release. Local parts (`+cpu`) are ignored.
    """
    x, y = release(a), release(b)
    width = max(len(x), len(y))
    x, y = x + (0,) * (width - len(x)), y + (0,) * (width - len(y))
    return (x > y) - (x < y) or _is_pre_release(b) - _is_pre_release(a)


def _is_pre_release(version: str) -> bool:
    return re.search(r"\d[._-]?(a|b|rc|alpha|beta|dev|pre)\.?\d*", version.partition("+")[0]) is not None


def installed(package: str) -> str | None:
    """The installed version of a package by its metadata; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check(package: str) -> None:
    """Compare an installed library with its tested range, once per process; one that is not installed passes.

    Raises:
        VersionError: it is older than `Range.oldest`.
    """
    if package in _checked:
        return
    tested, found = RANGES[package], installed(package)
    if found is not None and compare(found, tested.oldest) < 0:
        raise VersionError(
            f"{package} {found} is installed, Inlay needs {tested.oldest} or newer: "
            f"pip install -U '{package}>={tested.oldest}'"
        )
    _checked.add(package)
    newer = found is not None and compare(found, tested.newest) > 0
    if newer and os.environ.get(SILENT) != "1":
        warnings.warn(
            f"Inlay is not yet tested with {package} {found} (newest: {tested.newest}); {SILENT}=1 silences this",
            stacklevel=2,
        )


def check_required() -> None:
    """Check the libraries that Inlay itself needs; called by `import inlay`. Costs about 2 ms of metadata reading."""
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        raise VersionError(f"this is Python {sys.version.split()[0]}, Inlay needs Python {needed} or newer")
    for tested in TESTED:
        if tested.required:
            check(tested.package)


def named(package: str) -> str:
    """`transformers 5.24.0`, for messages; the bare name where no version is known."""
    return f"{package} {installed(package) or ''}".rstrip()
