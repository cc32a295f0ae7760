"""Items on disk, and from items to tokens."""

from __future__ import annotations

import json

import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.items import Item, items_digest, read_items, write_items
from inlay.knowledge.wording import Wording, alike, answer_of, exact, examples
from tests.evaluate.tiny import tokenizer

ITEMS = [
    Item("1", "Where is X?", "Paris", ("Paris, France",), "place", "X", ("X is where?",), "val"),
    Item("2", "Who?", "Zo\u00eb"),
]


def test_what_is_written_is_read_back(tmp_path):
    write_items(tmp_path / "items.jsonl", ITEMS)
    assert read_items(tmp_path / "items.jsonl") == ITEMS
    assert read_items(tmp_path / "items.jsonl", "val") == ITEMS[:1]
    assert json.loads((tmp_path / "items.jsonl").read_text().splitlines()[1]) == {
        "id": "2",
        "prompt": "Who?",
        "target": "Zo\u00eb",
    }


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("[1]", "line 2: an item is an object"),
        ("{", "line 2: no JSON"),
        ('{"id": "a", "prompt": "p"}', "line 2: no field 'target'"),
        ('{"id": "a", "prompt": "p", "target": " "}', "line 2: field 'target' is empty"),
        ('{"id": 3, "prompt": "p", "target": "t"}', "line 2: field 'id' must be a text"),
        ('{"id": "a", "prompt": "p", "target": "t", "aliases": "u"}', "line 2: field 'aliases' must be a list"),
        ('{"id": "a", "prompt": "p", "target": "t", "answer": "u"}', "line 2: unknown field 'answer'"),
        ('{"id": "1", "prompt": "p", "target": "t"}', "line 2: id '1' is already that of line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, told):
    write_items(tmp_path / "i.jsonl", ITEMS[:1])
    with open(tmp_path / "i.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(InlayError, match="i.jsonl") as e:
        read_items(tmp_path / "i.jsonl")
    assert told in str(e.value)


def test_a_missing_file_and_a_missing_split_are_told(tmp_path):
    with pytest.raises(InlayError, match="no file of items"):
        read_items(tmp_path / "none.jsonl")
    write_items(tmp_path / "i.jsonl", ITEMS)
    with pytest.raises(InlayError, match="its splits are: train, val"):
        read_items(tmp_path / "i.jsonl", "test")


def test_a_digest_sees_every_field_and_the_order():
    changed = Item("2", "Who?", "Zo\u00eb", split="test")
    assert len({items_digest(x) for x in (ITEMS, ITEMS[::-1], [ITEMS[0], changed])}) == 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Paris.\nNext", "Paris"),  # check 5
        ("", ""),
        ("\n\n", ""),
        ("\n 'Paris'! \n", "Paris"),
        (" the U.S.", "the U.S."),
        ("St. Louis.", "St. Louis"),
        ("3.5", "3.5"),
    ],
)
def test_the_extractor(text, answer):
    assert answer_of(text) == answer


def test_exact_match_takes_aliases_and_leaves_case_and_articles_out():
    assert exact("the paris", ITEMS[0]) and exact("paris france", ITEMS[0])
    assert not exact("", ITEMS[0]) and not exact("Par", ITEMS[0])
    assert not alike("the", "!") or alike("the", "the")
    assert not alike("York New", "New York")


def test_training_rows_are_prompt_answer_and_end_of_which_the_prompt_is_not_learned():
    tok = tokenizer()
    (row,) = examples(ITEMS[:1], tok, Wording(template="Q: {prompt}\nA:"))
    prompt = tok("Q: Where is X?\nA:")["input_ids"]
    answer = tok(" Paris")["input_ids"]
    assert row.input_ids == [*prompt, *answer, tok.eos_token_id]
    assert row.labels == [-100] * len(prompt) + [*answer, tok.eos_token_id]


def test_a_template_must_hold_the_prompt():
    with pytest.raises(InlayError, match="must contain"):
        Wording(template="Q")
