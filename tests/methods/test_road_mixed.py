"""RoAd in mixed batches, and what serving it costs."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import linear

import inlay
from inlay.core.edit import Call
from inlay.core.place import Place
from inlay.core.route import STRATEGIES
from inlay.methods.rotate import RoAd, RoAdLoRA
from tests.laws.zoo import base, batch, excite, logits
from tests.methods.road import D_IN, EDITS, drawn, gradients, layer

PLAN = (None, "s3", "s1", "s4", "s2", None, "s1")
"""Slots [0, 3, 1, 4, 2, 0, 1]."""


def slotted(dtype=torch.float32, family="gpt_neox", strategy=None, **settings):
    """A host that wears RoAds of variants 1, 2, 4, 1 as s1 to s4."""
    model = base(family, dtype)
    host = inlay.attach(model, **({} if strategy is None else {"strategy": strategy}))
    for i, variant in enumerate((1, 2, 4, 1)):
        own = torch.float64 if dtype == torch.float64 else torch.float32
        host.add(f"s{i + 1}", RoAd(variant=variant, **settings), dtype=own)
    excite(host, 0.3)
    return host


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["R10", "R11"])
def test_R10_R11_rows_of_a_mixed_batch_are_bit_equal_to_their_adapter_alone(dtype, strategy):
    host, inputs = slotted(dtype, strategy=strategy), batch(7, pad=2)
    mixed = logits(host, *PLAN, **inputs)
    assert mixed.dtype == dtype and {p.dtype for p in host.parameters()} == {torch.float32}
    bare = base("gpt_neox", dtype)(**inputs).logits
    for i, name in enumerate(PLAN):
        assert torch.equal(mixed[i], logits(host, name, **inputs)[i]), name
        assert torch.equal(mixed[i], bare[i]) == (name is None)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pairing", [{}, {"pairing": "half", "group": 8}, {"blocks": "0.5-1"}], ids=str)
def test_R10_decoding_with_a_cache_too(pairing, strategy):
    host, inputs = slotted(family="llama", strategy=strategy, **pairing), batch(7, pad=2)
    go = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), host.using(*PLAN):
        mixed = host.model.generate(**inputs, **go)
    for name in dict.fromkeys(PLAN):
        with torch.no_grad(), host.using(name):
            alone = host.model.generate(**inputs, **go)
        for i in (i for i, n in enumerate(PLAN) if n == name):
            assert torch.equal(mixed[i], alone[i]), name


def packed_states(host, plan, sequences):
    """(W, D) of one packed row, as the decoder's base says them."""
    from inlay.engine.attention import apart
    from inlay.engine.pack import laid_out

    with torch.no_grad(), host.using(*plan), apart(host):
        layout, inputs = laid_out(host, sequences)
        with host.packed(layout):
            return layout, host.model.base_model(**inputs, use_cache=False).last_hidden_state[0]


def test_R12_tokens_of_one_packed_row_have_slots_of_their_own():
    host = slotted(family="llama")
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, 97, (n,), generator=draw).tolist() for n in (3, 5, 1, 4, 2, 6, 3)]
    layout, mixed = packed_states(host, PLAN, sequences)
    assert layout.shape == (1, 24)
    for i, name in enumerate(PLAN):
        own = slice(layout.index(i), layout.index(i) + len(sequences[i]))
        assert torch.equal(mixed[own], packed_states(host, (name,), sequences)[1][own])
        with torch.no_grad(), host.using(name):
            alone = host.model.base_model(torch.tensor([sequences[i]])).last_hidden_state[0]
        torch.testing.assert_close(mixed[own], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_R13_gradients_of_a_mixed_batch_are_those_of_each_adapters_own_rows(strategy):
    host, inputs = slotted(torch.float64, "llama", strategy), batch(7)
    mixed = gradients(host, PLAN, inputs)
    for name in host.edits:
        rows = [i for i, n in enumerate(PLAN) if n == name]
        alone = gradients(host, (name,), {k: v[rows] for k, v in inputs.items()})
        for k in (k for k in mixed if k.startswith(f"{name}:")):
            torch.testing.assert_close(mixed[k], alone[k], rtol=1e-10, atol=1e-10)
    absent = gradients(host, ("s1", None, "s1", None, "s3", "s3", None), inputs)
    assert all(g is None or not g.any() for k, g in absent.items() if k[:2] in ("s2", "s4"))
    assert all(g is not None and g.any() for k, g in absent.items() if k[:2] in ("s1", "s3"))


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_R13_gradcheck(edit):
    edit = replace(edit, group=min(edit.group, 8))
    place = layer(d_out=16)[2]
    w = {k: v.requires_grad_() for k, v in drawn(edit, place).items()}
    h = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)

    def f(h, *tensors):
        return edit.after(dict(zip(w, tensors, strict=True)), h, h, Call(place))

    assert torch.autograd.gradcheck(f, (h, *w.values()))


