"""A server and a playground ask each adapter by its own template; what is chosen takes the place of all."""

from __future__ import annotations

import asyncio
import logging

import openai
import pytest

import inlay
from inlay.evaluate import GenerateSettings, generate
from inlay.library.bank import Bank
from inlay.serve.batcher import Batcher
from inlay.serve.playground import Playground, Question
from inlay.serve.text import Texts
from inlay.tasks import Record, choose
from inlay.tasks.templates import ALPACA, NONE
from tests.evaluate import tiny
from tests.serve import tiny_server
from tests.tasks.chats import BRACKETS, chatty

TEMPLATES = {"alpaca": {"name": "alpaca"}, "none": {"name": "none"}, "unknown": None}
TOK = chatty(BRACKETS)
OWN = {"base": choose(None, TOK), "alpaca": ALPACA, "none": NONE, "unknown": choose(None, TOK)}
GREEDY = GenerateSettings(max_new_tokens=8)


def base():
    return inlay.attach(tiny.base("llama", 256, vocabulary=261))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same adapter three times; what differs is the template that it records."""
    root, host = tmp_path_factory.mktemp("own"), base()
    host.add("lora", inlay.method("lora").make(rank=4), seed=0)
    for p in host.parameters("lora"):
        p.data.add_(0.1)
    for name, template in TEMPLATES.items():
        inlay.save(host, "lora", root / "adapters" / name, template=template)
    return root


@pytest.fixture(scope="module")
def want(folders):
    """Model -> its answer to `Hi` in each template."""
    host = base()
    for name in TEMPLATES:
        inlay.load(host, folders / "adapters" / name, name)

    def text(model, template):
        ids = template.prompt_ids(Record("Hi"), TOK)
        return generate(host, TOK, [ids], None if model == "base" else model, GREEDY)[0].text

    return text


def chat(served, model, *messages):
    turns = messages or ({"role": "user", "content": "Hi"},)
    asked = {"model": model, "messages": list(turns), "max_tokens": 8, "temperature": 0}
    return served.client().chat.completions.create(**asked).choices[0].message.content


def test_each_adapter_is_asked_by_its_own(folders, want, caplog):
    with caplog.at_level(logging.INFO, "inlay"), tiny_server.inside(folders, (base(), TOK)) as served:
        for model, template in OWN.items():
            assert chat(served, model) == want(model, template)
        chat(served, "unknown")
        assert chat(served, "alpaca+none") and chat(served, "sum(0.5*none, 0.5*none)")
        said = served.client().completions.create(model="alpaca", prompt="Hi", max_tokens=8, temperature=0)
        assert said.choices[0].text == want("alpaca", NONE)
        with pytest.raises(openai.BadRequestError, match="refuses a conversation of system: roles must alternate"):
            chat(served, "base", {"role": "system", "content": "x"})
    told = [r.getMessage() for r in caplog.records if "template" in r.getMessage()]
    assert told[0].startswith("conversations become prompts by the tokenizer's chat template; adapters by")
    assert sum("unknown does not record the template" in t for t in told) == 1
    assert sum("alpaca+none were trained with different templates" in t for t in told) == 1
    assert not any("sum(" in t for t in told)


def test_a_refused_conversation_lets_go_of_its_adapter(folders):
    with tiny_server.inside(folders, (base(), TOK)) as served:
        with pytest.raises(openai.BadRequestError):
            chat(served, "unknown", {"role": "system", "content": "x"})
        listed = served.http("GET", "/admin/adapters", headers=tiny_server.ADMIN).json()["adapters"]
        assert [a["requests"] for a in listed if a["name"] == "unknown"] == [0]


def test_a_chosen_template_takes_the_place_of_all(folders, want, caplog):
    with (
        caplog.at_level(logging.WARNING, "inlay"),
        tiny_server.inside(folders, (base(), TOK), template="alpaca") as served,
    ):
        for model in OWN:
            assert chat(served, model) == want(model, ALPACA)
    told = [r.getMessage() for r in caplog.records if "trained with" in r.getMessage()]
    assert told == ["none was trained with no template; it is asked by the template alpaca"]


def test_the_playground_asks_each_column_by_its_own(folders, want):
    host = base()
    adapters = Bank(host, [folders / "adapters"])
    batcher = Batcher(host, TOK, adapters, rows=8).start()
    playground = Playground(batcher, adapters, Texts(TOK, 261))

    async def last(q):
        return [now async for now in playground.ask(q)][-1]

    try:
        shown = asyncio.run(last(Question(prompt="Hi", names=tuple(OWN), max_new_tokens=8)))
    finally:
        batcher.stop(10)
    assert {c.name: c.text for c in shown.columns} == {model: want(model, t) for model, t in OWN.items()}
