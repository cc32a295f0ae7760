"""Scoring: every published prediction and accuracy reproduced, intervals, and errors that name the line."""

import gzip
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from inlay.core.errors import InlayError
from inlay.tasks import get
from inlay.tasks.score import read_generations, render, score, score_file, wilson

ROWS = [
    {"adapter": "lora", "dataset": "gsm8k", "index": 0, "text": "The answer is 1,000.</s>", "label": "1000.0"},
    {"adapter": "lora", "dataset": "gsm8k", "index": 1, "text": "none", "label": "2"},
    {"adapter": "lora", "dataset": "boolq", "index": 0, "text": "the correct answer is true", "label": "true"},
    {"adapter": "series", "dataset": "gsm8k", "index": 0, "text": "so 5-3 = 2", "label": "2.0009"},
]


def write(path: Path, rows: list) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture(scope="module")
def golden(shared: Path) -> Path:
    folder = shared / "golden" / "published_generations"
    if not folder.is_dir():
        pytest.skip("no published generations in ../shared")
    return folder


def test_every_published_prediction_and_accuracy_is_reproduced(golden: Path) -> None:
    file = golden / "llama-7b.jsonl.gz"
    scores = score_file(file, protocol="published")
    logged = {}
    for row in read_generations(file):
        logged[row["adapter"], get(row["dataset"]).name, row["index"]] = row["prediction"]
    ours = {(s.group["adapter"], s.task, p.index): p.prediction for s in scores for p in s.predictions}
    assert len(ours) == 63_974 and ours == logged
    cells = json.loads((golden / "llama-7b-summary.json").read_text())
    wanted = {(c["adapter"], get(c["dataset"]).name): (c["n"], c["correct"], c["accuracy"]) for c in cells}
    assert {(s.group["adapter"], s.task): (s.n, s.correct, round(s.accuracy, 1)) for s in scores} == wanted
    assert len(wanted) == 51 and all(s.n == s.expected for s in scores)


def test_one_task_of_a_file_with_many(golden: Path) -> None:
    scores = score_file(golden / "llama-7b.jsonl.gz", "obqa", "published", by=("adapter",))
    correct = {s.group["adapter"]: s.correct for s in scores}
    assert correct == {"series": 362, "lora": 374, "parallel": 376, "prefix": 303}
    assert {s.task for s in scores} == {"openbookqa"}


def test_groups_of_a_file(tmp_path: Path) -> None:
    for name in ("g.jsonl", "g.jsonl.gz"):
        scores = score_file(write(tmp_path / name, ROWS), protocol="clean")
        told = [(s.task, s.group["adapter"], s.n, s.correct, s.no_answer) for s in scores]
        assert told == [("gsm8k", "lora", 2, 1, 1), ("boolq", "lora", 1, 1, 0), ("gsm8k", "series", 1, 1, 0)]
    assert [p.prediction for p in scores[0].predictions] == ["1000.0", "inf"]
    together = score_file(write(tmp_path / "one.jsonl", ROWS[:2]), "GSM8K", by=())
    assert [s.n for s in together] == [2] and together[0].group == {}
    screen = io.StringIO()
    Console(file=screen, width=160).print(render(scores))
    assert "lora" in screen.getvalue() and "2 of 1319" in screen.getvalue()


def test_labels_come_from_the_source_by_index(tmp_path: Path) -> None:
    rows = [{"instruction": f"q{i}", "answer": str(i)} for i in range(3)]
    source = tmp_path / "mine.json"
    source.write_text(json.dumps(rows))
    with pytest.warns(UserWarning, match="not the published"):
        got = score([{"text": "2", "index": 2}, {"text": "5", "index": 0}], "gsm8k", "published", source)
    assert [p.label for p in got.predictions] == ["2", "0"] and got.correct == 1
    with pytest.warns(UserWarning), pytest.raises(InlayError, match="index 7, but the source has 3 answers"):
        score([{"text": "2", "index": 7}], "gsm8k", "published", source)
    with pytest.raises(InlayError, match="without 'label'; pass source="):
        score(["2"], "gsm8k", "published")


def test_numbers_are_equal_within_a_thousandth() -> None:
    rows = [{"text": "1.001", "label": "1.0005"}, {"text": "1.002", "label": "1"}, {"text": "9" * 400, "label": "1"}]
    assert [p.correct for p in score(rows, "svamp", "published").predictions] == [True, False, False]


def test_the_json_form() -> None:
    rows = [{"text": "true", "label": "true", "truncated": False}, {"text": "", "label": "false", "truncated": True}]
    got = score(rows, "boolq", "clean")
    out = json.loads(json.dumps(got.to_json()))
    assert (out["n"], out["correct"], out["accuracy"], out["no_answer"], out["truncated"]) == (2, 1, 50.0, 1, 1)
    assert out["expected"] == 3270 and out["protocol"] == "clean" and out["predictions"][1]["prediction"] == ""
    assert "predictions" not in got.to_json(predictions=False)
    assert out["interval"] == pytest.approx([9.4531, 90.5469], abs=1e-3)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"), [(0, 10, 0.0, 27.7533), (10, 10, 72.2467, 100.0), (15, 100, 9.3061, 23.2773)]
)
def test_wilson_against_tabled_values(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == pytest.approx((low, high), abs=2e-2)


def test_wilson_agrees_with_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for correct, n in [(0, 5), (3, 7), (495, 1319), (254, 254)]:
        interval = stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
        assert wilson(correct, n) == pytest.approx((100 * interval.low, 100 * interval.high))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"text": "a"}', "{"], "line 2: not JSON"),
        (['{"text": "a"}', "", "[1]"], "line 3: an object with a 'text' is needed, this has list"),
        (['{"txt": "a"}'], "line 1: an object with a 'text' is needed, this has fields txt"),
        ([""], "holds no generations"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InlayError, match=message):
        read_generations(path)


def test_a_broken_archive_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    path.write_bytes(b"no gzip")
    for name in (path, tmp_path / "none.jsonl"):
        with pytest.raises(InlayError, match="cannot read"):
            read_generations(name)


def test_what_cannot_be_scored_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "g.jsonl", ROWS)
    with pytest.raises(InlayError, match="no generations of SVAMP; it has boolq, gsm8k"):
        score_file(file, "svamp")
    with pytest.raises(InlayError, match="line 1: no field 'seed' to group by"):
        score_file(file, by=("seed",))
    with pytest.raises(InlayError, match="line 4: index 0 of gsm8k occurs twice .before: .*line 1"):
        score_file(file, "gsm8k", by=())
    with pytest.raises(InlayError, match="line 1: label 'maybe'; boolq has true, false"):
        score_file(write(tmp_path / "h.jsonl", [{"text": "a", "label": "maybe"}]), "boolq")
    with pytest.raises(InlayError, match="line 1: label 'x' is no number"):
        score_file(write(tmp_path / "i.jsonl", [{"text": "a", "label": "x"}]), "gsm8k")
    with pytest.raises(InlayError, match="no field 'dataset'; pass task"):
        score_file(tmp_path / "i.jsonl")
    with pytest.raises(InlayError, match="'csqa' is no task"):
        score_file(write(tmp_path / "j.jsonl", [{"text": "a", "label": "x", "dataset": "csqa"}]))
    with pytest.raises(InlayError, match="'index' must be a whole number"):
        score([{"text": "1", "label": "1", "index": "0"}], "gsm8k", "clean")
    with pytest.raises(InlayError, match="no generations to score"):
        score([], "gsm8k", "clean")
