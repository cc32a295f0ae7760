"""RoAd at single positions: the last token of a prompt."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.route import STRATEGIES
from inlay.methods.rotate import RoAd
from tests.laws.zoo import base, batch, excite, logits


def last(layer: int, family: str = "llama", dtype=torch.float32):
    """A host that wears a RoAd of one block's last prompt token, and one of all its tokens."""
    host = inlay.attach(base(family, dtype))
    for name, positions in (("last", "last-prompt"), ("all", "all")):
        host.add(name, RoAd(positions=positions), at=f"block@{layer}")
    host.add("prefix", inlay.method("prefix").make(tokens=3), seed=0)
    host.add("after", RoAd(positions="last-prompt"), at=f"block@{layer}")
    excite(host, 0.3)
    for name in ("all", "after"):
        host.fill(name, host.tensors("last"))
    return host


def states(host, plan, **inputs) -> torch.Tensor:
    """What the last block says (B, T, D)."""
    seen = []
    handle = host.model.model.layers[1].register_forward_hook(lambda m, args, out: seen.append(out))
    logits(host, *plan, **inputs)
    handle.remove()
    return seen[-1]


def test_R23_only_the_last_prompt_token_changes():
    host, inputs = last(1), batch(3, 7)
    bare, one, every = (states(host, (n,), **inputs) for n in (None, "last", "all"))
    assert torch.equal(one[:, :-1], bare[:, :-1]) and torch.equal(one[:, -1], every[:, -1])
    assert (one[:, -1] - bare[:, -1]).abs().max() > 0.1
    # Right padding, and a prompt that ends before the answer, told by the labels or by the caller.
    inputs["attention_mask"][1, 5:] = 0
    ends = [7, 5, 7]
    one = states(host, ("last",), **inputs)
    labels = inputs["input_ids"].masked_fill(torch.arange(7) < torch.tensor([[3], [4], [2]]), -100)
    answered = states(host, ("last",), **inputs, labels=labels)
    with host.prompts([3, 4, 2]):
        told = states(host, ("last",), **inputs)
    for i, (whole, part) in enumerate(zip(ends, (3, 4, 2), strict=True)):
        for got, end in ((one, whole), (answered, part), (told, part)):
            changed = (got[i] != bare_of(host, inputs)[i]).any(-1).nonzero()[:, 0].tolist()
            assert changed == [end - 1]


def bare_of(host, inputs) -> torch.Tensor:
    return states(host, (None,), **inputs)


