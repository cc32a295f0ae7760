"""What is served is what `generate` says, whatever shares the batch; the official client reads all of it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from dataclasses import replace

import pytest
import torch
from openai import AsyncOpenAI

from inlay.evaluate import GenerateSettings, generate
from inlay.library.compose import compose
from tests.evaluate.tiny import PLAN, PROMPTS, tokenizer
from tests.serve import tiny_server

MODES = {
    "greedy": GenerateSettings(max_new_tokens=20),
    "sampled": GenerateSettings(max_new_tokens=20, temperature=0.9, top_p=0.9, top_k=40, seed=7),
    "stopped": GenerateSettings(max_new_tokens=20),  # the texts are taken from what is said without them
}


def ask(settings: GenerateSettings) -> dict:
    told = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "seed": settings.seed}
    return told | {"top_p": settings.top_p, "stop": list(settings.stop), "extra_body": {"top_k": settings.top_k}}


@pytest.fixture(scope="module")
def want(reference):
    def alone(settings):
        return [
            generate(reference, tokenizer(), [p], [name], replace(settings, batch_size=1))[0]
            for p, name in zip(PROMPTS, PLAN, strict=True)
        ]

    said = [g.text for g in alone(MODES["greedy"])]
    MODES["stopped"] = replace(MODES["stopped"], stop=(said[1][5:8], said[3][9:11], said[4][2], "never said"))
    return {name: alone(settings) for name, settings in MODES.items()}


@pytest.mark.parametrize("stream", [False, True])
def test_a_special_token_as_a_stop_text(served, stream):
    asked = {"model": "base", "prompt": "Why?", "max_tokens": 12, "temperature": 0, "stream": stream}
    free = served.client().completions.create(**asked | {"stream": False}).choices[0].text
    head = served.batcher._running.host.model.get_output_embeddings().weight
    was, own = head[257].clone(), head[tokenizer()(free[4])["input_ids"][0]]

    def says(row):
        with torch.no_grad():
            head[257] = row

    served.batcher.call(lambda: says(own * 1.01)).result()
    try:
        got = served.client().completions.create(**asked, stop="<s>")
        parts = [c.choices[0] for c in got] if stream else [got.choices[0]]
    finally:
        served.batcher.call(lambda: says(was)).result()
    assert "".join(p.text for p in parts) == free.split(free[4])[0] and parts[-1].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_mixed_requests_say_what_each_says_alone(served, want, mode, stream):
    async def one(client, prompt, name):
        asked = {"model": name or "base", "prompt": prompt, "stream": stream, **ask(MODES[mode])}
        got = await client.completions.create(**asked)
        if not stream:
            return got.choices[0].text, got.choices[0].finish_reason
        parts = [c.choices[0] async for c in got]
        assert all(p.finish_reason is None for p in parts[:-1])
        return "".join(p.text for p in parts), parts[-1].finish_reason

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(one(client, *pair) for pair in zip(PROMPTS, PLAN, strict=True)))

    for (text, reason), alone in zip(asyncio.run(all_at_once()), want[mode], strict=True):
        assert text == alone.text
        assert reason == ("length" if alone.finished == "length" else "stop")
    assert mode != "stopped" or {g.finished for g in want[mode]} == {"stop", "length"}
    assert len({g.text for g in want["greedy"]}) > 7


def test_requests_of_all_kinds_share_a_batch(served, want):
    jobs = [(m, i) for m in MODES for i in range(len(PROMPTS))]

    def one(job):
        mode, i = job
        asked = {"model": PLAN[i] or "base", "prompt": PROMPTS[i], **ask(MODES[mode])}
        return served.client().completions.create(**asked).choices[0].text

    before = served.metric('inlay_step_rows_bucket{le="2.0"}'), served.metric("inlay_step_rows_count")
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        got = list(pool.map(one, jobs))
    assert got == [want[m][i].text for m, i in jobs]
    small, steps = (
        now - was
        for now, was in zip(
            (served.metric('inlay_step_rows_bucket{le="2.0"}'), served.metric("inlay_step_rows_count")),
            before,
            strict=True,
        )
    )
    assert small < steps / 2, "most steps should feed 3 or 4 rows"


def test_several_prompts_and_choices_are_as_one_call(served, reference):
    hot = GenerateSettings(max_new_tokens=9, temperature=1.0, seed=3)
    prompts = ["same", "other", "same"]
    rows = [p for p in prompts for _ in range(2)]
    want = [g.text for g in generate(reference, tokenizer(), rows, "lora", hot)]
    got = served.client().completions.create(model="lora", prompt=prompts, n=2, max_tokens=9, temperature=1.0, seed=3)
    assert [c.text for c in got.choices] == want and len(set(want)) == 6
    assert [c.index for c in got.choices] == list(range(6))
    assert got.usage.prompt_tokens == 13 and got.usage.completion_tokens <= 54
    stream = served.client().completions.create(
        model="lora", prompt=prompts, n=2, max_tokens=9, temperature=1.0, seed=3, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    texts = [""] * 6
    for chunk in stream:
        for c in chunk.choices:
            texts[c.index] += c.text
    assert texts == want and chunk.usage == got.usage


def test_without_a_seed_answers_differ(served):
    one, two = (
        served.client().completions.create(model="base", prompt="x", max_tokens=12, temperature=2).choices[0].text
        for _ in range(2)
    )
    assert one != two


def test_ids_echo_and_empty_prompts(served, reference):
    want = generate(reference, tokenizer(), [[72, 101], ""], None, GenerateSettings(max_new_tokens=5))
    create = served.client().completions.create
    got = create(model="base", prompt=[[72, 101]], max_tokens=5, temperature=0)
    assert got.choices[0].text == want[0].text
    got = create(model="base", prompt="", max_tokens=5, temperature=0, echo=True)
    assert got.choices[0].text == want[1].text
    echo = create(model="base", prompt=[72, 101], max_tokens=5, temperature=0, echo=True)
    assert echo.choices[0].text == tokenizer().decode([72, 101]) + want[0].text
    parts = create(model="base", prompt=[72, 101], max_tokens=5, temperature=0, echo=True, stream=True)
    assert "".join(p.choices[0].text for p in parts) == echo.choices[0].text


@pytest.mark.parametrize("name", ["lora", "prefix", "base"])
def test_logprobs_are_the_models(served, reference, name):
    tok = tokenizer()
    got = served.client().completions.create(
        model=name, prompt="Why?", max_tokens=8, temperature=0.7, seed=1, logprobs=3
    )
    settings = GenerateSettings(max_new_tokens=8, temperature=0.7, seed=1)
    told, ids = got.choices[0].logprobs, generate(reference, tok, ["Why?"], name if name != "base" else None, settings)
    prompt, said = tok("Why?")["input_ids"], ids[0].tokens
    with torch.no_grad(), reference.using(None if name == "base" else name):
        logp = reference.model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
    for t, token in enumerate(said):
        own = logp[len(prompt) - 1 + t]
        assert told.token_logprobs[t] == pytest.approx(own[token].item(), abs=1e-4)
        assert sorted(told.top_logprobs[t].values()) == pytest.approx(own.topk(3).values.tolist()[::-1], abs=1e-4)
    assert told.text_offset == [sum(map(len, told.tokens[:i])) for i in range(len(said))]

    chat = {"model": name, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6, "temperature": 0}
    whole = served.client().chat.completions.create(**chat, logprobs=True, top_logprobs=2)
    parts = list(served.client().chat.completions.create(**chat, logprobs=True, top_logprobs=2, stream=True))
    streamed = [c for p in parts if p.choices[0].logprobs for c in p.choices[0].logprobs.content]
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens
    assert all(len(c.top_logprobs) == 2 and c.logprob == c.top_logprobs[0].logprob for c in streamed)


def test_chat_without_a_template_is_the_protocols_prompt(served, reference):
    from inlay.tasks import Record, protocols

    record = Record(instruction="Be brief.\n\n2 + 3?", input="", output="", answer="")
    prompt = protocols.get("clean").eval.prompt(record)
    want = generate(reference, tokenizer(), [prompt], "series", GenerateSettings(max_new_tokens=8))[0].text
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
    ]
    asked = {"model": "series", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    got = served.client().chat.completions.create(**asked)
    assert got.choices[0].message.content == want and got.choices[0].message.role == "assistant"
    parts = list(served.client().chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts) == want
    assert len({p.id for p in parts}) == 1


def test_models_are_listed_and_composed(served, reference, root):
    listed = [m.id for m in served.client().models.list()]
    assert listed == ["base", "lora", "prefix", "prompt", "series"]
    assert served.client().models.retrieve("lora").id == "lora"
    want = generate(reference, tokenizer(), ["Tom"], "lora+prefix", GenerateSettings(max_new_tokens=9))[0].text
    got = served.client().completions.create(model="lora+prefix", prompt="Tom", max_tokens=9, temperature=0)
    assert got.choices[0].text == want
    text = "sum(0.6*lora, 0.4*series)"
    own = tiny_server.host(root)
    want = generate(compose(own, "mix", text), tokenizer(), ["Tom"], "mix", GenerateSettings(max_new_tokens=9))[0].text
    for written in (text, text.replace(" ", "")):
        got = served.client().completions.create(model=written, prompt="Tom", max_tokens=9, temperature=0)
        assert got.choices[0].text == want
