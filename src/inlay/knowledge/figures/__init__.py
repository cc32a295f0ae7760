"""Figures of knowledge learning: each a picture, the numbers in it, and two sentences that explain it."""

from inlay.knowledge.figures.curves import accuracy, deviations, distances, state_shares, trajectories
from inlay.knowledge.figures.outcomes import (
    controls,
    filter_front,
    interference,
    kept_histogram,
    retention_front,
    weight_histogram,
)
from inlay.knowledge.figures.space import frame, heat_map, panels
from inlay.knowledge.figures.style import Drawn

__all__ = [
    "Drawn",
    "accuracy",
    "controls",
    "deviations",
    "distances",
    "filter_front",
    "frame",
    "heat_map",
    "interference",
    "kept_histogram",
    "panels",
    "retention_front",
    "state_shares",
    "trajectories",
    "weight_histogram",
]
