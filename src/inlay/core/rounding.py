"""How far two ways of computing the same numbers may differ."""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype) -> float:
    """Largest relative difference that a trial accepts between two ways of computing the same in this type."""
    return 1e-4 if dtype.itemsize >= 4 else 3e-2
