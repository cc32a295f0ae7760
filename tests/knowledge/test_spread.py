"""Spread, principal axes and the target frame: identities, refits, and pictures that agree with their numbers."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.pca import basis, target_frame
from inlay.knowledge.spread import (
    confusion,
    mutual_distance,
    neighbourhoods,
    numbers,
    participation_ratio,
    ranks,
    silhouette,
    spread,
)


def cloud(n=40, d=16, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


@pytest.mark.parametrize("k", [2, 3, 17, 200])
def test_mean_pairwise_distance_is_the_spread_of_unit_vectors(k):
    z = cloud(k) + 0.5
    assert mutual_distance(z) == pytest.approx(k / (k - 1) * spread(z), abs=1e-10)
    one = z / np.linalg.norm(z, axis=1, keepdims=True)
    pairs = [1 - one[i] @ one[j] for i in range(k) for j in range(i)]
    assert mutual_distance(z) == pytest.approx(np.mean(pairs), abs=1e-10)


def test_participation_ratio_counts_directions():
    assert participation_ratio(np.concatenate([np.eye(8), -np.eye(8)])) == pytest.approx(8)
    assert participation_ratio(np.ones((5, 4))) == 0
    line = np.array([[1.0, 0, 0], [-1.0, 0, 0]])
    assert participation_ratio(line) == pytest.approx(1)


def test_silhouette_of_separate_relations_is_near_one():
    z = np.repeat(np.eye(4)[:2], 10, 0) + 0.01 * cloud(20, 4)
    assert silhouette(z, ["a"] * 10 + ["b"] * 10) > 0.95
    assert np.isnan(silhouette(z, ["a"] * 20))


def test_confusion_counts_items_nearer_to_anothers_target():
    target = np.eye(3)
    assert confusion(target, target) == 0
    assert confusion(target[[1, 0, 2]], target) == pytest.approx(2 / 3)
    assert ranks(np.array([[0.9, 0.5, 0.1]] * 3), target).tolist() == [1, 2, 3]
    assert confusion(np.eye(3)[[0, 0]], np.eye(3)[[0, 0]]) == 0, "a shared target confuses nobody"
    assert set(numbers(target, ["r"] * 3, target)) >= {"spread", "confusion", "median_rank"}


def test_tight_clusters_have_near_neighbours():
    z = np.concatenate([np.eye(12)[:1] + 0.01 * cloud(6, 12), cloud(6, 12, 1)])
    near = neighbourhoods(z, 3)
    assert near[:6].max() < near[6:].min()


def test_a_line_has_one_axis_and_refits_have_the_same_signs():
    way = np.random.default_rng(2).normal(size=64)
    z = np.linspace(-1, 1, 30)[:, None] * way + 3
    made = basis(z, 2)
    assert made.ratio[0] == pytest.approx(1, abs=1e-6)
    other = basis(z[::-1], 2)
    assert np.allclose(made.axes_KD, other.axes_KD) and (made(z) == basis(z, 2)(z)).all()
    z = cloud(50, 8)
    assert np.allclose(basis(z, 3).axes_KD, basis(-z + 2 * z.mean(0), 3).axes_KD), "mirrored points, the same axes"
    a = basis(z, 3).axes_KD
    assert (a[np.arange(3), np.abs(a).argmax(1)] > 0).all()


def test_one_basis_serves_every_panel():
    z = cloud(60, 10)
    made = basis(z)
    assert np.allclose(np.concatenate([made(z[:20]), made(z[20:])]), made(z))


def test_more_axes_than_directions_are_zero():
    made = basis(np.array([[1.0, 2.0], [1.0, 2.0]]), 3)
    assert not made.axes_KD.any() and made.ratio.tolist() == [0, 0, 0]


def distances(said, target):
    said, target = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (said, target))
    return 1 - (said * target).sum(-1)


def test_radius_is_the_distance_and_colour_the_sign_of_its_change():
    target = cloud(30, 12, 1)
    said = np.stack([cloud(30, 12, s) for s in (2, 3, 4)])
    said[2, :5] = said[0, :5]
    d = np.stack([distances(s, target) for s in said])
    frame = target_frame(said, target, d)
    assert np.linalg.norm(frame.points(), axis=-1) == pytest.approx(d, abs=1e-6)
    want = np.where(d[2] > d[0] + 1e-6, "red", np.where(d[2] < d[0] - 1e-6, "green", "grey"))
    assert (frame.colour == want).all() and (frame.colour[:5] == "grey").all()
    with pytest.raises(InlayError, match="one each"):
        target_frame(said, target, d[:2])
