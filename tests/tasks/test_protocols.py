"""Encoding under both protocols: what is learned, what is cut, and that training and evaluation share their tokens."""

import dataclasses

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import CLEAN, PUBLISHED, Record, encode, encode_all, encode_answer, encode_prompt, protocols
from inlay.tasks.templates import PUBLISHED_TRAIN

RECORD = Record("Is water wet?\n\nAnswer format: true/false", "", "the correct answer is true", "true")
LONG = dataclasses.replace(RECORD, instruction="start " + "water " * 300 + "end?")


def test_published_is_the_whole_text_with_everything_learned(tokenizer) -> None:
    row = encode(RECORD, tokenizer, PUBLISHED, 1000)
    text = "".join(PUBLISHED_TRAIN.render(RECORD))
    assert row.input_ids == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert row.labels == row.input_ids and not row.truncated


def test_published_cuts_right_and_adds_eos_only_where_there_is_room(tokenizer) -> None:
    full = tokenizer("".join(PUBLISHED_TRAIN.render(RECORD)))["input_ids"]
    n = len(full)
    cut = encode(RECORD, tokenizer, PUBLISHED, n - 3)
    assert cut.input_ids == full[: n - 3] and cut.truncated
    exact = encode(RECORD, tokenizer, PUBLISHED, n)
    assert exact.input_ids == full and not exact.truncated
    room = encode(RECORD, tokenizer, PUBLISHED, n + 1)
    assert room.input_ids == [*full, tokenizer.eos_token_id] and not room.truncated


def test_published_does_not_double_an_eos(tokenizer) -> None:
    ended = dataclasses.replace(RECORD, output=RECORD.output + "</s>")
    row = encode(ended, tokenizer, PUBLISHED, 1000)
    assert row.input_ids.count(tokenizer.eos_token_id) == 1


def test_published_cut_ignores_the_tokenizers_own_side(tokenizer) -> None:
    wanted = encode(RECORD, tokenizer, PUBLISHED, 40)
    tokenizer.truncation_side = "left"
    try:
        assert encode(RECORD, tokenizer, PUBLISHED, 40) == wanted
        assert tokenizer.truncation_side == "left"
    finally:
        tokenizer.truncation_side = "right"


def test_published_with_answer_loss_masks_the_rendered_prompt(tokenizer) -> None:
    row = encode(RECORD, tokenizer, dataclasses.replace(PUBLISHED, loss_on="answer"), 1000)
    masked = len(tokenizer(PUBLISHED_TRAIN.prompt(RECORD))["input_ids"])
    assert row.labels[:masked] == [-100] * masked and row.labels[masked:] == row.input_ids[masked:]


def test_clean_learns_answer_and_eos_only(tokenizer) -> None:
    row = encode(RECORD, tokenizer, CLEAN, 1000)
    learned = [i for i, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert tokenizer.decode(learned) == "the correct answer is true</s>"
    assert row.labels[len(row.labels) - len(learned) :] == learned


def test_clean_prompt_tokens_are_those_of_evaluation(tokenizer) -> None:
    prompt = encode_prompt(RECORD, tokenizer, CLEAN)
    tail = [*encode_answer(RECORD.output, tokenizer), tokenizer.eos_token_id]
    assert encode(RECORD, tokenizer, CLEAN, 1000).input_ids == prompt.input_ids + tail
    assert set(prompt.labels) == {-100} and len(prompt.labels) == len(prompt.input_ids)


@pytest.mark.parametrize("cutoff", [40, 64, 100, 255])
def test_clean_cuts_the_prompts_middle_and_never_the_answer(tokenizer, cutoff: int) -> None:
    whole = encode(LONG, tokenizer, CLEAN, 10_000)
    row = encode(LONG, tokenizer, CLEAN, cutoff)
    answer = [label for label in whole.labels if label != -100]
    assert len(row.input_ids) == cutoff and row.truncated and not whole.truncated
    assert [label for label in row.labels if label != -100] == answer
    room = cutoff - len(answer)
    assert row.input_ids[: room // 4] == whole.input_ids[: room // 4]
    assert row.input_ids[room // 4 :] == whole.input_ids[room // 4 - cutoff :]


def test_clean_without_truncation_at_the_exact_length(tokenizer) -> None:
    whole = encode(RECORD, tokenizer, CLEAN, 10_000)
    assert encode(RECORD, tokenizer, CLEAN, len(whole.input_ids)) == whole
    assert encode(RECORD, tokenizer, CLEAN, len(whole.input_ids) - 1).truncated


def test_clean_refuses_an_answer_that_fills_the_cutoff(tokenizer) -> None:
    size = len(encode_answer(RECORD.output, tokenizer)) + 1
    with pytest.raises(InlayError, match=f"{size} tokens with its EOS, the cutoff is {size}"):
        encode(RECORD, tokenizer, CLEAN, size)
    assert len(encode(RECORD, tokenizer, CLEAN, size + 1).input_ids) == size + 1


def test_clean_refuses_an_empty_answer(tokenizer) -> None:
    with pytest.raises(InlayError, match="output .* is empty"):
        encode(dataclasses.replace(RECORD, output=" "), tokenizer, CLEAN, 100)


def test_clean_takes_off_an_eos_the_tokenizer_appends(tokenizer) -> None:
    def appending(text, **options):
        ids = tokenizer(text, **options)["input_ids"]
        return {"input_ids": [*ids, tokenizer.eos_token_id] if options.get("add_special_tokens", True) else ids}

    class Appending:
        eos_token_id = tokenizer.eos_token_id
        __call__ = staticmethod(appending)

    assert encode(RECORD, Appending(), CLEAN, 1000) == encode(RECORD, tokenizer, CLEAN, 1000)


def test_evaluation_prompts_over_the_cutoff(tokenizer) -> None:
    with pytest.raises(InlayError, match="never cuts"):
        encode_prompt(LONG, tokenizer, PUBLISHED, 64)
    row = encode_prompt(LONG, tokenizer, CLEAN, 64)
    assert len(row.input_ids) == 64 and row.truncated
    assert tokenizer.decode(row.input_ids).endswith("end?\n\n### Response:\n")


def test_truncations_are_counted(tokenizer) -> None:
    rows, cut = encode_all([RECORD, LONG, RECORD], tokenizer, CLEAN, 120)
    assert len(rows) == 3 and cut == 1 == sum(r.truncated for r in rows)


def test_settings_of_the_two_protocols() -> None:
    assert (PUBLISHED.beams, PUBLISHED.loss_on, PUBLISHED.train is PUBLISHED.eval) == (4, "all", False)
    assert (CLEAN.beams, CLEAN.loss_on, CLEAN.train is CLEAN.eval) == (1, "answer", True)
    assert protocols.get("Published") is PUBLISHED and protocols.get(CLEAN) is CLEAN
    with pytest.raises(InlayError, match="unknown protocol 'best'; there is: clean, published"):
        protocols.get("best")


def test_a_tokenizer_without_eos_is_refused() -> None:
    class Bare:
        eos_token_id = None

    with pytest.raises(InlayError, match="end-of-sequence"):
        encode(RECORD, Bare(), CLEAN, 10)
