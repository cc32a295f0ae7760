"""Features: batched as alone, of the bare base, in the context of their prompt."""

from __future__ import annotations

import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.knowledge.distance import distance
from inlay.knowledge.feature import Space, features
from inlay.knowledge.wording import leading
from tests.evaluate.tiny import base, host, tokenizer

TOK = tokenizer()
PROMPTS = ["Where?", "Who wrote it, and when did they?", "b"]
ANSWERS = ["x", "abc", "seven x"]  # with the leading blank 2, 4 and 8 tokens of a byte each


def test_embed_is_the_mean_of_the_rows_of_the_table():
    model = base("llama")
    rows = model.get_input_embeddings().weight.detach()
    ids = TOK(" abc")["input_ids"]
    (z,) = features(model, TOK, ["p"], ["abc"])
    assert torch.allclose(z, rows[ids].mean(0), atol=1e-7)
    (last,) = features(model, TOK, ["p"], ["abc"], Space(pool="last"))
    assert torch.equal(last, rows[ids[-1]])


@pytest.mark.parametrize("family", ["llama", "gptj", "bloom"])
@pytest.mark.parametrize("space", ["embed", "hidden:1", "hidden:-1", "predict:1"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_equals_one_by_one(family, space, side):  # check 3
    model, tok = base(family), tokenizer()
    tok.padding_side = side
    z = features(model, tok, PROMPTS, ANSWERS, space)
    alone = torch.cat([features(model, tok, [p], [a], space) for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    assert z.dtype == torch.float32 and z.shape == (3, 32)
    assert distance(z, alone).max() <= 1e-6
    assert space != "embed" or torch.equal(z, alone)


def test_hidden_states_are_those_at_the_answer():
    model = base("llama")
    ids = [TOK(t)["input_ids"] for t in ("Where?", " x")]
    with torch.no_grad():
        states = model(torch.tensor([ids[0] + ids[1]]), output_hidden_states=True).hidden_states
    (z,) = features(model, TOK, ["Where?"], ["x"], "hidden:1")
    assert torch.allclose(z, states[1][0, len(ids[0]) :].mean(0), atol=1e-6)
    (says,) = features(model, TOK, ["Where?"], [""], "predict:2")
    assert torch.allclose(says, states[2][0, len(ids[0]) - 1], atol=1e-6)


def test_adapters_enter_predict_and_nothing_else():
    wearing = host("llama")
    bare = {s: features(base("llama"), TOK, PROMPTS, ANSWERS, s) for s in ("embed", "hidden:1", "predict:2")}
    wearing.use("lora")
    for space in ("embed", "hidden:1"):
        assert torch.equal(features(wearing, TOK, PROMPTS, ANSWERS, space), bare[space])
    assert not torch.allclose(features(wearing, TOK, PROMPTS, ANSWERS, "predict:2"), bare["predict:2"], atol=1e-3)
    named = features(wearing, TOK, PROMPTS, ANSWERS, "predict:2", plan="series")
    assert not torch.allclose(named, features(wearing, TOK, PROMPTS, ANSWERS, "predict:2"), atol=1e-3)
    assert wearing.plan == (("lora",),)
    wearing.use(None)
    assert torch.equal(features(wearing, TOK, PROMPTS, ANSWERS, "predict:2"), bare["predict:2"])


def test_an_answer_means_something_else_behind_another_prompt():  # check 9: permuting features is not enough
    model, perm = base("llama"), [1, 2, 0]
    moved = [ANSWERS[i] for i in perm]
    for space, equal in (("embed", True), ("hidden:1", False)):
        permuted = features(model, TOK, PROMPTS, ANSWERS, space)[perm]
        recomputed = features(model, TOK, PROMPTS, moved, space)
        assert bool(distance(permuted, recomputed).max() < 1e-6) is equal


def test_an_empty_answer_has_the_zero_feature_in_every_space():
    model, mean = base("llama"), torch.ones(32)
    for space in (Space(), Space("hidden:1"), Space(center=True), Space("hidden:0", "last", True)):
        z = features(model, TOK, ["p", "p"], ["", "a"], space, mean=mean)
        assert not z[0].any() and z[1].any()
    assert not features(model, TOK, ["p"], [""]).any()


def test_centring_subtracts_the_mean_it_is_given():
    model, mean = base("llama"), torch.arange(32.0)
    z = features(model, TOK, PROMPTS, ANSWERS, Space(center=True), mean=mean)
    assert torch.equal(z, features(model, TOK, PROMPTS, ANSWERS) - mean)
    with pytest.raises(InlayError, match="give the mean"):
        features(model, TOK, PROMPTS, ANSWERS, Space(center=True))


def test_mistakes_are_told():
    for name in ("hidden", "hidden:", "predict:x", "embed:1", "logits"):
        with pytest.raises(InlayError, match="unknown space"):
            Space(name)
    with pytest.raises(InlayError, match="no layer 3"):
        features(base("llama"), TOK, ["p"], ["a"], "hidden:3")
    with pytest.raises(InlayError, match="no host"):
        features(base("llama"), TOK, ["p"], ["a"], "predict:1", plan="lora")
    with pytest.raises(InlayError, match="unknown adapter"):
        features(inlay.attach(base("llama")), TOK, ["p"], ["a"], "predict:1", plan="lora")


def test_a_blank_leads_unless_the_tokenizer_marks_words_itself():
    class Marks:
        def __call__(self, text, add_special_tokens):
            return {"input_ids": [7]}

        def convert_ids_to_tokens(self, ids):
            return ["\u2581a"]

    assert leading(TOK) == " " and leading(Marks()) == ""
