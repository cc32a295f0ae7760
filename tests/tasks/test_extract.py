"""Extraction: the published rules with every trap they have, and what the clean rules make of the same texts."""

from random import Random

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import CLEAN, PUBLISHED, Record
from inlay.tasks.extract import clean_response, normalise, published_response, statements

CHOICES = tuple(f"answer{i}" for i in range(1, 6))
ABCDE = tuple("ABCDE")


def both(text: str, kind, answers=()) -> tuple[str | None, str | None]:
    return PUBLISHED.extract(text, kind, answers), CLEAN.extract(text, kind, answers)


@pytest.mark.parametrize(
    ("text", "published", "clean"),
    [
        # faults of the published letter rule: words supply the letter
        ("First, we add. The answer is option C) 26.", "C", "C"),
        ("Divide 1000 by 4. The answer is (B).", "D", "B"),
        ("Because x = 3, the answer is (A).", "B", "A"),
        ("Converting 5 km ... The answer is E) 6km.", "C", "E"),
        ("Each pays 5. Answer: E.", "E", "E"),
        ("Divide both. The depth is 40 meters.</s>", "D", None),
        ("Answer: C (4)", "A", "C"),
        ("A dog costs 5. The answer is 12.", "A", None),
        ("The answer is A dog.", "A", None),
        ("so it is (C)", "C", "C"),
        ("(A) is 3, (B) is 4, so none", "A", None),
        ("The answer is (A) or (B).", "A", None),
        ("The answer is (C), not (B).", "C", "C"),
        ("The answer is not (A); the answer is (D)", "A", "D"),
        ("C", "C", "C"),
        ("C) 26", "C", "C"),
        ("A) 36\nB) 15\nC) 17", "A", None),
        ("P(A) = 0.5", "A", None),
        ("\\boxed{D}", "D", "D"),
        ("#### E", "E", "E"),
        ("the answer is (c)", None, "C"),
        ("no letter", None, None),
    ],
)
def test_letters(text: str, published: str | None, clean: str | None) -> None:
    assert both(text, "letter", ABCDE) == (published, clean)


@pytest.mark.parametrize(
    ("text", "published", "clean"),
    [
        # faults of the last-number rule: binary minus, fractions, a model that runs on
        ("so 5-3", "-3.0", "3.0"),
        ("The answer is 1/2", "2.0", "0.5"),
        ("The answer is 3. That is 3 of 12 cakes.", "12.0", "3.0"),
        ("There are 33 songs on her mp3 player.", "3.0", "33.0"),
        ("Answer: Frank can buy 5 8-dollar toys.", "8.0", "5.0"),
        ("The answer is 4.\n\n### Instruction:\nWhat is 2 + 7?", "7.0", "4.0"),
        ("The answer is 42</s></s> 7", "7.0", "42.0"),
        ("The total is $1,000.50.", "1000.5", "1000.5"),
        ("= $1,234", "1234.0", "1234.0"),
        ("It rose by 25%.", "25.0", "25.0"),
        ("1.5e3", "3.0", "1500.0"),
        ("the answer is -7", "-7.0", "-7.0"),
        ("the answer is \u22127", "7.0", "-7.0"),
        ("#### 1,319", "1319.0", "1319.0"),
        ("\\boxed{\\frac{3}{4}}", "4.0", "0.75"),
        ("The answer is 4 * 6 = 24 apples", "24.0", "24.0"),
        ("The answer is:\n\n42", "42.0", "42.0"),
        ("The answer in Arabic numerals is 24.", "24.0", "24.0"),
        ("Write the answer in Arabic numerals:\n\n1. Add 3 and 4: 7\n2. Done", "2.0", "7.0"),
        ("7 of them left.\n4. Step by", "4.0", "7.0"),
        ("3.", "3.0", "3.0"),
        ("none", None, None),
        ("", None, None),
    ],
)
def test_numbers(text: str, published: str | None, clean: str | None) -> None:
    assert both(text, "number") == (published, clean)


@pytest.mark.parametrize(
    ("text", "published", "clean"),
    [
        ("the correct answer is answer3", "answer3", "answer3"),
        ("answer1 is wrong; the correct answer is answer2", "answer1", "answer2"),
        ("Response: answer1/answer2/answer3/answer4", "answer1", None),
        ("the correct answer is answer12", "answer1", None),
        ("Answer4", None, "answer4"),
        ("the correct answer is answer 4", None, "answer4"),
        ("the correct answer is 4", None, None),
        ("answer2 answer2", "answer2", "answer2"),
        ("not answer1 but answer2", "answer1", None),
        ("not answer1, it is answer2", "answer1", "answer2"),
    ],
)
def test_choices(text: str, published: str | None, clean: str | None) -> None:
    assert both(text, "choice", CHOICES) == (published, clean)


def test_the_published_pattern_looks_for_five_answers_where_a_task_has_three() -> None:
    assert both("answer5", "choice", CHOICES[:3]) == ("answer5", None)


@pytest.mark.parametrize(
    ("text", "published", "clean"),
    [
        ("the correct answer is true", "true", "true"),
        ("untrue", "true", None),
        ("True", None, "true"),
        ("It is false that this is true", "false", None),
        ("The statement is not true.", "true", None),
    ],
)
def test_truth(text: str, published: str | None, clean: str | None) -> None:
    assert both(text, "choice", ("true", "false")) == (published, clean)


def test_free_text() -> None:
    assert CLEAN.extract("The capital is Paris. The answer is the Paris!", "text") == "paris"
    assert CLEAN.extract("\n Paris.\nIt lies in France", "text") == "paris"
    assert CLEAN.extract(" \n ", "text") is None
    assert normalise(" The  Z\u00fcrich-Lake, ") == normalise("Z\u00dcRICH LAKE")
    with pytest.raises(InlayError, match="no extraction rule for 'text'"):
        PUBLISHED.extract("Paris", "text")


def test_published_response_is_the_one_that_the_authors_scripts_read() -> None:
    """`evaluate.py` and `commonsense_evaluate.py` take piece 1 of prompt + generation, split at the marker."""
    pieces = ("7", " B", "### Response:", "\n", "### Instruction:", "the answer is 3", "</s>", " ")
    prompt = PUBLISHED.eval.prompt(Record(instruction="q", input="", output="", answer=""))
    random = Random(0)
    texts = ["".join(random.choices(pieces, k=random.randint(0, 6))) for _ in range(500)]
    texts = [t for t in texts if not t.lstrip().startswith("### Instruction:")]  # would be read as a prompt
    assert sum("### Response:" in t for t in texts) > 100
    for generated in texts:
        authors = (prompt + generated).split("### Response:")[1].strip()
        assert published_response(generated) == authors, generated
        assert published_response(prompt + generated) == authors, generated


def test_clean_response_drops_prompt_marks_and_invented_turns() -> None:
    prompt = "### Instruction:\nQ 7\n\n### Response:\n"
    assert clean_response(prompt + "5</s><pad>9") == "5"
    assert clean_response("<s> " + prompt + "5") == "5"
    assert clean_response("5\n### Instruction:\nQ\n\n### Response:\n6") == "5"
    assert clean_response("5\nQuestion: and 6?") == "5"
    assert clean_response("5<|eot_id|>6") == "5"


def test_statements_in_order_and_cut_at_their_sentence() -> None:
    text = "The answer is 3. Then \\boxed{4 {x}}\nFinal answer: 5, rather than 6\n#### 7"
    assert statements(text) == ["3", "4 {x}", "5,", "7"]
