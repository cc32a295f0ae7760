"""Reading YAML files that others wrote: plain values, of a bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from inlay.core.errors import InlayError

MOST_BYTES = 1 << 20
MOST_VALUES = 100_000
"""Values that a file may hold, each alias counted as what it stands for."""


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds.

    Raises:
        InlayError: it cannot be read, is no YAML, or holds more than `MOST_VALUES` values once aliases are written out
            (ten lines of aliases of aliases stand for ten billion).
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InlayError(f"{path} has {path.stat().st_size:,} bytes; settings take {MOST_BYTES:,} at most")
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = _count(found, {})
    except OSError as e:
        raise InlayError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InlayError(f"{path} is not UTF-8 text: {e}") from e
    except (yaml.YAMLError, ValueError) as e:
        if isinstance(e, InlayError):
            raise
        raise InlayError(f"{path} is no YAML: {e}") from e
    except RecursionError as e:
        raise InlayError(f"{path} is nested too deeply to be settings") from e
    if values > MOST_VALUES:
        raise InlayError(f"{path} stands for over {MOST_VALUES:,} values: its aliases repeat one another; write it out")
    return found


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a structure; what is shared is counted wherever it stands, and what contains itself without end."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1  # met again below itself
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(v, known) for v in inner)
    return known[id(value)]
