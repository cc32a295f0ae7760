"""How features are spread, in numbers that need no projection. Rows are brought to length 1 first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.states import unit


def spread(z_ND) -> float:
    """1 - |mean of unit features|^2: their variance, 0 where all point the same way."""
    return float(1 - np.square(unit(z_ND).mean(0)).sum())


def mutual_distance(z_ND) -> float:
    """Mean cosine distance over all pairs; equals k/(k-1) times `spread` for unit features. NaN for fewer than two."""
    z = unit(z_ND)
    k = len(z)
    if k < 2:
        return float("nan")
    cosine = z @ z.T
    return float(1 - (cosine.sum() - np.trace(cosine)) / (k * (k - 1)))


def participation_ratio(z_ND) -> float:
    """(sum of eigenvalues)^2 / sum of their squares, of the covariance: how many directions share the variance."""
    z = unit(z_ND)
    values = np.square(np.linalg.svd(z - z.mean(0), compute_uv=False))
    return float(values.sum() ** 2 / np.square(values).sum()) if values.sum() > 1e-12 else 0.0


def silhouette(z_ND, labels: Sequence[str]) -> float:
    """Mean silhouette of the labels under cosine distance (Rousseeuw 1987), from -1 to 1; NaN where it is undefined."""
    from sklearn.metrics import silhouette_score

    z, kinds = unit(z_ND), set(labels)
    if not 1 < len(kinds) < len(z):
        return float("nan")
    return float(silhouette_score(z, list(labels), metric="cosine"))


def ranks(said_ND, target_ND) -> np.ndarray:
    """Rank (N,) of each item's own target among the distinct targets, by cosine to what it says; 1 is the nearest.

    Targets at the own one's distance do not count as nearer, so items that share a target do not confuse each other.
    """
    said, target = unit(said_ND), unit(target_ND)
    if said.shape != target.shape:
        raise InlayError(f"an answer and a target per item: {said.shape} here, {target.shape} there")
    distinct, own = np.unique(target.round(9), axis=0, return_inverse=True)
    cosine = said @ distinct.T
    mine = cosine[np.arange(len(said)), own.reshape(-1)]
    return 1 + (cosine > mine[:, None] + 1e-9).sum(1)


def confusion(said_ND, target_ND) -> float:
    """Share of items that are nearer to another item's target than to their own."""
    return float(np.mean(ranks(said_ND, target_ND) > 1))


def neighbourhoods(z_ND, k: int = 5) -> np.ndarray:
    """Mean cosine distance (N,) of each feature to its k nearest others: small in tight clusters."""
    z = unit(z_ND)
    if len(z) < 2:
        raise InlayError("neighbours need at least two features")
    far = 1 - z @ z.T
    np.fill_diagonal(far, np.inf)
    return np.sort(far, 1)[:, : min(k, len(z) - 1)].mean(1)


def numbers(target_ND, relation: Sequence[str], said_ND=None) -> dict[str, float]:
    """All of the above by name; confusion and rank where answers are given."""
    made = {
        "spread": spread(target_ND),
        "mutual_distance": mutual_distance(target_ND),
        "participation_ratio": participation_ratio(target_ND),
        "silhouette_of_relations": silhouette(target_ND, relation),
    }
    if said_ND is not None:
        own = ranks(said_ND, target_ND)
        made |= {"confusion": float(np.mean(own > 1)), "median_rank": float(np.median(own))}
    return made
