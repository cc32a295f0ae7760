"""Generation does not depend on the batch, agrees with Hugging Face one by one, and ends where it should."""

import copy

import pytest
import torch

from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate, option_scores
from inlay.evaluate.rows import pick
from tests.evaluate.tiny import CONFIGS, EOS, PLAN, PROMPTS, host, tokenizer

MODES = {
    "greedy": GenerateSettings(max_new_tokens=12),
    "beam": GenerateSettings(max_new_tokens=10, beams=4),
    "sampled": GenerateSettings(max_new_tokens=12, temperature=0.9, top_p=0.9, top_k=40, seed=7),
}


@pytest.fixture(scope="module", params=CONFIGS)
def worn(request):
    return host(request.param)


@pytest.fixture(scope="module")
def tok():
    return tokenizer()


@pytest.mark.parametrize("mode", MODES)
def test_independent_of_batch_size_and_order(worn, tok, mode):
    from dataclasses import replace

    settings = MODES[mode]
    alone = generate(worn, tok, PROMPTS, PLAN, replace(settings, batch_size=1))
    together = generate(worn, tok, PROMPTS, PLAN, replace(settings, batch_size=8))
    assert alone == together
    order = [7, 2, 9, 0, 4, 1, 8, 3, 6, 5]
    shuffled = generate(
        worn, tok, [PROMPTS[i] for i in order], [PLAN[i] for i in order], replace(settings, batch_size=4)
    )
    assert shuffled == [alone[i] for i in order]
    assert len({g.text for g in alone}) > 7


@pytest.mark.parametrize("beams", [1, 4])
def test_agrees_with_hugging_face_one_by_one(worn, tok, beams):
    found = generate(worn, tok, PROMPTS, PLAN, GenerateSettings(max_new_tokens=10, beams=beams))
    for prompt, name, one in zip(PROMPTS, PLAN, found, strict=True):
        ids = torch.tensor([tok(prompt)["input_ids"]])
        with worn.using(name), torch.no_grad():
            out = worn.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=10,
                do_sample=False,
                num_beams=beams,
                pad_token_id=EOS,
            )
        assert out[0, ids.shape[1] :].tolist() == one.tokens


def test_the_adapters_matter_and_the_plan_outside_does_not(worn, tok):
    worn.use("series")
    found = {n: generate(worn, tok, ["The cat"], n)[0].text for n in (None, "lora", "series", "prefix", "prompt")}
    assert len(set(found.values())) == 5
    assert worn.plan == (("series",),)
    worn.use(None)
    assert generate(worn, tok, ["The cat"], "lora")[0].text == found["lora"]


def test_sampling_is_seeded_and_repeats_differ(tok):
    worn = host("llama")
    hot = GenerateSettings(max_new_tokens=8, temperature=1.0, seed=1)
    twice = generate(worn, tok, ["same", "same"], None, hot)
    assert twice[0].tokens != twice[1].tokens
    assert generate(worn, tok, ["same", "same"], None, hot) == twice
    assert (
        generate(worn, tok, ["same"], None, GenerateSettings(max_new_tokens=8, temperature=1.0, seed=2))[0] != twice[0]
    )
    given = generate(worn, tok, ["same", "same"], None, hot, seeds=[5, 5])
    assert given[0] == given[1]


def test_drawn_tokens_follow_the_warped_distribution():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    scores = torch.randn(1, 30)
    settings = GenerateSettings(temperature=0.7, top_k=12, top_p=0.8)
    n = 40_000
    draws = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    share = torch.bincount(pick(scores.expand(n, -1), draws, settings), minlength=30) / n
    warped = scores
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(12), TopPLogitsWarper(0.8)):
        warped = warper(None, warped)
    assert torch.allclose(share, warped.softmax(-1)[0], atol=1e-4)


