"""Where sequences stand in a packed batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inlay.core.errors import InlayError
from inlay.core.layout import lay_out, rows_of
from inlay.methods.tokens import Prefix, Prompt

EDITS = {"prompt": Prompt(tokens=3), "prefix": Prefix(tokens=2)}


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_rows_hold_everything_once_and_no_more_than_fits(lengths, width):
    made = rows_of(lengths, width)
    assert sorted(i for row in made for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= width or len(row) == 1 for row in made)


def test_one_row():
    made = lay_out([2, 3], [("prompt",), ()], EDITS)
    assert made.shape == (1, 8)
    assert made.owner_RW.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert made.position_RW.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2]]
    assert made.start_N == (3, 5) and made.index(1, 2) == 7
    assert made.fill([[7, 8], [4, 5, 6]], 0).tolist() == [[0, 0, 0, 7, 8, 4, 5, 6]]
    assert (-made.first["prompt"]).tolist()[:5] == [0, 1, 2, 3, 4]


def test_virtual_tokens_of_two_adapters_stand_side_by_side():
    made = lay_out([2], [("prefix", "prompt")], EDITS)
    assert made.position_RW.tolist() == [[0, 1, 2, 0, 0, 5, 6]], "a prefix's keys keep position 0"
    assert (-made.first["prefix"]).tolist() == [-3, -2, -1, 0, 1, 2, 3]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 12))
def test_sees_is_causal_within_a_sequence_and_blind_outside(lengths, width):
    made = lay_out(lengths, [()] * len(lengths), {}, width=width)
    owner, sees = made.owner_RW, made.sees()
    W = made.shape[1]
    same = (owner[:, :, None] == owner[:, None]) & (owner >= 0)[:, None]
    causal = torch.ones(W, W, dtype=torch.bool).tril()
    assert torch.equal(sees, (same & causal) | torch.eye(W, dtype=torch.bool))


def test_trees():
    made = lay_out([2, 1, 1], [()] * 3, {}, parents=[None, 0, 0])
    assert made.position_RW.tolist() == [[0, 1, 2, 2]]
    assert made.sees()[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]]
    assert lay_out([2, 1, 1], [()] * 3, {}, parents=[None, 0, 1]).families[0].mask_TT is None, "a chain is causal"


@pytest.mark.parametrize(
    ("lengths", "parents", "worn", "match"),
    [
        ([2, 0], None, [(), ()], "empty"),
        ([2, 1], [1, None], [(), ()], "does not stand before"),
        ([2, 1], [None, 0], [(), ("prompt",)], "wears the same"),
    ],
)
def test_refused(lengths, parents, worn, match):
    with pytest.raises(InlayError, match=match):
        lay_out(lengths, worn, EDITS, parents=parents)
