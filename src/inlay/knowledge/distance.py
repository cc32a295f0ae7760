"""Semantic distance between knowledge features.

The subject is that of "Semantic are Beacons" (Wang & Li, Findings of ACL 2024). The definitions are ours; that distance
is taken between the model's answer and the right one is second-hand. docs/knowledge.md grades each statement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from inlay.core.errors import InlayError, unknown

Metric = Literal["cosine", "euclidean", "dot"]
METRICS = ("cosine", "euclidean", "dot")
TIE = 1e-6
"""Distances below this are none: identical texts give exactly 0."""


def unit(z: Tensor) -> Tensor:
    """Rows scaled to length 1 in float64 (..., D); zero rows stay zero."""
    z = z.double()
    return z / z.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def is_empty(z: Tensor) -> Tensor:
    """Which features (..., D) stand for no answer at all: all zero (...)."""
    return ~z.bool().any(-1)


def distance(a: Tensor, b: Tensor, metric: Metric = "cosine") -> Tensor:
    """Distance of features a and b, (N, D) or (D,) each, as float64 (N,).

    cosine: 1 - cos(a, b), in [0, 2]. euclidean: of the unit vectors, in [0, 2]. dot: minus the inner product.
    An empty feature counts as orthogonal to everything: 1, sqrt 2 or 0.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if a.shape[-1] != b.shape[-1]:
        raise InlayError(f"features of {a.shape[-1]} and {b.shape[-1]} dimensions are of different spaces")
    if metric == "dot":
        return -(a.double() * b.double()).sum(-1)
    # Half the squared distance of unit vectors: as 1 - cos, but exactly 0 for equal features.
    square = (unit(a) - unit(b)).square().sum(-1)
    square = torch.where(is_empty(a) | is_empty(b), 2.0, square)
    return square / 2 if metric == "cosine" else square.sqrt()


def nearest(answer: Tensor, targets: Sequence[Tensor], metric: Metric = "cosine") -> Tensor:
    """Distance of each answer (N, D) to the nearest of its targets: `targets[n]` is (target and aliases of n, D)."""
    return torch.stack([distance(a[None], own, metric).min() for a, own in zip(answer, targets, strict=True)])


@dataclass(frozen=True)
class Distances:
    """Distances with what must be known of them, all (N,)."""

    d: Tensor
    empty: Tensor
    """No answer: the distance says nothing about meaning."""
    semantic_tie: Tensor
    """At distance 0 without being the right answer, such as the same words in another order."""


def flagged(answer: Tensor, targets: Sequence[Tensor], right: Sequence[bool], metric: Metric = "cosine") -> Distances:
    """Distances to the nearest target with their flags; `right`: which answers match exactly."""
    d = nearest(answer, targets, metric)
    right_N = torch.tensor(list(right), dtype=torch.bool, device=d.device)
    empty = is_empty(answer)
    same = d <= TIE if metric != "dot" else torch.zeros_like(empty)
    return Distances(d, empty, same & ~right_N & ~empty)


def tolerance(space: str) -> float:
    """How far a distance must move to count as moved (tau): 1e-6 among embeddings, 0.01 among hidden states."""
    return TIE if space == "embed" else 0.01
