"""Every method hangs on the real base, starts as the bare base bit for bit, and changes finite logits once it moved."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from tests.laws.test_laws import VIRTUAL
from tests.real.conftest import logits

LAYERS = {"embed", "head"}
"""Roles outside the blocks."""


def in_two_layers(at: str) -> str:
    """A method's own places, in the last two blocks only."""
    roles = at.split(",")
    inside = [r for r in roles if r not in LAYERS]
    outside = [r for r in roles if r in LAYERS]
    return ",".join([*(f"{r}@28-29" for r in inside), *outside])


NAMES = [n for n in inlay.METHODS if n not in ("bitfit", *VIRTUAL)]


def test_fresh_adapters_change_nothing(host, inputs):
    """One batch, a method a row, and the bare base."""
    for name in NAMES:
        host.add(name, inlay.method(name).make(), at=in_two_layers(inlay.method(name).places), seed=0)
    rows = [*NAMES, None]
    host.use(*rows)
    mixed = logits(host.model, {k: v.expand(len(rows), -1) for k, v in inputs.items()})
    for i, name in enumerate(NAMES):
        if name != "pissa":  # the difference of two products, which a mixed batch adds up in another order
            assert torch.equal(mixed[i], mixed[-1]), name
    torch.testing.assert_close(mixed[NAMES.index("pissa")], mixed[-1], rtol=0, atol=1e-3)
    host.use("pissa")
    alone = logits(host.model, inputs)
    host.use(None)
    assert torch.equal(alone, logits(host.model, inputs))
    host.use(*rows)
    torch.manual_seed(0)
    for p in host.parameters():
        p.data.add_(0.02 * torch.randn_like(p))
    moved = logits(host.model, {k: v.expand(len(rows), -1) for k, v in inputs.items()})
    assert torch.equal(moved[-1], mixed[-1]) and moved.isfinite().all()
    for i, name in enumerate(NAMES):
        assert (moved[i] - moved[-1]).abs().max() > 1e-3, name


def test_virtual_tokens_give_finite_logits(host, inputs):
    for name in VIRTUAL:
        host.add(name, inlay.method(name).make(), at=inlay.method(name).places, seed=0)
    bare = logits(host.model, inputs)
    for name in VIRTUAL:
        host.use(name)
        out = logits(host.model, inputs)
        assert out.shape == bare.shape and out.isfinite().all() and not torch.equal(out, bare), name


def test_bitfit_finds_no_bias_and_says_so(host):
    with pytest.raises(InlayError, match="bitfit has nothing to train"):
        host.add("bitfit", inlay.method("bitfit").make(), at=inlay.method("bitfit").places)
