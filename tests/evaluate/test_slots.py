"""Slots: every decoder's rows come and go and say what they say alone."""

import warnings

import pytest
import torch

import inlay
from inlay.core import processor
from inlay.core.site import Site
from inlay.engine import reorder
from inlay.engine.reorder import Reordered
from inlay.evaluate import GenerateSettings, generate, slots
from tests.evaluate import tiny
from tests.laws import zoo

SETTINGS = GenerateSettings(max_new_tokens=9, batch_size=3)


class Ids:
    """As much of a tokenizer as ids need."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


class Endless(Ids):
    eos_token_id = None


def prompts(count: int = 8, beginning: int = 0) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    shared = torch.randint(3, 97, (beginning,), generator=g).tolist()
    return [shared + torch.randint(3, 97, (1 + 3 * i % 7,), generator=g).tolist() for i in range(count)]


def alone(host, ids, name, new: int) -> list[int]:
    with host.using(name), torch.no_grad():
        out = host.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(ids) :].tolist()


def dressed(family: str):
    host = inlay.attach(zoo.base(family))
    for name in ("lora", "prefix", "prompt"):
        host.add(name, zoo.small(name), at=zoo.places(name, family), seed=0)
    zoo.excite(host)
    return host


@pytest.mark.parametrize("beginning", [0, 11])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_as_hugging_face_one_by_one(family, beginning):
    host, rows = dressed(family), prompts(beginning=beginning)
    plan = ["lora", None, "prefix", "prompt", "prefix+lora", None, "lora", "prefix"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = generate(host, Ids(), rows, plan, SETTINGS)
    assert bool([w for w in told if "slots" in str(w.message)]) == (family == "falcon-rw")
    assert [g.tokens for g in found] == [alone(host, ids, name, 9) for ids, name in zip(rows, plan, strict=True)]


def test_a_window_slides_over_slots():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MistralConfig(sliding_window=6, **zoo.GQA)
    host = inlay.attach(hf.MistralForCausalLM(config).eval())
    for p in host.model.parameters():
        p.data.normal_(std=0.2)
    assert slots.serves(host)
    found = generate(host, Ids(), prompts(beginning=9), None, SETTINGS)
    assert [g.tokens for g in found] == [alone(host, ids, None, 9) for ids in prompts(beginning=9)]


def test_scores_that_are_capped():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Gemma2Config(head_dim=8, sliding_window=5, attn_logit_softcapping=2.0, **zoo.GQA)
    host = inlay.attach(hf.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval())
    for p in host.model.parameters():
        p.data.normal_(std=0.3)
    assert slots.serves(host)
    found = generate(host, Ids(), prompts(), None, SETTINGS)
    assert [g.tokens for g in found] == [alone(host, ids, None, 9) for ids in prompts()]


def fed(host, rows, plan, settings):
    """(rows, tokens) of every forward of a generation."""
    assert slots.serves(host)
    seen = []
    hook = host.model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generate(host, Endless(), rows, plan, settings)
    hook.remove()
    return seen


def test_a_shared_beginning_is_computed_once_per_adapter():
    rows = prompts(12, beginning=20)
    host = dressed("llama")
    fed(host, rows[:1], ["prefix"], GenerateSettings(max_new_tokens=1))  # a first use is tried
    seen = fed(host, rows, ["lora", "prefix"] * 6, GenerateSettings(max_new_tokens=1, batch_size=1))
    assert sum(b * t for b, t in seen) == 2 * 20 + 3 + sum(len(r) - 20 for r in rows)  # 3: virtual tokens of `prefix`


def test_rows_are_replaced_at_once_and_the_last_ones_close_up():
    host = dressed("llama")
    host.model.config.max_position_embeddings = 40
    host.model.generation_config.eos_token_id = None
    rows = [[5 + i] * (40 - new) for i, new in enumerate((5, 9, 12, 2))]  # each is cut off by the context
    seen = fed(host, rows, None, GenerateSettings(max_new_tokens=20, batch_size=2))
    # Longest first: those with 2 and 5 tokens left to the context, then 9, then 12.
    assert seen == [(2, 38), (2, 1), (1, 31)] + [(2, 1)] * 3 + [(1, 28)] + [(2, 1)] * 5 + [(1, 1)] * 6


def test_buffers_grow_and_rows_move_without_a_trace():
    host = dressed("llama")
    cache = slots.Slots(host, 3, 40)
    ids = prompts(3, beginning=6)
    with torch.no_grad(), host.using(None), cache.attending():
        cache.begin([0, 1], ids[:2], [(), ()])
        cache.begin([2], ids[2:], [()])
        cache.copy(2, 0)
        got = cache.step(torch.tensor([7, 8]))
        for token in range(20):
            got = cache.step(torch.tensor([token, token + 3]))
    with torch.no_grad(), host.using(None):
        for row, logits in zip(([*ids[2], 7, *range(20)], [*ids[1], 8, *range(3, 23)]), got, strict=True):
            assert torch.allclose(host.model(torch.tensor([row])).logits[0, -1], logits, atol=1e-4)


def test_reordered_weights_change_nothing(monkeypatch):
    monkeypatch.setattr(slots, "REORDER", 3)
    monkeypatch.setattr(reorder, "FEW", 1)
    host, tok = tiny.host("llama"), tiny.tokenizer()
    found = generate(host, tok, tiny.PROMPTS, tiny.PLAN, GenerateSettings(max_new_tokens=12, batch_size=2))
    monkeypatch.setattr(slots, "REORDER", 10**9)
    assert found == generate(host, tok, tiny.PROMPTS, tiny.PLAN, GenerateSettings(max_new_tokens=12, batch_size=2))
    assert not any("forward" in vars(m) for m in host.model.modules())


@pytest.mark.skipif(not processor.has_onednn(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("slow", (True, False))
def test_weights_are_reordered_for_as_many_rows_as_gain_by_it(slow, monkeypatch):
    monkeypatch.setattr(processor, "product_library", lambda: "onednn" if slow else "mkl")
    monkeypatch.setattr(reorder, "allows_onednn", lambda: True)
    model = tiny.host("llama").model
    assert bool(Reordered(model, reorder.FEW - 1).bytes) == slow
    assert Reordered(model, reorder.FEW).bytes


@pytest.mark.skipif(not processor.allows_onednn(), reason="PyTorch without oneDNN, or it is not allowed")
def test_adapters_write_over_what_reordered_weights_say(monkeypatch):
    host, ids = tiny.host("llama"), torch.tensor([[5, 6, 7, 8]])
    made, run, spared = Reordered(host.model), Site.run, []

    def spy(self, worn, x, y=None, spare=False):
        spared.append(spare)
        return run(self, worn, x, y, spare)

    monkeypatch.setattr(Site, "run", spy)
    with torch.no_grad(), host.using("lora"):
        want = host.model(ids).logits
        with made.active():
            got = host.model(ids).logits
    assert spared and all(spared)
    assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.skipif(not processor.allows_onednn(), reason="PyTorch without oneDNN, or it is not allowed")
def test_a_changed_weight_is_reordered_again():
    host = tiny.host("gpt2")
    made = Reordered(host.model)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        for _ in range(2):
            with made.active():
                got = host.model(ids).logits
            assert made.bytes and torch.allclose(got, host.model(ids).logits, atol=1e-5)
            host.model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
