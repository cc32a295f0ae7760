"""Words come out while they are made, never to be taken back; conversations become prompts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inlay.evaluate.rows import Row, Scored, finish
from inlay.serve.errors import Refused
from inlay.serve.text import TORN, Spoken, Texts
from inlay.serve.wire import Message
from inlay.tasks import Record
from inlay.tasks.templates import ALPACA
from tests.evaluate.tiny import EOS, tokenizer

TOK = tokenizer()
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def spoken(tokens, stop):
    """(pieces given out, the result) as a server makes them: until the end token or a stop text."""
    from inlay.evaluate import GenerateSettings

    row, voice, pieces = Row(0, [1], (), 0, len(tokens), GenerateSettings(stop=stop)), Spoken(TOK, stop), []
    for token in tokens:
        row.take(token, [EOS], TOK)
        if row.done:
            break
        pieces.append(voice.add(token))
    result = finish(row.tokens, TOK, [EOS], stop)
    return [*pieces, voice.end(result.text)], result


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="ab\n é🌍ß", min_size=1, max_size=30),
    st.lists(st.text(alphabet="ab\n é🌍", min_size=1, max_size=4), max_size=3),
)
def test_pieces_make_the_result_and_are_never_torn(text, stop):
    tokens = TOK(text)["input_ids"]
    pieces, result = spoken(tokens, tuple(stop))
    assert "".join(pieces) == result.text
    assert TORN not in "".join(pieces)
    assert all(s not in result.text for s in stop)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.integers(0, EOS), min_size=1, max_size=40))
def test_any_tokens_make_the_result(tokens):
    pieces, result = spoken(tokens, ())
    assert "".join(pieces) == result.text


def test_what_may_begin_a_stop_text_waits():
    voice = Spoken(TOK, ("\n\nQ:",))
    said = [voice.add(t) for t in TOK("one\n\nQ: ")["input_ids"][:-2]]  # up to the Q
    assert said == ["o", "n", "e", "", "", ""]
    assert voice.add(TOK("x")["input_ids"][0]) == "\n\nQx"


def test_a_chat_template_is_used_and_its_refusal_told():
    texts = Texts(tokenizer(chat_template=TEMPLATE), 259)
    turns = [Message(role="system", content="S"), Message(role="user", content="hi")]
    assert TOK.decode(texts.chat_ids(turns)) == "<system>S<user>hi<assistant>"
    with pytest.raises(Refused, match="system first"):
        texts.chat_ids(turns[::-1])
    assert TOK.decode(Texts(TOK, 259, "none").chat_ids(turns)) == "S\nhi"
    assert TOK.decode(Texts(TOK, 259).chat_ids(turns)) == ALPACA.prompt(Record("S\n\nhi"))


def test_tokens_are_shown_as_they_stand_in_a_text():
    texts = Texts(TOK, 259)
    space, a = TOK(" ")["input_ids"][0], TOK("a")["input_ids"][0]
    said = texts.scored(space, Scored(-0.5, [(space, -0.5), (a, -1.5)]))
    assert (said.token, said.logp, said.likeliest) == (" ", -0.5, [(" ", -0.5), ("a", -1.5)])
