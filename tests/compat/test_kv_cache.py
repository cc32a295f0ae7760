"""KV caches under every name and of every kind: used, computed another way, or refused; never another result."""

from __future__ import annotations

import inspect
from unittest.mock import patch

import pytest
import torch
from transformers import DynamicCache, StaticCache

import inlay
from inlay.compat import kv_cache
from inlay.core import cache_check
from inlay.core.errors import InlayError
from tests.laws.zoo import base, batch, excite, small

PROMPT = torch.tensor([[11, 12, 13, 14, 15]])


def host_of(model, *names: str):
    host = inlay.attach(model)
    for name in names or ("prefix", "road1", "lora"):
        more = {"positions": "last-prompt"} if name == "road1" else {}
        host.add(name, small(name, **more), at="block@1" if more else None, seed=0)
    excite(host, 0.3)
    return host


def renamed(model, name: str | None, out: str = "", drop: bool = False):
    """Let a model take its KV cache under another name (None: under none), and return it as `out`."""
    own = type(model).forward
    known = kv_cache.parameters(model).cache

    def forward(*args, **kwargs):
        cache = kwargs.pop(name, None) if name else None
        if drop:
            kwargs.pop(known, None)
            cache = None
        made = own(model, *args, **({known: cache} if cache is not None else {}), **kwargs)
        if out:
            made = dict(logits=made.logits, **{out: kv_cache.returned(made)})
            made = type("Output", (dict,), {"logits": made["logits"]})(made)
        return made

    parameters = [p for k, p in inspect.signature(model.forward).parameters.items() if k != known]
    if name:
        one = inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
        parameters.insert(3, one)
    forward.__signature__ = inspect.Signature(parameters)
    model.forward = forward
    return model


def steps(host, name: str, argument: str, cache=None) -> torch.Tensor:
    """Logits of the last of the prompt's tokens, fed in two forwards with a cache, under this argument's name."""
    with torch.no_grad(), host.using(name):
        first = host.model(input_ids=PROMPT[:, :3], use_cache=True, **({argument: cache} if cache is not None else {}))
        cache = kv_cache.returned(first)
        mask = torch.ones_like(PROMPT[:, :4])
        host.model(input_ids=PROMPT[:, 3:4], attention_mask=mask, use_cache=True, **{argument: cache})
        return host.model(input_ids=PROMPT[:, 4:], use_cache=True, **{argument: cache}).logits[:, -1]


