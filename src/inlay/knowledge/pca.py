"""Pictures of features that cannot mislead: one basis for all panels, fixed signs, and radii that are distances."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from inlay.core.errors import InlayError
from inlay.knowledge.states import TAU, unit


@dataclass(frozen=True)
class Basis:
    """Principal axes, fitted once and used in every panel."""

    mean_D: np.ndarray
    axes_KD: np.ndarray
    ratio: np.ndarray
    """Share of the variance that each axis explains (K,)."""

    def __call__(self, z_ND) -> np.ndarray:
        """Coordinates (N, K)."""
        made: np.ndarray = (np.asarray(z_ND, np.float64) - self.mean_D) @ self.axes_KD.T
        return made


def basis(z_ND, k: int = 2, center: bool = True) -> Basis:
    """The first k principal axes of features (N, D); each axis has its largest loading positive.

    Axes beyond the rank of the features are zero.
    """
    z = np.asarray(z_ND, np.float64)
    if z.ndim != 2 or not len(z):
        raise InlayError(f"principal axes need features (N, D), not {z.shape}")
    mean = z.mean(0) if center else np.zeros(z.shape[1])
    _, sizes, axes = np.linalg.svd(z - mean, full_matrices=False)
    total = np.square(sizes).sum()
    ratio = np.square(sizes) / total if total > 0 else np.zeros_like(sizes)
    kept = np.zeros((k, z.shape[1]))
    kept[: len(axes[:k])] = np.where(sizes[:k, None] > 1e-9 * max(sizes[0], 1e-300), axes[:k], 0)
    sign = np.sign(kept[np.arange(k), np.abs(kept).argmax(1)])
    return Basis(mean, kept * np.where(sign == 0, 1, sign)[:, None], np.pad(ratio[:k], (0, max(0, k - len(ratio)))))


@dataclass(frozen=True)
class TargetFrame:
    """Items seen from their own targets, which all stand at the origin."""

    radius: np.ndarray
    """Distance from the target, exactly, per snapshot (S, N)."""
    angle: np.ndarray
    """Direction in the first two principal axes of the starting offsets (S, N), radians."""
    colour: np.ndarray
    """Per item (N,), first snapshot to last: `green` nearer, `red` farther, `grey` unchanged."""
    basis: Basis

    def points(self) -> np.ndarray:
        """Cartesian (S, N, 2)."""
        return self.radius[..., None] * np.stack([np.cos(self.angle), np.sin(self.angle)], -1)


def target_frame(said_SND, target_ND, distance_SN, tau: float = TAU) -> TargetFrame:
    """Snapshots' answer features relative to the targets': polar, radius = distance.

    A plain projection of the offsets would show some items nearer that went away; here radius and colour come from the
    same distances.

    Args:
        said_SND: features of the answers per snapshot, the base's first.
        distance_SN: their distances from the targets, as measured.
    """
    target, distance = unit(target_ND), np.asarray(distance_SN, float)
    offset = np.stack([unit(z) - target for z in said_SND])
    if distance.shape != offset.shape[:2]:
        raise InlayError(f"distances {distance.shape} for offsets {offset.shape[:2]}: one each per snapshot and item")
    axes = basis(offset[0], 2, center=False)
    flat = np.stack([axes(u) for u in offset])
    delta = distance[-1] - distance[0]
    colour = np.where(delta > tau, "red", np.where(delta < -tau, "green", "grey"))
    return TargetFrame(distance, np.arctan2(flat[..., 1], flat[..., 0]), colour, axes)
