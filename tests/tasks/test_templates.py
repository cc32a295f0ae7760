"""The published prompts, byte by byte, and the promises of the clean one."""

from inlay.tasks.task import Record
from inlay.tasks.templates import ALPACA, PUBLISHED_DEMO, PUBLISHED_EVAL, PUBLISHED_TRAIN

BARE = Record("Q1\nQ2", "", "A", "A")
PAIRED = Record("Q", "I", "A", "A")
B = "·" * 16
"""Sixteen blanks, made visible; `·` stands for a blank in every expectation below."""
TASK = "Below is an instruction that describes a task"
WRITE = "Write a response that appropriately completes the request."
PAIR = f"{TASK}, paired with an input that provides further context. {WRITE}"


def seen(text: str) -> str:
    return text.replace("·", " ")


def test_published_train() -> None:
    prompt, answer = PUBLISHED_TRAIN.render(BARE)
    wanted = f"{TASK}. {WRITE}··\n\n{B}### Instruction:\n{B}Q1\nQ2\n{B}\n{B}### Response:\n{B}A"
    assert prompt + answer == seen(wanted)
    prompt, answer = PUBLISHED_TRAIN.render(PAIRED)
    wanted = f"{PAIR}·\n\n{B}### Instruction:\n{B}Q\n{B}\n{B}### Input:\n{B}I\n{B}\n{B}### Response:\n{B}A"
    assert prompt + answer == seen(wanted)


def test_published_eval() -> None:
    wanted = f"{TASK}. {WRITE}·\n\n{B}### Instruction:\n{B}Q1\nQ2\n\n{B}### Response:\n{B}"
    assert PUBLISHED_EVAL.prompt(BARE) == seen(wanted)
    wanted = f"{PAIR}\n\n{B}### Instruction:\n{B}Q\n\n{B}### Input:\n{B}I\n\n{B}### Response:\n{B}"
    assert PUBLISHED_EVAL.prompt(PAIRED) == seen(wanted)


def test_published_demo() -> None:
    assert PUBLISHED_DEMO.prompt(BARE) == seen(f"{TASK}. {WRITE}··\n\n### Instruction:\nQ1\nQ2\n\n### Response:\n")
    assert PUBLISHED_DEMO.prompt(PAIRED) == seen(f"{PAIR}·\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n")


def test_the_three_published_prompts_differ() -> None:
    assert len({t.prompt(BARE) for t in (PUBLISHED_TRAIN, PUBLISHED_EVAL, PUBLISHED_DEMO)}) == 3


def test_clean_keeps_lines_and_leaves_no_blank_before_the_answer() -> None:
    assert ALPACA.prompt(BARE) == "### Instruction:\nQ1\nQ2\n\n### Response:\n"
    assert ALPACA.prompt(PAIRED) == "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\n"
    assert not any(line != line.rstrip(" ") for line in ALPACA.prompt(PAIRED).split("\n"))


def test_braces_in_a_record_are_text() -> None:
    odd = Record("{instruction} {x} {input}", "{input} {", "{A}")
    prompt, answer = ALPACA.render(odd)
    assert "\n{instruction} {x} {input}\n" in prompt and "\n{input} {\n" in prompt and answer == "{A}"