def whole(host, name: str) -> torch.Tensor:
    with torch.no_grad(), host.using(name), host.prompts([3]):
        return host.model(input_ids=PROMPT, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("out", ["cache", "past_key_values", "kv"])
@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_every_known_name_is_used_and_outputs_are_found_by_type(name, out):
    host = host_of(renamed(base("llama"), name, out))
    for adapter in host.edits:
        torch.testing.assert_close(steps(host, adapter, name), whole(host, adapter), rtol=1e-4, atol=1e-4)
        handed = steps(host, adapter, name, DynamicCache())
        torch.testing.assert_close(handed, whole(host, adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asked", ["cache", "past_key_values"])
def test_a_cache_is_passed_on_under_the_name_that_the_forward_has(asked):
    """transformers itself renames the old name to the new one only."""
    host = host_of(renamed(base("llama"), "cache" if asked == "past_key_values" else "past_key_values"))
    torch.testing.assert_close(steps(host, "prefix", asked), whole(host, "prefix"), rtol=1e-4, atol=1e-4)


def test_a_positional_cache_is_found():
    host = host_of(base("llama"))
    at = kv_cache.parameters(host.model).names.index(kv_cache.parameters(host.model).cache)
    with torch.no_grad(), host.using("prefix"):
        cache = kv_cache.returned(host.model(input_ids=PROMPT[:, :4], use_cache=True))
        args = [PROMPT[:, 4:], *[None] * (at - 1), cache]
        got = host.model(*args, use_cache=True).logits[:, -1]
    torch.testing.assert_close(got, whole(host, "prefix"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adapter", ["prefix", "road1"])
def test_an_unknown_name_is_refused_where_columns_matter_and_only_there(adapter):
    host = host_of(renamed(base("llama"), "kv_state", "kv_state"))
    torch.testing.assert_close(steps(host, "lora", "kv_state"), whole(host, "lora"), rtol=1e-4, atol=1e-4)
    with pytest.raises(InlayError, match="DynamicCache as 'kv_state'.*use_cache=False"):
        steps(host, adapter, "kv_state")


def test_a_forward_that_takes_no_cache_is_refused():
    host = host_of(renamed(base("llama"), None))
    with pytest.raises(InlayError, match="use_cache=False"):
        steps(host, "prefix", "cache")


def test_what_is_no_cache_by_name_or_type_shows_by_its_mask():
    """A decoder that keeps its state where Inlay cannot see it is given one token and a mask of several."""
    host = host_of(base("llama"))
    with torch.no_grad(), host.using("prefix"), pytest.raises(InlayError, match="mask has 6 columns.*no KV cache"):
        host.model(input_ids=PROMPT[:, :1], attention_mask=torch.ones(1, 6, dtype=torch.long))


def test_a_cache_that_was_cropped_without_counting_virtual_tokens_is_refused():
    host = host_of(base("llama"))
    with torch.no_grad(), host.using("prefix"):
        cache = kv_cache.returned(host.model(input_ids=PROMPT, use_cache=True))
        cache.crop(-3)
        with pytest.raises(InlayError, match="mask has 6 columns"):
            mask = torch.ones(1, 6, dtype=torch.long)
            host.model(input_ids=PROMPT[:, :1], attention_mask=mask, **kv_cache.argument(host.model, cache))


def test_static_caches_tuples_and_other_states_are_refused():
    host, ids = host_of(base("llama")), PROMPT
    name = kv_cache.parameters(host.model).cache
    static = StaticCache(config=host.model.config, max_cache_len=16)
    uncounted = type("MambaCache", (), {})()
    several = {"cache": DynamicCache(), "past_key_values": DynamicCache()}
    for given, why in (
        ({name: static}, "StaticCache has no columns for virtual tokens"),
        ({name: ((torch.zeros(1), torch.zeros(1)),)}, "a tuple does not count its columns"),
        ({name: uncounted}, "a MambaCache does not count its columns"),
        ({"state": [torch.zeros(1)]}, "carries 'state' between steps"),
        (several, "given several KV caches"),
    ):
        with torch.no_grad(), host.using("prefix"), pytest.raises(InlayError, match=why):
            host.model(input_ids=ids, **given)


def test_arguments_with_an_entry_per_token_that_are_not_known_are_refused():
    host = host_of(base("llama"))
    with torch.no_grad(), host.using("prefix"), pytest.raises(InlayError, match="'speaker_ids'.*entry per token"):
        host.model(input_ids=PROMPT, speaker_ids=torch.zeros_like(PROMPT))


# ---- the comparison of a first cached step ---------------------------------------------------------------------------
def generated(host, name, **more):
    with torch.no_grad(), host.using(name):
        return host.model.generate(**batch(2, pad=2), max_new_tokens=3, do_sample=False, pad_token_id=0, **more)


@pytest.mark.parametrize("adapter", ["prefix", "road1"])
def test_a_cache_that_is_swallowed_is_found_at_its_first_use(adapter):
    """The signature says that it is taken, and it is not."""
    host = host_of(base("llama"))
    known = kv_cache.parameters(host.model).cache
    renamed(host.model, known, drop=True)
    with pytest.raises(InlayError, match=r"cannot be trusted|counts \d+ columns"):
        generated(host, adapter, eos_token_id=None)
    assert generated(host, "lora", use_cache=False).shape == (2, 10)
    assert generated(host, adapter, use_cache=False).shape == (2, 10), "the cure"


def test_a_step_that_computes_something_else_is_found_for_a_fresh_adapter_too():
    """A library that forgets what it has seen: the cache counts right, the numbers differ."""
    host = inlay.attach(base("llama")).add("prefix", small("prefix"), seed=0)
    own = DynamicCache.update

    def forgetful(self, key, value, layer, *args, **kwargs):
        keys, values = own(self, key, value, layer, *args, **kwargs)
        return keys.flip(2) if key.shape[2] == 1 else keys, values

    with patch.object(DynamicCache, "update", forgetful), pytest.raises(InlayError, match="logits would change by"):
        generated(host, "prefix")


def test_the_comparison_runs_once_and_leaves_no_trace():
    host = host_of(base("llama"), "prefix", "prompt", "lora")
    host.model.train()
    seen = []
    host.model.register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k["input_ids"].shape)), with_kwargs=True)
    cache, ids = DynamicCache(), PROMPT.expand(2, -1)
    plan = ("prefix", "lora")
    with torch.no_grad(), host.using(*plan):
        state, now = torch.get_rng_state(), host.plan
        first = host.model(input_ids=ids, use_cache=True, **kv_cache.argument(host.model, cache))
        assert torch.equal(state, torch.get_rng_state()) and host.plan is now and host.model.training
        assert kv_cache.length(cache) == 8 and kv_cache.returned(first) is cache
        assert host._ready.batch == 2
        assert seen == [(1, 6), (1, 1), (1, 7), (2, 8)], "three virtual tokens each, and one row for one kind of plan"
        host.model(input_ids=ids[:, :1], use_cache=True, **kv_cache.argument(host.model, cache))
        host.model(input_ids=ids, use_cache=True, **kv_cache.argument(host.model, DynamicCache()))
        assert len(seen) == 6
    with torch.no_grad(), host.using("prompt"):
        host.model(input_ids=ids, use_cache=False)
        assert len(seen) == 7, "without a cache there is nothing to compare"
        host.model(input_ids=ids, **kv_cache.argument(host.model, DynamicCache()))
        assert len(seen) == 11, "another method"


def test_one_draw_may_differ_where_rounding_decides(monkeypatch):
    """In 16 bits a router may choose another expert; a misread cache differs in each draw."""
    one, two = torch.zeros(1, 4), torch.ones(1, 4)
    draws: list[int] = []

    def both(draw: int):
        draws.append(draw)
        return (one, two) if draw == 0 else (two, two)

    assert cache_check._compare(torch.bfloat16, both) == "" and draws == [0, 1]
    assert "would change by 1" in cache_check._compare(torch.bfloat16, lambda draw: (one, two))


@pytest.mark.parametrize("name", ["prefix", "road1"])
def test_slots_are_compared_too(name):
    from inlay.evaluate import GenerateSettings, generate, slots
    from tests.evaluate.test_slots import Endless

    host = host_of(base("llama"))
    settings = GenerateSettings(max_new_tokens=4)
    want = generated(host, name, eos_token_id=None)[0, 7:].tolist()
    prompt = batch(2, pad=2)["input_ids"][0].tolist()
    assert generate(host, Endless(), [prompt], name, settings)[0].tokens[:3] == want
    host.forward.checked.clear()
    own = slots.Slots.update

    def forgetful(self, key, value, *more, **kwargs):
        keys, values = own(self, key, value, *more, **kwargs)
        return keys.flip(2) if key.shape[2] == 1 else keys, values

    with patch.object(slots.Slots, "update", forgetful), pytest.raises(InlayError, match="Slots"):
        generate(host, Endless(), [prompt], name, settings)