@pytest.mark.parametrize("beams", [1, 4])
def test_stops_at_a_text_and_cuts_it(tok, beams):
    worn = host("llama")
    free = generate(worn, tok, PROMPTS, PLAN, GenerateSettings(max_new_tokens=16, beams=beams))
    stop = free[1].text[5:7] if beams == 1 else free[1].text[-2:]
    assert stop and "\ufffd" not in stop
    settings = dict(max_new_tokens=16, beams=beams, stop=(stop, "never said"))
    alone = generate(worn, tok, PROMPTS, PLAN, GenerateSettings(batch_size=1, **settings))
    assert alone == generate(worn, tok, PROMPTS, PLAN, GenerateSettings(batch_size=10, **settings))
    assert any(g.finished == "stop" for g in alone)
    for g, was in zip(alone, free, strict=True):
        assert stop not in g.text
        if g.finished == "stop":
            assert stop in tok.decode(g.tokens) and stop not in tok.decode(g.tokens[:-1])
        if beams == 1:
            assert g.text == was.text.split(stop)[0] and (g.finished == "stop") == (stop in was.text)


def special(tok, more="<|turn|>"):
    """The tokenizer with a special token in place of a letter's, so that bases say it."""
    own = copy.deepcopy(tok)
    own.add_special_tokens({"additional_special_tokens": [more]})
    return own, own.convert_tokens_to_ids(more)


@pytest.mark.parametrize("beams", [1, 4])
def test_a_special_token_as_a_stop_text_ends_at_the_token(tok, beams):
    own, turn = special(tok)
    worn = host("llama", vocabulary=260)
    free = generate(worn, tok, PROMPTS[:4], None, GenerateSettings(max_new_tokens=16, beams=beams))
    letter, head = free[1].tokens[5], worn.model.get_output_embeddings().weight
    with torch.no_grad():  # the token is said wherever the letter was
        head[turn] = head[letter] * (1.01 if beams == 1 else 1.5)
    want = [g.tokens[: g.tokens.index(letter)] if letter in g.tokens else g.tokens for g in free]
    settings = dict(max_new_tokens=16, beams=beams, stop=("<|turn|>", "never said"))
    made = generate(worn, own, PROMPTS[:4], None, GenerateSettings(batch_size=4, **settings))
    assert made == generate(worn, own, PROMPTS[:4], None, GenerateSettings(batch_size=1, **settings))
    assert any(g.finished == "stop" for g in made)
    for i, g in enumerate(made):
        assert (g.finished == "stop") == (turn in g.tokens) and turn not in g.tokens[:-1]
        if beams == 1:
            assert g.text == tok.decode(want[i]) and (g.finished == "stop") == (len(want[i]) < len(free[i].tokens))


def test_a_stop_text_with_a_special_token_inside_is_refused(tok):
    own, _ = special(tok)
    for stop in ("a<|turn|>", "</s>\n", "<|turn|></s>"):
        with pytest.raises(InlayError, match="special token .* besides other text.*give the token alone"):
            generate(host("llama"), own, ["a"], None, GenerateSettings(stop=("x", stop)))


def test_ids_that_the_base_does_not_have_are_told(tok):
    worn = host("gpt2")
    for ids in ([5, 259], [-1]):
        with pytest.raises(InlayError, match=f"prompt 1 has the token id {ids[-1]}; this base's are 0 to 258"):
            generate(worn, tok, ["a", ids])
        with pytest.raises(InlayError, match=f"prompt 1 has the token id {ids[-1]}"):
            option_scores(worn, tok, ["a", ids], [["b"], ["b"]])
        with pytest.raises(InlayError, match=f"prompt 0, option 1 has the token id {ids[-1]}"):
            option_scores(worn, tok, ["a"], [["b", ids]])


def test_a_stop_text_in_the_prompt_is_no_stop(tok):
    worn = host("llama")
    free = generate(worn, tok, ["ab\n"], None, GenerateSettings(max_new_tokens=6))[0]
    kept = generate(worn, tok, ["ab\n"], None, GenerateSettings(max_new_tokens=6, stop=("ab", "\n" + free.text[0])))[0]
    assert kept == free


