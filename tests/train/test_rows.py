"""Rows that `fit` is given: of a data set, malformed, longer than the base reads."""

from __future__ import annotations

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.train import fit
from tests.train.tiny import copy, rows, same, settings, wearing


def test_rows_of_a_data_set_are_learned_as_examples_are(tmp_path):
    """Mappings with lists or tensors, as `datasets` gives them."""
    data, hosts = rows(8), [wearing() for _ in range(3)]
    lists = [{"input_ids": e.input_ids, "labels": e.labels, "id": 1} for e in data]
    tensors = [{k: torch.tensor(v) for k, v in row.items() if k != "id"} for row in lists]
    for host, given, name in zip(hosts, (data, lists, tensors), "abc", strict=True):
        fit(host, "a", given, given[:2], settings(tmp_path / name), tmp_path / name, None)
    assert same(copy(hosts[0]), copy(hosts[1])) and same(copy(hosts[0]), copy(hosts[2]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2]}, "training example 8 has no 'labels'; it has input_ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "training example 8 has 2 input_ids and 1 labels"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "'input_ids' must be a flat list of whole numbers"),
        ("text", "training example 8 is a str; a row has input_ids and labels"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, row, message):
    with pytest.raises(InlayError, match=message):
        fit(wearing(), "a", [*rows(8), row], [], settings(tmp_path), tmp_path, None)
    assert not list(tmp_path.iterdir())


def test_examples_longer_than_the_context_are_refused_before_the_first_step(tmp_path):
    host = wearing()
    limit = host.model.config.max_position_embeddings
    long = {"input_ids": [5] * (limit + 1), "labels": [5] * (limit + 1)}
    with pytest.raises(InlayError, match=rf"1 of 9 examples do not fit .* {limit} positions.* has {limit + 1} tokens"):
        fit(host, "a", [*rows(8), long], [], settings(tmp_path), tmp_path, None)
    prefix = wearing(method="prefix", tokens=limit - 3)
    with pytest.raises(InlayError, match=rf"8 of 8 examples.* and {limit - 3} virtual tokens; set the cutoff to 3"):
        fit(prefix, "a", rows(8), [], settings(tmp_path), tmp_path, None)
    assert not list(tmp_path.iterdir())
