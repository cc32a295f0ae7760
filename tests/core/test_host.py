"""The host: plans, errors, reserved columns, schedules."""

from __future__ import annotations

import pytest
import torch

import inlay
from tests.laws.rounding import assert_equal_to_rounding
from tests.laws.zoo import base, batch, excite, logits, small


def host_with(*names: str):
    host = inlay.attach(base("llama"))
    for n in names:
        host.add(n, small(n), seed=0)
    excite(host)
    return host


def test_errors_say_what_to_do():
    host = host_with("lora")
    with pytest.raises(inlay.InlayError, match="already wears 'lora'"):
        host.add("lora", small("lora"))
    with pytest.raises(inlay.InlayError, match="unknown adapter 'nobody'; there is: lora"):
        host.use("nobody")
    with pytest.raises(inlay.InlayError, match="cannot name an adapter"):
        host.add("../x", small("lora"))
    with pytest.raises(inlay.InlayError, match="names an adapter twice"):
        host.use("lora+lora")
    with pytest.raises(inlay.InlayError, match="the plan names 2 rows but the batch has 3"):
        logits(host, "lora", None, **batch(3))
    with pytest.raises(inlay.InlayError, match="already has a host"):
        inlay.attach(host.model)
    with pytest.raises(inlay.InlayError, match="wears no adapters"):
        inlay.host_of(base("llama"))
    with pytest.raises(inlay.InlayError, match="unknown method 'lorra'"):
        inlay.method("lorra")
    with pytest.raises(inlay.InlayError, match="method 'series' has no setting 'rank'; its settings are: size"):
        inlay.method("series").make(rank=3)
    with pytest.raises(inlay.InlayError, match="rank must be at least 1"):
        inlay.method("lora").make(rank=0)
    with pytest.raises(inlay.InlayError, match="bitfit has nothing to train"):
        host.add("b", small("bitfit"))
    with pytest.raises(inlay.InlayError, match="unknown strategy"):
        inlay.attach(base("llama"), strategy="magic")


def test_a_failed_forward_leaves_the_host_usable():
    host = host_with("prefix", "lora")
    want = logits(host, "prefix", **batch())
    for _ in range(2):
        with pytest.raises(Exception, match="."):
            logits(host, "prefix", input_ids=torch.full((3, 4), 1000), attention_mask=torch.ones(3, 4))
    assert torch.equal(logits(host, "prefix", **batch()), want)


def test_plans_last_until_changed_and_using_restores_them():
    host = host_with("lora", "series")
    host.use("lora")
    want = host.model(**batch()).logits
    with host.using("series"):
        assert not torch.equal(host.model(**batch()).logits, want)
    assert torch.equal(host.model(**batch()).logits, want)
    with pytest.raises(RuntimeError), host.using("series"):
        raise RuntimeError
    assert host.plan == (("lora",),)
    host.remove("lora")
    assert torch.equal(host.model(**batch()).logits, logits(host, None, **batch()))


def test_training_reaches_only_the_rows_own_adapter_and_never_the_base():
    host = host_with("lora", "series", "prefix")
    with host.using("lora", "prefix", "lora"):
        host.model(**batch(), labels=batch()["input_ids"]).loss.backward()
    grads = {n: [p.grad for p in host.parameters(n)] for n in host.edits}
    assert all(g is not None and g.abs().sum() > 0 for n in ("lora", "prefix") for g in grads[n])
    assert all(g is None for g in grads["series"])
    assert all(p.grad is None for n, p in host.model.named_parameters() if "inlay" not in n)


