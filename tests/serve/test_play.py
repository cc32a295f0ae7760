"""The playground: columns say what `generate` says, what goes wrong is told where it belongs, a browser shows it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate
from inlay.library.bank import Bank
from inlay.library.compose import compose
from inlay.serve import play_cards as cards
from inlay.serve.batcher import Batcher, Watch
from inlay.serve.playground import Answers, Column, Playground, Question
from inlay.serve.text import Texts
from tests.evaluate import tiny
from tests.serve import tiny_server

NAMES = ("base", "lora", "prefix", "series")
GREEDY = Question(prompt="Tom has", names=NAMES, max_new_tokens=12)
LONG = replace(GREEDY, max_new_tokens=110)


@contextlib.contextmanager
def playing(root, **settings):
    steps = []
    host, tokenizer = inlay.attach(tiny.base("llama")), tiny.tokenizer()
    adapters = Bank(host, [root / "adapters"])
    watch = Watch(step=lambda rows, seconds: steps.append(rows))
    batcher = Batcher(host, tokenizer, adapters, watch=watch, **{"rows": 8} | settings).start()
    made = Playground(batcher, adapters, Texts(tokenizer, 259, "plain"))
    made.steps = steps
    try:
        yield made
    finally:
        batcher.stop(10)


@pytest.fixture(scope="module")
def playground(root):
    with playing(root) as made:
        yield made


def ask(playground, q, then=None):
    """All that is shown, and `then` with each of them."""

    async def all_of_it():
        found = []
        async for now in playground.ask(q, "me"):
            found.append(now)
            if then is not None:
                then(now)
        return found

    return asyncio.run(all_of_it())


def idle(playground):
    """Nothing is on its way, nobody holds anything."""
    tiny_server.wait(lambda: not playground.batcher.jobs)
    playground.batcher.call(playground.adapters.sweep).result(5)
    held = [v for v in (*playground.adapters._loaded.values(), *playground.adapters._retired) if v.users]
    return not held and not playground._runs and not any("mix" in name for name in playground.adapters.host.edits)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 7}])
def test_columns_say_what_generate_says(playground, reference, sampled):
    q = replace(GREEDY, weights={"lora": 0.7, "series": -0.3}, **sampled)
    if "own" not in reference.edits:
        compose(reference, "own", "sum(0.7*lora, -0.3*series)")
    plan = [None, "lora", "prefix", "series", "own"]
    how = GenerateSettings(max_new_tokens=12, **sampled)
    want = [generate(reference, tiny.tokenizer(), ["Tom has"], name, how)[0] for name in plan]
    shown = ask(playground, q)
    last = shown[-1]
    assert [c.text for c in last.columns] == [g.text for g in want] and len({g.text for g in want}) == 5
    assert [c.ended for c in last.columns] == [g.finished for g in want] and last.done
    assert [c.tokens for c in last.columns] == [len(g.tokens) for g in want]
    assert [c.method for c in last.columns] == ["", *(reference.edits[n].kind for n in plan[1:])]
    assert last.seed == sampled.get("seed")
    for earlier, later in zip(shown, shown[1:], strict=False):
        assert all(b.text.startswith(a.text) for a, b in zip(earlier.columns, later.columns, strict=True))
    assert idle(playground)


def test_all_columns_share_every_step(playground):
    playground.steps.clear()
    last = ask(playground, replace(GREEDY, weights={"lora": 1.0}))[-1]
    assert len({c.tokens for c in last.columns}) == 1
    assert playground.steps[0] == 5 and set(playground.steps) == {5}


def test_a_weight_of_one_is_the_adapter_and_zeros_are_left_out(playground):
    last = ask(playground, replace(GREEDY, weights={"prefix": 0.0, "lora": 1.0}))[-1]
    assert last.columns[-1].text == last.columns[1].text != last.columns[0].text


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"prompt": " \n"}, "type a prompt"),
        ({"names": ()}, "choose the base or an adapter"),
        ({"temperature": 0.5, "top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"names": tuple(f"n{i}" for i in range(9))}, "at most 8"),
    ],
)
def test_what_nobody_can_answer_is_refused(playground, changed, says):
    with pytest.raises(InlayError, match=says):
        ask(playground, replace(GREEDY, **changed))
    assert idle(playground)


@pytest.mark.parametrize(
    "changed, failed, says",
    [
        ({"names": ("base", "nobody")}, "nobody", "unknown adapter 'nobody'; there is: lora, prefix"),
        ({"weights": {"nobody": 1.0}}, "mix", "unknown adapter 'nobody'"),
        ({"weights": {"lora": 0.0}}, "mix", "move a slider"),
        ({"weights": {"lora": float("nan")}}, "mix", "is nan"),
        ({"weights": {"lora": 0.5, "prefix": 0.5}}, "mix", "A slider at 0 leaves"),
        ({"prompt": "x" * 126}, "prefix", "shorten the prompt"),
    ],
)
def test_what_one_column_cannot_do_does_not_harm_the_others(playground, changed, failed, says):
    last = ask(playground, replace(GREEDY, **changed))[-1]
    by_name = {c.name: c for c in last.columns}
    assert by_name[failed].ended == "failed" and says in by_name[failed].error
    assert all(c.tokens and not c.error for name, c in by_name.items() if name != failed)
    assert idle(playground)


def test_a_prompt_too_long_for_all_is_told_in_each(playground):
    last = ask(playground, replace(GREEDY, prompt="x" * 500))[-1]
    assert last.done and all("500 tokens" in c.error for c in last.columns) and idle(playground)
    assert "nobody could answer" in cards.answers(last)


def test_a_broken_adapter_fails_alone(root, tmp_path):
    import shutil

    shutil.copytree(root / "adapters", tmp_path / "adapters")
    next((tmp_path / "adapters" / "series").glob("*.safetensors")).write_bytes(b"no tensors")
    with playing(tmp_path) as playground:
        last = ask(playground, replace(GREEDY, names=("lora", "series")))[-1]
        assert last.columns[0].tokens and not last.columns[0].error
        assert last.columns[1].ended == "failed" and last.columns[1].error


def test_stop_keeps_what_was_said_and_frees_the_batch(playground):
    shown = ask(playground, LONG, lambda now: now.columns[1].tokens and playground.stop("me"))
    assert {c.ended for c in shown[-1].columns} == {"stopped"} and 0 < shown[-1].columns[1].tokens < 110
    assert idle(playground)
    playground.stop("me")


def test_a_new_question_ends_the_sessions_earlier_one(playground):
    async def both():
        first = playground.ask(LONG, "me")
        await anext(first)
        other = [now async for now in playground.ask(GREEDY, "you")]
        again = [now async for now in playground.ask(GREEDY, "me")]
        return [now async for now in first][-1], again[-1], other[-1]

    first, again, other = asyncio.run(both())
    assert {c.ended for c in first.columns} <= {"stopped", "length"} and "stopped" in {c.ended for c in first.columns}
    assert [c.text for c in again.columns] == [c.text for c in other.columns] and idle(playground)


def test_who_leaves_frees_the_batch(playground):
    async def leave(after):
        asking = playground.ask(replace(LONG, weights={"lora": 0.5, "series": 0.5}), "me")
        task = asyncio.ensure_future(anext(asking))
        await asyncio.sleep(after)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asking.aclose()

    for after in (0, 0.002, 0.01):  # before, while and after adapters are made
        asyncio.run(leave(after))
        assert idle(playground)


def test_cards_escape_what_models_say():
    wild = Column("<b>", text="<script>alert(1)</script> & co", tokens=1, ended="length")
    html = cards.answers(Answers((wild, Column("x", error="no <i>", ended="failed")), 3))
    assert "<script>" not in html and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in html
    assert "<b>&lt;b&gt;</b>" in html and "no &lt;i&gt;" in html
    assert "cut at the limit" in html and "seed 3" in html and 'aria-busy="false"' in html
    assert "<p onload" not in cards.problem("<p onload=x>") and "<img" not in cards.head("<img>", 1)


def test_cards_say_how_far_they_are():
    open_ = cards.answers(Answers((Column("a"), Column("b", text="so", tokens=2, seconds=0.5, ended="eos"))))
    assert 'aria-busy="true"' in open_ and open_.count("caret") == 1
    assert "2 answers in one batch · 2 tokens in 0.5 s" in open_ and "seed" not in open_
    assert "says nothing" in cards.answers(Answers((Column("a", tokens=1, ended="eos"),)))


def test_a_sum_reads_as_one_writes_it():
    assert cards.weighted({"a": 0.7, "b-c": -0.25, "c": 0, "d": 1.0}) == "0.7 a - 0.25 b-c + 1 d"
    assert cards.weighted({"a": -1, "b": -2}) == "-1 a - 2 b"
