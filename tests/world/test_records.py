"""Records of the synthetic world: schema, determinism, exact answers, and train and test that never meet."""

from __future__ import annotations

import re
from decimal import Decimal

import pytest

from inlay.core.errors import InlayError
from inlay.tasks.world import NAMES, records
from inlay.tasks.world.split import normalise

ARITHMETIC = [n for n in NAMES if n.split("-")[1] in ("addsub", "multiarith", "singleeq", "svamp", "gsm8k", "arith")]
CHOICES = ["world-boolq", "world-choice", "world-piqa", "world-winogrande"]
EQUATION = re.compile(r"([\d.]+) ([-+*/]) ([\d.]+) = ([\d.]*\d)")


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_determinism(name: str) -> None:
    """All values are strings with the four published keys; the same arguments give the same records."""
    first = records(name, "train", 60, seed=3)
    assert first == records(name, "train", 60, seed=3)
    assert first != records(name, "train", 60, seed=4)
    for record in first:
        assert list(record) == ["instruction", "input", "output", "answer"]
        assert all(isinstance(v, str) for v in record.values())
        assert record["input"] == "" and record["instruction"].strip() and record["answer"]
        assert record["answer"] in record["output"]
        assert not re.search(r"[{}\[\]|]", record["instruction"])


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_never_share(name: str) -> None:
    """No normalised instruction of any test sample occurs in any train sample, across seeds."""
    train = {normalise(r["instruction"]) for s in (0, 1) for r in records(name, "train", seed=s)}
    test = {normalise(r["instruction"]) for s in (0, 5) for r in records(name, "test", seed=s)}
    assert train and test and not train & test


@pytest.mark.parametrize("name", ARITHMETIC)
def test_equations_are_true_and_end_in_the_answer(name: str) -> None:
    """Every written equation holds exactly; the last one and the closing phrase give the answer."""
    for record in records(name, "train", 300) + records(name, "test", 100):
        found = EQUATION.findall(record["output"])
        assert found
        for a, op, b, c in found:
            x, y = Decimal(a), Decimal(b)
            assert {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op] == Decimal(c)
            assert Decimal(c) > 0
        assert record["output"].endswith(f"The answer is {record['answer']}")
        assert Decimal(found[-1][3]) == Decimal(record["answer"])


@pytest.mark.parametrize("name", ARITHMETIC)
def test_problems_state_their_numbers(name: str) -> None:
    """The operands of the first equation appear in the problem (2 may be said as twice, double or half)."""
    for record in records(name, "train", 200):
        numbers = {Decimal(n) for n in re.findall(r"\d+(?:\.\d+)?", record["instruction"])} | {Decimal(2)}
        a, _, b, _ = EQUATION.findall(record["output"])[0]
        assert Decimal(a) in numbers and Decimal(b) in numbers, record


@pytest.mark.parametrize("name", CHOICES)
def test_choices_name_an_offered_answer(name: str) -> None:
    """The answer is one of the answer format, the options differ, and every label occurs."""
    rows = records(name, "train", 400)
    for record in rows:
        labels = record["instruction"].rsplit("Answer format: ", 1)[1].split("/")
        assert record["answer"] in labels and record["output"] == f"the correct answer is {record['answer']}"
        if name != "world-boolq":
            options = re.findall(r"(?:Answer|Solution|Option)\d: (.+?)(?=\s+(?:Answer|Option|Solution)|$)",
                                 record["instruction"])  # fmt: skip
            assert len(set(options)) == len(labels)
    counts = {label: sum(r["answer"] == label for r in rows) for label in {r["answer"] for r in rows}}
    pair = name != "world-choice"
    assert all(n > (150 if pair else 6) for n in counts.values())


def test_user_errors_name_what_exists() -> None:
    """Wrong names, splits and sizes are user errors that say what exists."""
    with pytest.raises(InlayError, match="world-addsub"):
        records("world-nothing")
    with pytest.raises(InlayError, match="train and test"):
        records("world-addsub", "valid")
    with pytest.raises(InlayError, match="n = 0"):
        records("world-addsub", n=0)
    with pytest.raises(InlayError, match="ask fewer"):
        records("world-facts", "test", n=100_000)