def test_four_methods_train_at_once_in_one_batch():
    host = inlay.attach(base("llama"))
    names = ("lora", "road1", "series", "prefix")
    for n in names:
        host.add(n, small(n), seed=0)
    optimizer = torch.optim.AdamW(host.parameters(), lr=2e-2)
    losses = []
    with host.using(*names):
        for _ in range(25):
            loss = host.model(**batch(4), labels=batch(4)["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_seeds_fix_the_start_whatever_was_drawn_before():
    a, b = inlay.attach(base("llama")), inlay.attach(base("llama"))
    torch.randn(7)
    a.add("x", small("lora"), seed=3)
    b.add("x", small("lora"), seed=3)
    assert all(torch.equal(v, b.tensors("x")[k]) for k, v in a.tensors("x").items())


def test_callers_never_see_reserved_columns():
    host = host_with("prefix", "prompt")
    with host.using("prefix", "prompt", None), torch.no_grad():
        out = host.model(**batch(), output_hidden_states=True, labels=batch()["input_ids"])
        inner = host.model.model(**batch())
        keep = host.model(**batch(), logits_to_keep=1).logits
        plain = host.model(**batch(), return_dict=False)
    assert out.logits.shape[1] == 7 and all(h.shape[1] == 7 for h in out.hidden_states)
    assert inner.last_hidden_state.shape[1] == 7 and plain[0].shape[1] == 7
    torch.testing.assert_close(inner.last_hidden_state, out.hidden_states[-1])
    torch.testing.assert_close(keep[:, 0], out.logits[:, -1])


def test_a_cache_of_another_plan_is_refused():
    host = host_with("prefix", "prompt")
    with host.using("prefix"), torch.no_grad():
        past = host.model(**batch(), use_cache=True).past_key_values
    host.add("long", small("prefix", tokens=5))
    host.add("plain", small("lora"))
    one = torch.ones(3, 1, dtype=torch.long)
    for plan in ("long", "plain", None):
        with host.using(plan), pytest.raises(inlay.InlayError, match="made under another plan"):
            host.model(input_ids=one, past_key_values=past)
    with torch.no_grad(), host.using(None):
        bare = host.model(**batch(), use_cache=True).past_key_values
    with host.using("prefix"), pytest.raises(inlay.InlayError, match="made without virtual tokens"):
        host.model(input_ids=one, past_key_values=bare)


def test_prefix_logits_are_those_of_keys_and_values_put_into_the_cache():
    """The second way to the same thing: what prefix tuning's paper writes, through a KV cache."""
    from transformers import DynamicCache

    host = host_with("prefix")
    want, inputs = logits(host, "prefix", **batch()), batch()
    cache, tensors = DynamicCache(config=host.model.config), host.tensors("prefix")
    for layer in range(2):
        k, v = (tensors[f"{layer}.{r}/table"].unflatten(-1, (2, 8)).transpose(0, 1).expand(3, -1, -1, -1) for r in "kv")
        cache.update(k, v, layer)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (3, 0), value=1)
    with torch.no_grad():
        got = host.model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_prompt_logits_are_those_of_embeddings_put_before_the_rows():
    host = host_with("prompt")
    inputs = batch()
    table = host.tensors("prompt")["embed/table"]
    embeds = torch.cat([table.expand(3, -1, -1), host.model.get_input_embeddings()(inputs["input_ids"])], 1)
    with torch.no_grad():
        got = host.model(inputs_embeds=embeds).logits[:, table.shape[0] :]
    torch.testing.assert_close(got, logits(host, "prompt", **inputs), rtol=1e-5, atol=1e-5)


def test_adalora_ends_at_its_budget():
    host = inlay.attach(base("llama"))
    edit = inlay.method("adalora").make(rank=6, target=2, interval=2)
    host.add("x", edit, seed=0)
    excite(host)
    optimizer, state, total = torch.optim.AdamW(host.parameters("x"), lr=1e-3), {}, 20
    kept = []
    for step in range(1, total + 1):
        with host.using("x"):
            loss = host.model(**batch(), labels=batch()["input_ids"]).loss + edit.penalty(host.by_place("x"))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        edit.after_step(host.by_place("x"), step, total, state)
        kept.append(sum(int((w["E"] != 0).sum()) for w in host.by_place("x").values()))
    places = len(host.by_place("x"))
    allocated = kept[1::2]  # between two allocations, a dropped value may come back (alg. 1)
    assert kept[0] == 6 * places and kept[-1] == 2 * places and sorted(allocated, reverse=True) == allocated


def test_counting_on_meta_reads_no_weights():
    import transformers as hf

    from tests.laws.zoo import CONFIGS, methods, places

    for family in ("llama", "bloom", "phi3"):
        real = inlay.attach(base(family))
        with torch.device("meta"):
            shapes = inlay.attach(hf.AutoModelForCausalLM.from_config(CONFIGS[family]()))
        for name in methods(family):
            for host in (real, shapes):
                host.add(name, small(name), at=places(name, family))
            assert real.count(name) == shapes.count(name)
            assert all(t.is_meta for t in shapes.tensors(name).values())


def test_a_plan_made_while_evaluating_trains():
    host = host_with("lora", "series")
    host.use("lora", "series", None)
    with torch.inference_mode():
        host.model(**batch())
        host.use("series", "lora", None)
    host.model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(p.grad is not None for p in host.parameters())


def test_adapters_may_be_called_what_modules_have_as_attributes():
    host = inlay.attach(base("llama"))
    for name in ("half", "train", "eval", "keys", "type", "forward", "training", "wear"):
        host.add(name, small("lora"), seed=0)
    excite(host)
    mixed, alone = logits(host, "train", "half", "keys", **batch())[1], logits(host, "half", **batch())[1]
    assert_equal_to_rounding(mixed, alone, host.model)
    for name in list(host.edits):
        host.remove(name)
    assert not any("inlay" in n for n, _ in host.model.named_modules())


def test_a_prompt_starts_from_a_text():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [ord(c) - 90 for c in text]}

    host = inlay.attach(base("llama"))
    edit = inlay.method("prompt").make(text="abc", tokens=5)
    with pytest.raises(inlay.InlayError, match="not tokenised yet"):
        host.add("x", edit)
    host.add("x", edit.tokenised(tokenizer))
    table = host.model.get_input_embeddings().weight[torch.tensor([7, 8, 9, 7, 8])]
    assert torch.equal(host.tensors("x")["embed/table"], table)


def test_adalora_cannot_train_towards_more_than_its_rank():
    host = inlay.attach(base("llama"))
    host.add("x", inlay.method("adalora").make(rank=4, target=8))
    with pytest.raises(inlay.InlayError, match="target 8 must lie between 1 and its rank 4"):
        host.edits["x"].after_step(host.by_place("x"), 1, 10, {})


@pytest.mark.parametrize("method", ["prefix", "ia3", "series"])
def test_a_forward_that_fails_leaves_nothing_to_the_next(method):
    host = inlay.attach(base("llama"))
    host.add("x", small(method), at={"ia3": "block:input"}.get(method), seed=0)
    host.add("y", small("parallel"), at="block", seed=1)
    excite(host)
    want = {name: logits(host, name, **batch()) for name in ("y", None, "x")}

    def fail(*args):
        raise MemoryError("no room")

    hook = host.model.get_submodule("model.layers.0.mlp").register_forward_hook(fail)
    with pytest.raises(MemoryError):
        logits(host, "x", **batch(seed=9))
    hook.remove()
    for name, said in want.items():
        assert torch.equal(logits(host, name, **batch()), said)
