"""SmolLM2-135M-Instruct in its own chat template and in Alpaca's: in its own it answers rightly and ends its turn."""

from __future__ import annotations

import pytest

pytest.importorskip("inlay.models.real")

from inlay.evaluate import GenerateSettings, generate
from inlay.tasks import CLEAN, Record, choose, encode, encode_prompt
from inlay.tasks.templates import ALPACA

CAPITALS = {"Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo"}


def right(host, tok, template) -> int:
    """Answers that name the capital and end within 12 tokens."""
    asked = [Record(f"Which city is the capital of {c}? Answer with the city alone.") for c in CAPITALS]
    ids = [encode_prompt(r, tok, CLEAN, None, template).input_ids for r in asked]
    said = generate(host, tok, ids, None, GenerateSettings(max_new_tokens=12))
    return sum(city in s.text and s.finished == "eos" for city, s in zip(CAPITALS.values(), said, strict=True))


def test_capitals_are_answered_better_in_its_own_form(host, loaded):
    own, alpaca = (right(host, loaded[1], t) for t in (choose(None, loaded[1]), ALPACA))
    assert own == 4 > alpaca


def test_training_rows_are_the_tokens_of_its_own_conversations(loaded):
    tok = loaded[1]
    record = Record("What is the capital of Spain?", "", "It is Madrid.")
    turns = [{"role": "user", "content": record.instruction}, {"role": "assistant", "content": record.output}]
    row = encode(record, tok, CLEAN, 256, choose(None, tok))
    whole = tok.apply_chat_template(turns, return_dict=False)
    assert row.input_ids == whole[: len(row.input_ids)] and tok.decode(whole[len(row.input_ids) :]) == "\n"
    assert tok.decode([i for i in row.labels if i >= 0]) == "It is Madrid.<|im_end|>"
