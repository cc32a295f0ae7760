"""The laws that every method keeps in every family."""

from __future__ import annotations

import copy

import pytest
import torch

import inlay
from tests.laws.zoo import (
    FAMILIES,
    MOE,
    base,
    batch,
    dressed,
    excite,
    logits,
    method,
    methods,
    places,
    positioned,
    small,
)

CASES = [(f, m) for f in FAMILIES for m in methods(f)]
VIRTUAL = ("prefix", "prompt", "ptuning")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_detaching_leaves_no_trace(family):
    model = base(family)
    state, want = copy.deepcopy(model.state_dict()), model(**batch()).logits
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    host = inlay.attach(model)
    for name in methods(family):
        host.add(name, small(name), at=places(name, family))
        if name not in VIRTUAL:
            assert torch.equal(logits(host, name, **batch()), want), name
    assert torch.equal(logits(host, None, **batch()), want)
    assert host.detach() is model
    assert torch.equal(model(**batch()).logits, want)
    assert state.keys() == model.state_dict().keys() and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("strategy", ["auto", "segments", "select", "stack"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_mixed_batch_equals_its_adapter_alone(family, strategy):
    dtype = torch.float32 if family == "bloom" else torch.float64  # BLOOM in float64 turns padding into NaN by itself
    host = dressed(family, dtype)
    host.strategy = strategy
    names = [*methods(family), None]
    inputs = positioned(family, batch(len(names), pad=2))
    mixed, bare = logits(host, *names, **inputs), base(family, dtype)(**inputs).logits
    used = inputs["attention_mask"].bool()
    tolerance = {"bloom": 2e-5, "gptj": 1e-6}.get(family, 1e-9)  # GPT-J attends in float32 whatever its type
    for i, name in enumerate(names):
        alone = logits(host, name, **inputs)[i]
        torch.testing.assert_close(mixed[i][used[i]], alone[used[i]], rtol=0, atol=tolerance, msg=str(name))
        assert name is None or (mixed[i] - bare[i])[used[i]].abs().max() > 1e-4, name
    host.strategy = "auto"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bare_row_of_a_mixed_batch_is_bit_identical(family):
    host = dressed(family)
    for name in (n for n in methods(family) if n not in VIRTUAL):
        row, alone = logits(host, name, None, name, **batch())[1], logits(host, None, **batch())[1]
        if (
            family in MOE
        ):  # an expert sees the tokens of all rows at once: its matmul's shape, not its input, depends on the others
            torch.testing.assert_close(row, alone, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(row, alone), name


@pytest.mark.parametrize("family", FAMILIES)
def test_select_is_bit_identical_to_alone(family):
    host = dressed(family)
    host.strategy = "select"
    names = [n for n in methods(family) if n not in VIRTUAL]
    inputs = batch(len(names))
    mixed = logits(host, *names, **inputs)
    host.strategy = "auto"
    for i, name in enumerate(names):
        assert torch.equal(mixed[i], logits(host, name, **inputs)[i]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_matter(family):
    host, inputs = dressed(family), batch(1, 6)
    wide = {k: torch.nn.functional.pad(v, (4, 0)) for k, v in inputs.items()}
    for name in methods(family):
        padded = logits(host, name, **positioned(family, wide))[:, 4:]
        torch.testing.assert_close(padded, logits(host, name, **inputs), rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_cached_is_uncached_is_alone_and_beams_agree(family):
    host = dressed(family)
    names = [*methods(family), None]
    inputs = batch(len(names), pad=2)
    go = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    for beams in (1, 3):
        with host.using(*names), torch.no_grad():
            cached = host.model.generate(**inputs, **go, num_beams=beams)
            plain = host.model.generate(**inputs, **go, num_beams=beams, use_cache=False)
        assert torch.equal(cached, plain)
        assert torch.equal(cached[:, :7], inputs["input_ids"])  # the reserved columns stay inside
        for i, name in enumerate(names):
            with host.using(name), torch.no_grad():
                alone = host.model.generate(**{k: v[i : i + 1] for k, v in inputs.items()}, **go, num_beams=beams)
            assert torch.equal(cached[i], alone[0]), (name, beams)


def gradients(family, checkpoint: str, plan) -> dict:
    host = inlay.attach(base(family)) if checkpoint != "before" else None
    if host is None:
        model = base(family)
        model.gradient_checkpointing_enable()
        host = inlay.attach(model)
    for name in dict.fromkeys(n for n in plan if n):
        host.add(name, small(name), at=places(name, family), seed=0)
    excite(host)
    if checkpoint == "after":
        host.model.gradient_checkpointing_enable({"use_reentrant": True})
    host.model.train()
    for module in host.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    inputs = batch(len(plan), pad=2)
    with host.using(*plan):
        loss = host.model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()  # under another plan than the forward's
    return {f"{n}:{k}": p.grad for n in host.edits for k, p in host.tensors(n).items() if p.requires_grad}


@pytest.mark.parametrize("checkpoint", ["before", "after"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_gives_the_same_gradients_whenever_it_is_switched_on(family, checkpoint):
    plan = ("lora", "prefix", "series", None, "prompt", "dora", "ia3")
    plain, saved = gradients(family, "", plan), gradients(family, checkpoint, plan)
    assert all(g is not None and g.abs().sum() > 0 for k, g in plain.items() if "_" not in k)
    for k, g in plain.items():
        torch.testing.assert_close(saved[k], g, rtol=1e-4, atol=1e-6, msg=k)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_saved_and_loaded_is_bit_equal_and_merged_is_equal_or_refused(family, name, tmp_path):
    host = inlay.attach(base(family))
    host.add("x", small(name), at=places(name, family), seed=0)
    excite(host)
    want = logits(host, "x", **batch())
    inlay.save(host, "x", tmp_path)
    again = inlay.attach(base(family))
    inlay.load(again, tmp_path)
    assert torch.equal(logits(again, "x", **batch()), want)
    merges = name not in VIRTUAL and method(name).edit.kind not in ("bottleneck", "compacter", "gated")
    if not merges:
        with pytest.raises(inlay.InlayError, match="not linear|no weight|no single weight"):
            inlay.merge(host, "x")
        assert torch.equal(logits(host, "x", **batch()), want)
        return
    before = {k: v.clone() for k, v in base(family).state_dict().items()}
    report = inlay.merge(host, "x")
    model = host.detach()
    torch.testing.assert_close(model(**batch()).logits, want, rtol=1e-4, atol=1e-4)
    # Where Gemma scales inside its embedding (not in transformers 5.0), one offset means two weights.
    scaled = type(model.get_input_embeddings()) is not torch.nn.Embedding
    assert report.deviation < 1e-3 and report.untied == ((family, name) == ("gemma", "full") and scaled)
    report.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
