"""Gated MLPs: the same numbers, fewer of them kept."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch

import inlay
from inlay.train.ways import Packed
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.engine.test_packed import ROWS
from tests.laws.zoo import base, dressed, excite, small


def found(host, name, recompute: bool):
    leave = contextlib.nullcontext() if recompute else patch("inlay.engine.engaged.gated_mlps", contextlib.nullcontext)
    with leave:
        return gradients(host, name, Packed(host, 0, 14), ROWS)


@pytest.mark.parametrize("name", ["lora", "dora", "road1", "series", "ia3", "prefix"])
@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2", "mistral"])
def test_made_again_is_kept(family, name):
    host = dressed(family)
    want, plain = found(host, name, False)
    got, again = found(host, name, True)
    assert got == pytest.approx(want, rel=1e-6)
    assert_as_exact(again, plain, exact_gradients(family, name, ROWS)[1])


def test_what_a_block_keeps(monkeypatch):
    """Counted: numbers of the inner width that a forward keeps for its backward."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    excite(host)
    wide, tokens = host.model.config.intermediate_size, sum(len(r.input_ids) for r in ROWS)

    def kept(recompute: bool) -> int:
        leave = (
            contextlib.nullcontext() if recompute else patch("inlay.engine.engaged.gated_mlps", contextlib.nullcontext)
        )
        seen: dict[int, torch.Tensor] = {}

        def note(t: torch.Tensor) -> torch.Tensor:
            if t.shape[-1] == wide and t.numel() == wide * tokens:
                seen[t.data_ptr()] = t
            return t

        way = Packed(host, 0, 100)
        way.narrow = False
        with leave, host.using("a"), way.active(), torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            way.loss(ROWS)
        return len(seen)

    assert kept(False) == 4 * host.anatomy.layers, "gate, up, what the activation says, the product"
    assert kept(True) == 0, "the node itself holds gate and up, and nothing else is kept"