def test_the_end_token_ends(tok):
    worn = host("gpt2")
    free = generate(worn, tok, PROMPTS, PLAN, GenerateSettings(max_new_tokens=12))
    worn.model.generation_config.eos_token_id = [EOS, free[0].tokens[4]]
    worn.model.generation_config.repetition_penalty = 50.0
    ended = generate(worn, tok, PROMPTS, PLAN, GenerateSettings(max_new_tokens=12))
    at = free[0].tokens.index(free[0].tokens[4])
    assert ended[0].finished == "eos" and ended[0].tokens == free[0].tokens[: at + 1]
    assert worn.model.generation_config.repetition_penalty == 50.0
    for g, was in zip(ended, free, strict=True):
        assert was.tokens[: len(g.tokens)] == g.tokens
        assert g.finished == "eos" or len(g.tokens) == 12


def test_the_context_is_a_limit_for_each_prompt_alone(tok):
    worn = host("gpt2", positions=32)
    prompts, plan = ["y" * 28, "y" * 20, "y" * 27], [None, None, "prefix"]
    found = generate(worn, tok, prompts, plan, GenerateSettings(max_new_tokens=8))
    assert [(len(g.tokens), g.finished) for g in found] == [(4, "length"), (8, "length"), (2, "length")]
    with pytest.raises(InlayError, match="prompt 1 has 32 tokens .0 virtual"):
        generate(worn, tok, ["y", "y" * 32])
    with pytest.raises(InlayError, match="29 tokens .3 virtual"):
        generate(worn, tok, ["y" * 29], "prefix")


def test_empty_prompts_ids_and_training_mode(tok):
    worn = host("llama")
    worn.model.train()
    worn.model.model.norm.eval()
    one, two = generate(worn, tok, ["", [257]], None, GenerateSettings(max_new_tokens=5))
    assert one == two
    assert worn.model.training and not worn.model.model.norm.training
    loss = None
    with worn.using(*PLAN[:4]):  # the same rows may be trained after they were generated with
        generate(worn, tok, PROMPTS[:4], PLAN[:4], GenerateSettings(max_new_tokens=2))
        ids = torch.randint(0, 256, (4, 6))
        loss = worn.model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in worn.parameters("lora"))


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(beams=0), "beams 0"),
        (dict(temperature=-1.0), "temperature"),
        (dict(top_p=0.5), "do nothing"),
        (dict(beams=2, temperature=1.0), "does not sample"),
        (dict(stop="x"), "tuple"),
        (dict(stop=("",)), "not empty"),
        (dict(max_new_tokens=0), "at least 1"),
    ],
)
def test_settings_are_checked(wrong, says):
    with pytest.raises(InlayError, match=says):
        GenerateSettings(**wrong)


def test_wrong_plans_are_told(tok):
    worn = host("llama")
    with pytest.raises(InlayError, match="2 entries for 1"):
        generate(worn, tok, ["a"], ["lora", None])
    with pytest.raises(InlayError, match="unknown adapter 'nobody'"):
        generate(worn, tok, ["a"], "nobody")
    with pytest.raises(InlayError, match="3 seeds"):
        generate(worn, tok, ["a"], seeds=[1, 2, 3])
    assert generate(worn, tok, []) == []


def test_limits_are_each_prompts_own(worn, tok):
    settings, limits = GenerateSettings(max_new_tokens=6, batch_size=3), [1 + i % 8 for i in range(len(PROMPTS))]
    whole = generate(worn, tok, PROMPTS, PLAN, settings)
    cut = generate(worn, tok, PROMPTS, PLAN, settings, limits=limits)
    assert [c.tokens for c in cut] == [w.tokens[:n] for w, n in zip(whole, limits, strict=True)]
    with pytest.raises(InlayError, match="2 limits for"):
        generate(worn, tok, PROMPTS, PLAN, settings, limits=[1, 2])