def seconds(f, device: str, runs: int = 30) -> float:
    """Of one call, the fastest of many."""
    best = math.inf
    for _ in range(runs):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        f()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def worn(n: int, place: Place, edit: RoAd):
    """(edit, tensors of n adapters, one a row) as they are worn once nothing is trained."""
    parts = [edit.folded(drawn(edit, place, i, torch.float32), place) for i in range(n)]
    turn = parts[0][0]
    assert all(e == turn for e, _ in parts) and turn.stacks(place)
    stack = {k: torch.stack([w[k] for _, w in parts]) for k in parts[0][1]}
    return turn, {k: t if t.dim() == 3 else t[:, None] for k, t in stack.items()}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_R24_eight_roads_cost_less_than_eight_loras_by_bmm(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    d, rank, n = 4096, 8, 8
    draw = torch.Generator().manual_seed(0)
    x, A, B, y = (
        torch.randn(*shape, generator=draw).to(device) for shape in ((n, 1, d), (n, d, rank), (n, rank, d), (n, 1, d))
    )
    place = Place(lambda x: x, d, d, "q", "0.q")
    edit, w = worn(n, place, RoAd())
    w = {k: t.to(device) for k, t in w.items()}
    road = seconds(lambda: edit.after(w, x, y, Call(place)), device)
    lora = seconds(lambda: y + torch.bmm(torch.bmm(x, A), B), device)
    assert road < lora, (road, lora)


def operations(host, plan, inputs) -> dict[str, int]:
    """ATen operations of one decoding step, and how often each is called."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), host.using(*plan):
        past = host.model(**inputs, use_cache=True).past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": mask, "past_key_values": past}
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            host.model(**step)
    return {e.key: e.count for e in seen.key_averages() if e.key.startswith("aten::")}


@pytest.mark.parametrize("variants", [(1,), (2, 4)], ids=str)
def test_R25_serving_takes_no_cosines_and_no_turn_per_adapter(variants):
    host = inlay.attach(base("llama"), strategy="stack")
    for i in range(16):
        host.add(f"s{i}", RoAd(variant=variants[i % len(variants)], blocks="0-0.5" if i > 7 else "0-1"))
    excite(host, 0.3)
    inputs = batch(16)
    bare = operations(host, (None,), inputs)
    few, many = (operations(host, [f"s{i % n}" for i in range(16)], inputs) for n in (2, 16))
    angles = ("aten::cos", "aten::sin", "aten::polar")  # some are the base's rotary embedding's
    assert all(few.get(k, 0) == many.get(k, 0) == bare.get(k, 0) for k in angles)
    assert few == many and few != bare


ALSO = [RoAd(variant=4, blocks="0.5-1"), RoAdLoRA(rank=4, blocks="0-0.5")]


@pytest.mark.parametrize("edit", [*EDITS, *ALSO], ids=str)
def test_what_serving_computes_is_what_training_computes(edit):
    W, b, place = layer(torch.float32)
    x = torch.randn(3, 2, D_IN)
    y = linear(x, W, b)
    turn, w = worn(3, place, edit)
    got = turn.after(w, x, y, Call(place))
    for i in range(3):
        alone = edit.after(drawn(edit, place, i, torch.float32), x[i : i + 1], y[i : i + 1], Call(place))[0]
        if isinstance(edit, RoAdLoRA):
            torch.testing.assert_close(got[i], alone, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got[i], alone)
