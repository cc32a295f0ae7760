"""Training: one adapter on one base, to the last bit repeatable and resumable."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOME = {
    **dict.fromkeys(
        ("TrainSettings", "DataSettings", "OptimSettings", "RunSettings", "read_recipe"), "inlay.train.settings"
    ),
    **dict.fromkeys(("fit", "RunResult"), "inlay.train.fitting"),
    "train": "inlay.train.run",
}
__all__ = ["DataSettings", "OptimSettings", "RunResult", "RunSettings", "TrainSettings", "fit", "read_recipe", "train"]

if TYPE_CHECKING:
    from inlay.train.fitting import RunResult, fit
    from inlay.train.run import train
    from inlay.train.settings import DataSettings, OptimSettings, RunSettings, TrainSettings, read_recipe


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'inlay.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
