"""The last block behind its attention: only the rows that are read, and the same losses and gradients."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.engine import last
from inlay.engine.example import learned
from inlay.train.ways import Packed, choose
from tests.engine.exactness import assert_as_exact, exact_gradients, gradients
from tests.engine.test_packed import ROWS
from tests.laws.zoo import FAMILIES, base, dressed, excite, methods, small
from tests.train.tiny import settings


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "falcon-rw"])
def test_rows_that_are_not_read_are_not_missed(family):
    host = dressed(family)
    for name in methods(family):
        found = []
        for narrow in (False, True):
            way = Packed(host, 0, 100)
            way.narrow = narrow
            found.append(gradients(host, name, way, ROWS))
        (want, plain), (got, narrowed) = found
        assert got == pytest.approx(want, rel=1e-5), name
        assert_as_exact(narrowed, plain, exact_gradients(family, name, ROWS)[1], name)


@pytest.mark.parametrize("family", ["llama", "gptj", "opt", "gpt2"])
def test_every_sequence_has_its_own_plan_there_too(family):
    host, plan, found = dressed(family), ("lora", "prefix", None, "prompt+series"), []
    for narrow in (False, True):
        way = Packed(host, 0, 100)
        way.narrow = narrow
        with torch.no_grad(), host.using(*plan), way.active():
            found.append(float(way.loss(ROWS)))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize(
    "family, narrow", [("llama", True), ("gptj", True), ("gpt2", True), ("opt", True), ("bloom", False)]
)
def test_counted_rows(family, narrow):
    """What the MLP of the last block is given."""
    host = inlay.attach(base(family)).add("a", small("lora"), seed=0)
    excite(host)
    last = host.anatomy.layers - 1
    seen: list[int] = []
    for role in ("down", "o"):
        path = next(s.path for s in host.anatomy.spots if s.key == f"{last}.{role}")
        host.model.get_submodule(path).register_forward_hook(lambda m, x, y: seen.append(y.numel() // y.shape[-1]))
    with host.using("a"):
        way = Packed(host, 0, 100)
        with torch.no_grad(), way.active():
            way.loss(ROWS)
    tokens, read = sum(len(r.input_ids) for r in ROWS), sum(map(learned, ROWS))
    assert read < tokens
    assert seen == [read, read] if family != "bloom" else min(seen) >= tokens


def test_a_block_whose_output_is_hooked_is_whole():
    host = inlay.attach(base("llama")).add("a", small("lora"), at="linear", seed=0)
    shapes = []
    block = host.model.model.layers[-1]
    block.register_forward_hook(lambda m, x, y: shapes.append((y[0] if isinstance(y, tuple) else y).abs().amin(-1)))
    with torch.no_grad(), host.using("a"):
        way = Packed(host, 0, 100)
        with way.active():
            way.loss(ROWS)
    assert bool((shapes[0] > 0).all()), "a hook sees every row"
    assert "forward" not in vars(block)


def test_a_run_that_loses_the_narrow_last_block_is_told(tmp_path, monkeypatch):
    """It goes on, packed and with shared beginnings, and the reason is the run's notice."""
    host = dressed("llama")
    way, notice = choose(host, "lora", settings(tmp_path), 0, ROWS)
    assert way.narrow and not notice

    def without_wrapper(block):
        raise AttributeError("no attribute '__wrapped__'")

    monkeypatch.setattr(last.compat, "own_forward", without_wrapper)
    way, notice = choose(host, "lora", settings(tmp_path), 0, ROWS)
    assert isinstance(way, Packed) and way.share and not way.narrow
    assert notice == (
        "the last block is computed for all tokens, not only for learned ones: "
        "AttributeError: no attribute '__wrapped__'"
    )


def test_a_block_that_cannot_be_entered_twice_is_told(tmp_path):
    notice = choose(dressed("bloom"), "lora", settings(tmp_path), 0, ROWS)[1]
    assert "this decoder adds the residual inside its attention" in notice
    host = inlay.attach(base("llama")).add("a", small("lora"), seed=0)
    host.model.get_submodule("model.layers.1").register_forward_hook(lambda *given: None)
    assert "carries hooks" in choose(host, "a", settings(tmp_path), 0, ROWS)[1]
