"""The leak report finds, in the real files, the overlaps that are known of them."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from inlay.core.errors import InlayError
from inlay.tasks import MATH, Record, load
from inlay.tasks.leaks import masked, normalise, read_questions, report


def test_math_data_holds_the_test_sets(data: Path) -> None:
    leaks = report(load("math_data", "train", data), {name: load(name, source=data) for name in MATH})
    found = {leak.name: (leak.exact, leak.exact_distinct, leak.distinct) for leak in leaks.sets}
    assert found == {
        "AddSub": (330, 330, 395),
        "MultiArith": (491, 471, 580),
        "SingleEq": (425, 424, 507),
        "gsm8k": (1055, 1055, 1319),
        "SVAMP": (800, 800, 1000),
        "AQuA": (203, 203, 254),
    }
    near = {leak.name: leak.near for leak in leaks.sets}
    assert near == {"AddSub": 8, "MultiArith": 52, "SingleEq": 7, "gsm8k": 0, "SVAMP": 0, "AQuA": 1}


def test_mawps_train_holds_most_of_three_test_sets(data: Path) -> None:
    """Known of train and validation together: 357, 502, 453 and (distinct) 34; train alone holds a little less."""
    questions = read_questions(data / "mawps" / "trainset.json")
    assert len(questions) == 1898
    names = ("AddSub", "MultiArith", "SingleEq", "MAWPS", "gsm8k", "SVAMP", "AQuA")
    leaks = report(questions, {name: load(name, source=data) for name in names})
    assert [leak.exact for leak in leaks.sets] == [327, 452, 416, 28, 0, 0, 0]
    assert [leak.exact_distinct for leak in leaks.sets[:4]] == [327, 432, 415, 27]
    assert [leak.near for leak in leaks.sets[:4]] == [2, 48, 24, 41]


@pytest.mark.parametrize(("name", "exact"), [("boolq", 1), ("ARC-Easy", 2), ("ARC-Challenge", 0), ("openbookqa", 0)])
def test_commonsense_sets_hardly_overlap(data: Path, name: str, exact: int) -> None:
    assert report(load(name, "train", data), load(name, source=data))["test"].exact == exact


def test_normalisation() -> None:
    assert normalise(" Tom\u2019s  Caf\u00c9 costs $1,000.50 ! ") == "tom s caf\u00e9 costs 1 000 50"
    assert normalise("doesn ' t") == normalise("doesn't")
    assert normalise("\ufb01ve \uff11\uff12") == "five 12"
    assert masked(normalise("Tom has 1,000.5 and 3 apples")) == "tom has # and # apples"


TRAIN = ["Tom has 3 apples. How many?", "Tom has 3 apples. How many?", "Ann swims in the big lake on Monday."]


def test_exact_near_and_contained() -> None:
    test = [
        "TOM has 3 apples -- how many",
        "Tom has 12 apples. How many?",
        "And so Ann swims in the big lake on Monday.",
        "Nothing of it",
        "Tom has 3 apples. How many?",
    ]
    leak = report(TRAIN, test, ngram=3, threshold=0.7)["test"]
    assert (leak.n, leak.distinct, leak.exact, leak.exact_distinct) == (5, 4, 2, 1)
    assert (leak.near, leak.contained) == (1, 1)
    assert [(m.test_index, m.train_index) for m in leak.exact_examples] == [(0, 0), (4, 0)]
    assert leak.near_examples[0].test == test[1] and leak.near_examples[0].train == TRAIN[0]
    assert report(TRAIN, test)["test"].contained is None
    assert report(TRAIN, test, examples=1)["test"].exact_examples == leak.exact_examples[:1]


def test_the_input_counts_as_part_of_the_question() -> None:
    train, other = [Record("Sum up", "text one")], [Record("Sum up", "text two")]
    assert report(train, other)["test"].exact == 0
    assert report(train, [Record("sum up.", "Text one!")])["test"].exact == 1


def test_json_and_table() -> None:
    leaks = report(TRAIN, {"mine": TRAIN})
    out = json.loads(json.dumps(leaks.to_json()))
    assert out["train_n"] == 3 and out["train_distinct"] == 2 and out["sets"][0]["exact"] == 3
    screen = io.StringIO()
    Console(file=screen, width=120).print(leaks.table())
    assert "mine" in screen.getvalue() and "2 of 2" in screen.getvalue()
    with pytest.raises(InlayError, match="no test set 'x' in this report; it has mine"):
        leaks["x"]


def test_what_makes_no_report(tmp_path: Path) -> None:
    for train, test, options, message in [
        ([], ["a"], {}, "no training records"),
        (["a"], {"t": []}, {}, "test set 't' is empty"),
        (["a"], ["a"], {"ngram": 0}, "ngram 0"),
        (["a"], ["a"], {"threshold": 1.5}, "threshold 1.5"),
    ]:
        with pytest.raises(InlayError, match=message):
            report(train, test, **options)
    path = tmp_path / "odd.jsonl"
    path.write_text('{"question": "q"}\n{"odd": 1}\n')
    with pytest.raises(InlayError, match="odd.jsonl, record 2: no question"):
        read_questions(path)
