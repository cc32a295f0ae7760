"""An adapter folded into one vector says what it says hung; in stacks too, each row its own."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.fold import Stack
from tests.laws.rounding import assert_equal_to_rounding
from tests.laws.zoo import base, batch, excite, logits, methods, places, small

FAMILIES = ["llama", "gptj", "bloom", "opt", "gpt2"]
STACKED = ["lora", "rslora", "pissa", "dora", "adalora", "ia3", "series", "parallel", "pfeiffer", "compacter"]
STACKED += ["loha", "lokr", "krona", "vera"]


def wearing(family: str, *names: str, copies: int = 1, **settings):
    host = inlay.attach(base(family))
    for name in names:
        for i in range(copies):
            host.add(f"{name}-{i}", small(name, **settings), at=places(name, family), seed=i)
    excite(host)
    return host


@pytest.mark.parametrize("family", FAMILIES)
def test_shelved_is_hung(family):
    host = wearing(family, *methods(family))
    sites, hooks = len(host.sites), len(list(host.model.named_modules()))
    for name in list(host.edits):
        host.shelve(f"s-{name}", host.edits[name], host.placement(name), host.tensors(name))
    assert (len(host.sites), len(list(host.model.named_modules()))) == (sites, hooks)
    for name in [n for n in host.edits if not n.startswith("s-")]:
        shelved, hung = logits(host, f"s-{name}", **batch()), logits(host, name, **batch())
        assert_equal_to_rounding(shelved, hung, host.model, name)


@pytest.mark.parametrize("method", STACKED)
@pytest.mark.parametrize("tokens", [7, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stacked_row_is_its_adapter_alone(family, tokens, method):
    host = wearing(family, method, copies=3)
    plan = [f"{method}-1", f"{method}-0", f"{method}-2", f"{method}-1"]
    inputs = batch(4, tokens)
    want = torch.stack([logits(host, n, **inputs)[i] for i, n in enumerate(plan)])
    host.strategy = "stack"
    with host.using(*plan), torch.no_grad():
        got = host.model(**inputs).logits
        steps = host.now.steps
    assert len(steps) == 1 and isinstance(steps[0], Stack) and steps[0].rows is None
    assert_equal_to_rounding(got, want, host.model)


def test_rows_that_wear_several_and_rows_that_wear_none():
    host = wearing("llama", "lora", "ia3", copies=2)
    plan = [("lora-0", "ia3-1"), None, "lora-1", ("lora-0", "lora-1", "ia3-0"), "ia3-0"]
    inputs = batch(5)
    want = torch.stack([logits(host, n, **inputs)[i] for i, n in enumerate(plan)])
    host.strategy = "stack"
    assert_equal_to_rounding(logits(host, *plan, **inputs), want, host.model)
    plan = plan[::-1]
    want = torch.stack([logits(host, n, **inputs)[i] for i, n in enumerate(plan)])
    assert_equal_to_rounding(logits(host, *plan, **inputs), want, host.model)


def test_auto_stacks_adapters_of_few_rows_and_never_while_training():
    host = wearing("llama", "lora", copies=2)
    for each, stacks in ((3, True), (4, False)):
        with torch.no_grad(), host.using(*["lora-0", "lora-1"] * each):
            host.model(**batch(2 * each))
            assert isinstance(host.now.steps[0], Stack) == stacks
    with host.using("lora-0", "lora-1"):
        host.model(**batch(2, 7)).logits.sum().backward()
        assert not any(isinstance(s, Stack) for s in host.now.steps)
    assert all(p.grad is not None for p in host.parameters())


@pytest.mark.parametrize("how", ["step", "data", "fill"])
def test_a_stack_follows_its_adapters(how):
    host = wearing("llama", "lora", copies=2)
    host.strategy = "stack"
    inputs = batch(2)
    before = logits(host, "lora-0", "lora-1", **inputs)
    with host.using("lora-0", "lora-1"):
        if how == "step":
            host.model(**inputs).logits.square().mean().backward()
            torch.optim.SGD(host.parameters(), lr=1.0).step()
        elif how == "data":
            for p in host.parameters():
                p.data.mul_(2)
            host.use("lora-0", "lora-1")
        else:
            host.fill("lora-0", host.tensors("lora-1"))
        with torch.no_grad():
            after = host.model(**inputs).logits
    host.strategy = "segments"
    assert_equal_to_rounding(after, logits(host, "lora-0", "lora-1", **inputs), host.model)
    assert not torch.allclose(before, after)


def test_stacks_that_find_no_room_are_segments():
    host = wearing("llama", "lora", copies=2)
    host.stacks.room = 10
    with host.using("lora-0", "lora-1"), torch.no_grad():
        host.model(**batch(2, 1))
        assert not any(isinstance(s, Stack) for s in host.now.steps)


def test_a_changed_plan_writes_only_the_rows_that_changed(monkeypatch):
    host = wearing("llama", "lora", copies=3)
    for name in list(host.edits):
        host.shelve(f"s{name}", host.edits[name], host.placement(name), host.tensors(name))
    host.strategy = "stack"
    logits(host, "slora-0", "slora-1", "slora-2", **batch(3))
    written = []
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, *a, **k: (written.append(1), copy(self, *a, **k))[1])
    logits(host, "slora-0", "slora-2", "slora-2", **batch(3))
    assert len(written) == 1


def test_a_shelved_adapter_is_only_worn():
    host = wearing("llama", "lora")
    edit, at, tensors = host.edits["lora-0"], host.placement("lora-0"), host.tensors("lora-0")
    host.shelve("kept", edit, at, tensors)
    for read in (host.tensors, host.placement, host.by_place, host.count):
        with pytest.raises(inlay.InlayError, match="shelved"):
            read("kept")
    with pytest.raises(inlay.InlayError, match="missing 0.q/A"):
        host.shelve("other", edit, at, {k: t for k, t in tensors.items() if k != "0.q/A"})
    with pytest.raises(inlay.InlayError, match="already wears"):
        host.shelve("kept", edit, at, tensors)
    host.remove("kept")
    assert list(host.edits) == ["lora-0"]


def test_on_the_shelf_the_order_is_that_of_names():
    host = wearing("llama", "lora", "ia3")
    for order in (("x", "y"), ("y", "x")):
        for name, hung in zip(order, ("lora-0", "ia3-0") if order[0] == "x" else ("ia3-0", "lora-0"), strict=True):
            host.shelve(name, host.edits[hung], host.placement(hung), host.tensors(hung))
        assert sorted(host.edits, key=host.order.__getitem__) == ["lora-0", "ia3-0", "x", "y"]
        got = logits(host, "y+x", **batch())
        assert_equal_to_rounding(got, logits(host, "lora-0+ia3-0", **batch()), host.model)
        host.remove("x"), host.remove("y")


def test_detaching_leaves_no_trace_of_what_was_shelved():
    model = base("llama")
    names = [n for n, _ in model.named_modules()]
    donor = wearing("llama", "lora")
    host = inlay.attach(model)
    host.shelve("x", donor.edits["lora-0"], donor.placement("lora-0"), donor.tensors("lora-0"))
    host.use("x")
    host.detach()
    assert [n for n, _ in model.named_modules()] == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_hung_adapter_leaves_and_the_shelved_ones_stay_worn():
    donor, host = wearing("llama", "lora"), inlay.attach(base("llama"))
    host.shelve("kept", donor.edits["lora-0"], donor.placement("lora-0"), donor.tensors("lora-0"))
    want = logits(donor, "lora-0", **batch())
    host.add("hung", small("lora"), at=places("lora", "llama"), seed=1).remove("hung")
    assert_equal_to_rounding(logits(host, "kept", **batch()), want, host.model)
    assert not [n for n, _ in host.detach().named_modules() if "inlay" in n]


@pytest.mark.parametrize("method", [*STACKED, "road1", "road2"])
def test_neighbours_who_wear_the_same_share_an_adapter_of_the_stack(method):
    host = wearing("llama", method, copies=2)
    plan = [f"{method}-{i}" for i in (1, 1, 0, 0, 1, 1)] + [None, None]
    inputs = batch(8)
    want = torch.stack([logits(host, n, **inputs)[i] for i, n in enumerate(plan)])
    with host.using(*plan), torch.no_grad():
        got = host.model(**inputs).logits
        (step,) = host.now.steps
    assert isinstance(step, Stack) and step.each == 2 and next(iter(step.at["0.down"].values())).shape[0] == 3
    assert_equal_to_rounding(got, want, host.model)


@pytest.mark.parametrize("method", [*STACKED, "road1"])
def test_what_somebody_else_holds_of_a_layer_is_not_written_over(method):
    host = wearing("llama", method, copies=2)
    alone = logits(host, f"{method}-0", **batch(4))
    held, kept = [], []

    def hold(layer, args, y):
        held.append(y)
        kept.append(y.clone())

    for site in host.sites.values():
        site.layer.register_forward_hook(hold, prepend=True)
    assert_equal_to_rounding(logits(host, f"{method}-0", **batch(4)), alone, host.model)
    logits(host, *[f"{method}-{i % 2}" for i in range(4)], **batch(4))
    assert held and all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))


def test_stacks_stay_while_there_is_room():
    host = wearing("llama", "lora", "road1", copies=2)
    host.strategy = "stack"
    stacks = host.stacks
    with host.steady():
        for plan in (("lora-0", "lora-1"), ("road1-0", "road1-1"), ("lora-0", "lora-1")):
            with host.using(*plan):
                logits(host, *plan, **batch(2))
    assert len(stacks._held) == 2
    stacks.room = max(flat.nbytes for flat, _ in stacks._held.values())
    logits(host, "road1-0", "road1-1", **batch(2))
    assert len(stacks._held) == 1
