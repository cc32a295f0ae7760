"""Known shapes: built on the meta device, each has exactly the parameters that its authors publish."""

from __future__ import annotations

import pytest

from inlay.models.shapes import ALIASES, SHAPES, shape
from inlay.plan.skeleton import parameters, skeleton


@pytest.mark.parametrize("name", SHAPES)
def test_total(name):
    assert parameters(skeleton(name)) == SHAPES[name].total


def test_aliases_lead_to_shapes():
    assert set(ALIASES.values()) <= set(SHAPES)
    assert not set(ALIASES) & set(SHAPES)
    assert shape("BLOOMZ-7B") is SHAPES["bloom-7b1"] is shape("bigscience/bloomz-7b1")
    assert shape("meta-llama/Llama-3.1-8B") is SHAPES["llama-3.1-8b"]
    assert shape("my/own") is None
