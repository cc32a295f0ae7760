"""Layers in groups, together with their edits: the same function, and nothing left in the model."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
import torch

import inlay
from inlay.engine.fused import fused_linears
from inlay.train.ways import Packed
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.engine.graph import nodes
from tests.engine.test_packed import ROWS
from tests.laws.zoo import base, dressed, excite, small


class Unfused(Packed):
    """The engine with every edit added in a pass of its own."""

    @contextlib.contextmanager
    def active(self):
        with (
            patch("inlay.engine.engaged.fused_linears", lambda host, steady: contextlib.nullcontext()),
            super().active(),
        ):
            yield


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "pissa", "rslora", "road1", "series"])
@pytest.mark.parametrize("family", ["llama", "gptj", "opt", "phi3", "qwen2", "mixtral"])
def test_fused_is_unfused(family, name):
    host = dressed(family)
    want, plain = gradients(host, name, Unfused(host, 0, 14), ROWS)
    got, fused = gradients(host, name, Packed(host, 0, 14), ROWS)
    assert got == pytest.approx(want, rel=1e-6)
    assert_as_exact(fused, plain, exact_gradients(family, name, ROWS)[1])


def count_nodes(loss: torch.Tensor, name: str) -> int:
    return sum(name in n for n in nodes(loss))


def test_groups_are_one_node_each():
    """q, k, v | o | gate, up | down: four nodes a block, and no edit beside them."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    way = Packed(host, 0, 100)
    with host.using("a"), way.active():
        loss = way.loss(ROWS)
    assert count_nodes(loss, "LinearsBackward") == 4 * host.anatomy.layers
    assert count_nodes(loss, "LowRank") == 0


def test_what_stands_between_layer_and_edit_is_seen():
    """A hook of somebody's, an edit of the input, an edit that is not low-rank: all of them are still met."""
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0).add("b", small("road1"), seed=1)
    host.add("s", small("series"), at="k:input", seed=2)
    excite(host)
    attention = host.model.model.layers[0].self_attn
    ids = torch.tensor([[4, 5, 6, 7]])
    seen = []
    handle = attention.q_proj.register_forward_hook(lambda m, x, y: seen.append(y.detach()) or 2 * y)
    for plan in (("a",), ("a+b",), ("a+s",), ("b",), (None,)):
        with torch.no_grad(), host.using(*plan):
            want = host.model(ids).logits
            with fused_linears(host):
                torch.testing.assert_close(host.model(ids).logits, want, rtol=1e-4, atol=1e-4)
    assert len(seen) == 10
    handle.remove()
    assert not any("forward" in vars(m) for m in host.model.modules())
    assert not any(s.spoken for s in host.sites.values())


def test_neighbours_given_different_inputs_go_alone():
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    excite(host)
    mlp = host.model.model.layers[0].mlp
    x = torch.randn(1, 3, host.hidden)
    with torch.no_grad(), host.using("a"):
        host.model(torch.tensor([[4, 5, 6]]))  # sets the route
        want = mlp.gate_proj(x), mlp.up_proj(x + 1), mlp.gate_proj(x.mul(2)), mlp.up_proj(x)
        with fused_linears(host):
            got = mlp.gate_proj(x), mlp.up_proj(x + 1), mlp.gate_proj(x.mul(2)), mlp.up_proj(x)
            for one, two in zip(want, got, strict=True):
                torch.testing.assert_close(one, two)
            y = mlp.gate_proj(x)
            x.add_(1)
            torch.testing.assert_close(mlp.up_proj(x), want[1])
            torch.testing.assert_close(y, want[0])
