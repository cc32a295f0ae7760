"""Distances by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.core.errors import InlayError
from inlay.knowledge.distance import distance, flagged, is_empty, nearest


def t(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def test_published_values():  # check 1
    d = distance(t((3, 0), (1, 0), (1, 0)), t((1, 0), (0, 1), (-1, 0)))
    assert torch.allclose(d, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64), atol=1e-6)
    assert d[0] == 0


def test_an_empty_feature_is_orthogonal_to_everything():  # check 1
    zero = torch.zeros(1, 2)
    assert distance(zero, t((1, 0))).item() == 1.0 and distance(zero, zero).item() == 1.0
    assert distance(zero, t((1, 0)), "euclidean").item() == pytest.approx(math.sqrt(2))
    assert distance(zero, t((1, 0)), "dot").item() == 0.0
    found = flagged(zero, [t((1, 0))], [False])
    assert found.empty.tolist() == [True] and found.semantic_tie.tolist() == [False] and found.d.tolist() == [1.0]


def test_mean_of_two_tokens_against_one():  # check 2
    assert distance(t((0.5, 0.5)), t((1, 0))).item() == pytest.approx(0.292893, abs=1e-6)
    same = flagged(t((0.5, 0.5), (0.5, 0.5)), [t((0.5, 0.5))] * 2, [False, True])
    assert same.d.tolist() == [0, 0] and same.semantic_tie.tolist() == [True, False]


def test_metrics():
    a, b = t((3, 0)), t((0, 2))
    assert distance(a, b, "euclidean").item() == pytest.approx(math.sqrt(2))
    assert distance(a, t((2, 5)), "dot").item() == -6
    with pytest.raises(InlayError, match="cosine, dot, euclidean"):
        distance(a, b, "l1")
    with pytest.raises(InlayError, match="different spaces"):
        distance(a, torch.ones(1, 3))


def test_the_nearest_of_several_targets_counts():
    assert nearest(t((1, 0), (0, 1)), [t((0, 1), (1, 0)), t((1, 0))]).tolist() == [0, 1]


@given(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), st.integers(0, 10))
def test_within_bounds_and_symmetric_and_zero_to_itself(values, seed):
    a = torch.tensor([values])
    b = torch.randn(1, 3, generator=torch.Generator().manual_seed(seed))
    d = distance(a, b).item()
    assert 0 <= d <= 2 + 1e-12 and d == distance(b, a).item()
    assert is_empty(a).item() or distance(a, a).item() == 0
    near = 1 - torch.nn.functional.cosine_similarity(a.double(), b.double()).item()
    if a.norm() > 1e-3:
        assert d == pytest.approx(near, abs=1e-9)
