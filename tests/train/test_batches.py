"""Order, padding and digests are pure functions of what they are given."""

from __future__ import annotations

import pytest
import torch

from inlay.train.batches import Feed, collate, digest, learned, order
from tests.train.tiny import Row, rows


@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("n", [1, 4, 37, 403])
def test_each_epoch_sees_every_example_once(n, group):
    lengths = [5 + i % 11 for i in range(n)]
    epochs = [order(lengths, 7, e, group) for e in range(3)]
    assert all(sorted(e) == list(range(n)) for e in epochs)
    assert epochs == [order(lengths, 7, e, group) for e in range(3)]
    if n > 4:
        assert epochs[0] != epochs[1] and order(lengths, 8, 0, group) != epochs[0]


def test_grouping_saves_padding():
    lengths = [1 + (i * 7919) % 97 for i in range(1000)]

    def padding(chosen):
        runs = [[lengths[i] for i in chosen[at : at + 8]] for at in range(0, 1000, 8)]
        return sum(max(r) * len(r) - sum(r) for r in runs)

    assert padding(order(lengths, 0, 0, 8)) < 0.2 * padding(order(lengths, 0, 0))


def test_a_step_is_the_same_however_it_is_reached():
    data = rows(23)
    forward = Feed(data, 4, 1, True)
    walked = [forward.step(i) for i in range(14)]
    assert forward.per_epoch == 6 and [len(s) for s in walked[:6]] == [4, 4, 4, 4, 4, 3]
    for i in (13, 0, 7, 6):
        assert Feed(data, 4, 1, True).step(i) == walked[i]
    assert {id(e) for s in walked[:6] for e in s} == {id(e) for e in data}


@pytest.mark.parametrize(("epochs", "steps", "total"), [(3, None, 18), (0.5, None, 3), (0.01, None, 1), (3, 5, 5)])
def test_length_of_a_run(epochs, steps, total):
    assert Feed(rows(23), 4, 0, False).steps(epochs, steps) == total


def test_collate():
    b = collate([Row([4, 5, 6], [-100, 5, 6]), Row([7], [7])], 9, torch.device("cpu"))
    assert b.input_ids.tolist() == [[4, 5, 6], [7, 9, 9]] and b.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert b.labels.tolist() == [[-100, 5, 6], [7, -100, -100]]
    assert (
        (b.learned, b.tokens) == (2, 4) == (sum(learned(r) for r in [Row([4, 5, 6], [-100, 5, 6]), Row([7], [7])]), 4)
    )


def test_digest_sees_everything():
    base = [Row([1, 2], [1, 2]), Row([3], [3])]
    others = [[Row([1, 2], [-100, 2]), base[1]], [base[1], base[0]], [Row([1], [1]), Row([2, 3], [2, 3])], base[:1]]
    assert len({digest(x) for x in [base, *others]}) == 5 and digest(base) == digest(list(base))
