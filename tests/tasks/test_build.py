"""Public rows become the published records, byte for byte; checked against the real files where they are at hand."""

import re
from pathlib import Path

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import COMMONSENSE, Record, get, load
from inlay.tasks.loading import read_rows

CHOICES = {"text": ["gram", "liter", "mile"], "label": ["A", "B", "C"]}
CASES = {
    "boolq": (
        {"question": "is ice wet", "passage": "-", "answer": False},
        "Please answer the following question with true or false, question: is ice wet?\n\nAnswer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "boil", "sol1": "a ", "sol2": "b", "label": 1},
        "Please choose the correct solution to the question: boil\n\nSolution1: a \n\nSolution2: b\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        "Please choose the correct answer to the question: C. Q?\n\nAnswer1: x Answer2: y Answer3: z\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {"activity_label": "Roof", "ctx": "A man. he", "endings": ["a", "b", "c", "d"], "label": "0"},
        "Please choose the correct ending to complete the given sentence: Roof: A man. he\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {"sentence": "S _.", "option1": "a", "option2": "b", "answer": "2"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: S _.\n\n"
        "Option1: a Option2: b Answer format: option1/option2",
        "option2",
    ),
    "arc-e": (
        {"question": "Unit?", "choices": CHOICES, "answerKey": "B"},
        "Please choose the correct answer to the question: Unit?\n\nAnswer1: gram Answer2: liter Answer3: mile\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
    "ARC-C": (
        {"question": "Unit?", "choices": {"text": ["g", "l"], "label": ["1", "2"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Unit?\n\nAnswer1: g Answer2: l\n\n"
        "Answer format: answer1/answer2",
        "answer2",
    ),
    "obqa": (
        {"question_stem": "Unit of", "choices": CHOICES, "answerKey": "A"},
        "Please choose the correct answer to the question: Unit of\n\nAnswer1: gram Answer2: liter Answer3: mile\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer1",
    ),
}


def built(name: str, row: dict) -> Record:
    form = next(f for f in get(name).formats if all(field in row for field in f.fields))
    record = form.build(row)
    assert record is not None
    return record


@pytest.mark.parametrize("name", CASES)
def test_commonsense_instructions(name: str) -> None:
    row, instruction, answer = CASES[name]
    assert built(name, row) == Record(instruction, "", f"the correct answer is {answer}", answer)


SHAPES = {
    "boolq": r"question: (?P<question>.*)\?\n\nA",
    "piqa": r"question: (?P<goal>.*)\n\nSolution1: (?P<sol1>.*)\n\nSolution2: (?P<sol2>.*)\n\nA",
    "social_i_qa": (
        r"question: (?P<context>\S+) (?P<question>.*)\n\nAnswer1: (?P<answerA>.*) Answer2: (?P<answerB>.*) "
        r"Answer3: (?P<answerC>.*)\n\nA"
    ),
    "winogrande": r"sentence: (?P<sentence>.*)\n\nOption1: (?P<option1>.*) Option2: (?P<option2>.*) A",
}


@pytest.mark.parametrize("name", [*SHAPES, "ARC-Easy", "ARC-Challenge", "openbookqa"])
def test_real_records_survive_a_round_trip_through_their_public_fields(data: Path, name: str) -> None:
    task = get(name)
    for record in load(name, source=data):
        index = task.options(record).index(record.answer)
        if name in SHAPES:
            found = re.search(SHAPES[name], record.instruction, re.DOTALL)
            assert found is not None
            row = {**found.groupdict(), "answer": record.answer == "true", "label": index}
            if name == "winogrande":
                row["answer"] = str(index + 1)
            if name == "social_i_qa":
                row["label"] = str(index + 1)
        else:
            found = re.search(r"the question: (.*?)\n\nAnswer1: ", record.instruction, re.DOTALL)
            assert found is not None
            texts = task.option_texts(record)
            keys = list("ABCDE")[: len(texts)]
            row = {"question": found[1], "choices": {"text": texts, "label": keys}, "answerKey": keys[index]}
            row["question_stem"] = found[1]
        assert built(name, row) == record


def test_aqua_spacing_of_brackets_as_published(data: Path) -> None:
    for record in load("aqua", source=data):
        question, _, options = record.instruction.partition(" Answer Choices:")
        unspaced = options.replace(" (", "(").replace(") ", ")")
        raw = re.split(r"\((?=[A-E]\))", unspaced)[1:]
        row = {"question": question, "options": raw, "rationale": "r", "correct": record.answer}
        assert len(raw) == 5 and built("aqua", row).instruction == record.instruction


def test_aqua_by_hand() -> None:
    row = {"question": "Cost? ", "options": ["A)D/(M-3)", "B)3"], "rationale": "So.", "correct": "B"}
    record = built("aqua", row)
    assert record.instruction == "Cost? Answer Choices: (A) D/ (M-3)  (B) 3"
    assert (record.output, record.answer) == ("So.\nThe answer is (B).", "B")


def test_arithmetic_forms() -> None:
    gsm = built("gsm8k", {"question": "Q", "answer": "He has 3*4=<<3*4=12>>12.\n#### 1,200"})
    assert gsm == Record("Q", "", "He has 3*4=12.\nThe answer is 1200", "1200.0")
    svamp = built("svamp", {"Body": "B. ", "Question": "Q?", "Answer": 5.0, "Equation": "( 8.0 - 3.0 )"})
    assert svamp == Record("B. Q?", "", "8 - 3 = 5. The answer is 5", "5.0")
    raw = {"sQuestion": " Sam bought ", "lEquations": ["X=(13.0+17.0)"], "lSolutions": [30.0]}
    assert built("multiarith", raw) == Record(" Sam bought ", "", "13 + 17 = 30. The answer is 30", "30.0")
    assert built("multiarith", {"question": "Q", "final_ans": "4"}) == Record("Q", "", "The answer is 4", "4.0")
    row = {"Problem": "p", "options": "a ) 38 , b ) cab , e ) none", "Rationale": "r", "correct": "b"}
    mathqa = built("mathqa", row)
    assert mathqa == Record("p The options: A ) 38 , B ) cab , E ) none", "", "r\nThe answer is (B).", "B")


def test_a_label_outside_the_options_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}\n')
    with pytest.raises(InlayError, match="record 0: not a piqa row: .*label 0 of 2 options"):
        load("piqa", source=path)


@pytest.mark.parametrize("name", [*(n for n in COMMONSENSE if n != "hellaswag"), "AQuA", "MathQA"])
def test_options_of_every_real_record(data: Path, name: str) -> None:
    task = get(name)
    for record in load(name, source=data):
        options, texts = task.options(record), task.option_texts(record)
        assert record.answer in options and len(texts) == len(options) and all(texts)


def test_options_by_hand() -> None:
    record = built("winogrande", CASES["winogrande"][0])
    assert get("winogrande").options(record) == ["option1", "option2"]
    assert get("winogrande").option_texts(record) == ["a", "b"]
    assert get("boolq").option_texts(built("boolq", CASES["boolq"][0])) == ["true", "false"]
    assert get("gsm8k").options(Record("2 + 2")) == []
    with pytest.raises(InlayError, match="no 'Option1:' in the instruction 'odd'"):
        get("winogrande").option_texts(Record("odd"))


def test_published_files_are_untouched_by_reading(data: Path) -> None:
    rows = [row for _, row in read_rows(data / "MultiArith" / "test.json")]
    assert [vars(r) for r in load("multiarith", source=data)] == rows