@pytest.mark.parametrize("plan", ["last", "prefix+last", "prefix+after"])
def test_R23_left_padding_does_not_matter(plan):
    host, inputs = last(0), batch(1, 6)
    padded = {k: torch.nn.functional.pad(v, (4, 0)) for k, v in inputs.items()}
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    want = logits(host, plan, **inputs)
    torch.testing.assert_close(logits(host, plan, **padded)[:, 4:], want, rtol=1e-5, atol=1e-5)
    assert (want - logits(host, plan.removesuffix("+last").removesuffix("+after"), **inputs)).abs().max() > 0.01 or (
        plan == "last"
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_R23_rows_and_plans_mix(strategy):
    host, inputs = last(0, dtype=torch.float64), batch(5, 7, pad=2)
    host.strategy = strategy
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    plan = ("last", None, "prefix+last", "all", "prefix")
    mixed, used = logits(host, *plan, **inputs), inputs["attention_mask"].bool()
    for i, name in enumerate(plan):
        alone = logits(host, name, **inputs)[i]
        torch.testing.assert_close(mixed[i][used[i]], alone[used[i]], rtol=0, atol=1e-9)


def test_R23_nothing_is_turned_while_decoding():
    host, inputs = last(1), batch(3, 6, pad=2)
    with torch.no_grad():
        for n in (None, "last"):
            with host.using(n):
                past = host.model(**inputs, use_cache=True).past_key_values
                step = torch.full((3, 1), 5)
                mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
                said = host.model(input_ids=step, attention_mask=mask, past_key_values=past).logits
            want = said if n is None else want  # noqa: F821
    assert torch.equal(said, want)  # the last block's own output is all that was turned, and it is not cached
    # And where the turned state is read by the next block: cached is uncached, alone or with beams.
    host = last(0)
    go = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad(), host.using("last", None, "prefix+last"):
        for beams in (1, 3):
            cached = host.model.generate(**inputs, **go, num_beams=beams)
            with host.prompts(inputs["attention_mask"].sum(-1)):
                plain = host.model.generate(**inputs, **go, num_beams=beams, use_cache=False)
            assert torch.equal(cached, plain)


def test_R23_training_packed_or_padded_turns_what_generation_turns():
    from inlay.train.ways import Packed, Plain
    from tests.engine.exactness import gradients as of
    from tests.engine.test_packed import Row

    host = last(0)
    ids = [[5, 6, 7, 8, 9], [10, 11, 12], [13, 14, 15, 16]]
    rows = [Row(own, [-100] * n + own[n:]) for own, n in zip(ids, (3, 1, 2), strict=True)]
    want, plain = of(host, "last", Plain(host, 0, 2), rows)
    got, packed = of(host, "last", Packed(host, 0, 14), rows)
    assert got == pytest.approx(want, rel=1e-5) and set(plain) == {"0.block/theta", "0.block/a"}
    for k, g in plain.items():
        torch.testing.assert_close(packed[k], g, rtol=1e-3, atol=1e-5)
    learned = [Row(own, own) for own in ids]  # no prompt: nothing is turned, and nothing learns
    for way in (Plain(host, 0, 2), Packed(host, 0, 14)):
        assert not any(g.any() for g in of(host, "last", way, learned)[1].values())
    with host.using("last"), torch.no_grad():
        past = host.model(torch.tensor([ids[0][:3]]), use_cache=True)
        more = host.model(torch.tensor([ids[0][3:4]]), past_key_values=past.past_key_values)
        said = torch.cat([past.logits[0, -1:], more.logits[0]])
        loss = torch.nn.functional.cross_entropy(said, torch.tensor(ids[0][3:]), reduction="sum")
        assert float(loss) == pytest.approx(float(Plain(host, 0, 1).loss(rows[:1])), rel=1e-5)


def test_R23_evaluation_knows_where_prompts_end():
    from inlay.evaluate import GenerateSettings, generate, option_scores
    from tests.evaluate.tiny import base as speaking
    from tests.evaluate.tiny import tokenizer

    host = inlay.attach(speaking("llama"))
    host.add("last", RoAd(positions="last-prompt"), at="block@0")
    excite(host, 0.5)
    prompts = [f"The bird said: {w}" for w in ("hello", "no", "two words", "", "12")]
    options = [["yes", "no, never", "no"], ["a", "b"], ["x"], ["why", "what"], ["who"]]
    plan = ["last", None, "last", "last", "last"]
    scores = [option_scores(host, tokenizer(), prompts, options, plan, share=share) for share in (True, False)]
    bare = option_scores(host, tokenizer(), prompts, options)
    for a, b, c, name in zip(*scores, bare, plan, strict=True):
        assert a == pytest.approx(b, abs=2e-4) and (a == pytest.approx(c, abs=2e-4)) == (name is None)
    settings = GenerateSettings(max_new_tokens=6, batch_size=2)
    made = generate(host, tokenizer(), prompts, plan, settings)
    for prompt, name, one in zip(prompts, plan, made, strict=True):
        ids = torch.tensor([tokenizer()(prompt)["input_ids"]])
        with torch.no_grad(), host.using(name):
            out = host.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert one.tokens == out[0, ids.shape[1] :].tolist()
    assert made != generate(host, tokenizer(), prompts, None, settings)
