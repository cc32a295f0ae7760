"""`inlay know interfere`, `report` and `study` on the command line: small, but all the way."""

from __future__ import annotations

import json

import numpy as np
import pytest

from inlay.knowledge.figures.style import plain
from inlay.knowledge.items import Item, write_items
from tests.knowledge import bigram
from tests.knowledge.synthetic import study


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base in a folder that answers `a` to everything."""
    from tests.evaluate.tiny import tokenizer

    folder = tmp_path_factory.mktemp("models") / "bigram"
    bigram.base().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def facts(tmp_path):
    """Every sixth is known to that base."""
    file = tmp_path / "facts.jsonl"
    write_items(file, [Item(f"f{i}", f"fact {i}:", "abcdef"[i % 6], relation="letter") for i in range(12)])
    return file


def test_interfere_prints_curves_and_writes_a_report(base, facts, tmp_path, inlay_):
    out = tmp_path / "out"
    argv = ("--items", facts, "--out", out, "--rank", 2, "--no-progress", "--ranks", 1, 2)
    more = ("--ks", 1, 4, "--probes", 4, "--presentations", 2, "--pairs", 4)
    code, text, err = inlay_("know", "interfere", "--model", base, *argv, *more)
    assert code == 0, err
    assert "retention" in text and "gradients" in text
    data = json.loads((out / "report.json").read_text())
    assert [p["name"] for p in data["interference"]] == ["lora, rank 1", "lora, rank 2"]
    assert data["about"]["retained facts"] == 2
    part = data["interference"][0]
    assert [p["k"] for p in part["curve"]] == [1, 4] and len(part["influence"]["delta"]) == 4
    assert "base64" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--probes", 0), "probes must be at least 1"),
        (("--method", "lore"), "unknown method"),
        (("--ks", 1, 64), "lower --ks"),
        (("--space", "embedding"), "unknown space"),
    ],
)
def test_interfere_says_in_a_line_what_is_wrong(base, facts, tmp_path, inlay_, more, says):
    argv = ("--model", base, "--items", facts, "--out", tmp_path / "out", "--no-progress")
    code, _, err = inlay_("know", "interfere", *argv, *more)
    assert code == 2 and says in err and "Traceback" not in err


def test_facts_that_cannot_be_lost_are_refused(base, facts, tmp_path, inlay_):
    strange = tmp_path / "strange.jsonl"
    write_items(strange, [Item("s", "fact 0:", "z")])
    argv = ("--model", base, "--items", facts, "--retention", strange, "--out", tmp_path / "o")
    code, _, err = inlay_("know", "interfere", *argv)
    assert code == 2 and "--retention" in err


def test_report_from_a_report(tmp_path, inlay_):
    made = study(24, seeds=1)
    made["runs"] = made["runs"][:1]
    file = tmp_path / "data.json"
    file.write_text(json.dumps(plain(made)))
    code, text, err = inlay_("know", "report", file, "--out", tmp_path / "out", "--title", "Mine", "--no-progress")
    assert code == 0, err
    assert "1 runs" in text and "<title>Mine" in (tmp_path / "out" / "report.html").read_text()


def test_report_from_a_table(tmp_path, inlay_):
    from inlay.knowledge.table import Table

    rows = {
        k: np.asarray(v, dtype=object if k in ("id", "relation") else None)
        for k, v in study(24)["tables"]["made-up"].items()
    }
    Table({k: v for k, v in rows.items() if v.dtype.kind != "U"}, {"schema": 1, "model": "m", "mean": None}).save(
        tmp_path / "t"
    )
    code, _, err = inlay_("know", "report", tmp_path / "t", "--out", tmp_path / "out", "--no-progress")
    assert code == 0, err
    assert (tmp_path / "out" / "figures" / "distances_t.png").exists()


def test_report_says_what_is_missing(tmp_path, inlay_):
    assert "there is no" in inlay_("know", "report", tmp_path / "nowhere", "--out", tmp_path / "out")[2]
    hurt = {"schema": 1, "runs": [{"name": "x", "em": 1.0, "paraphrase_em": 1.0}]}
    (tmp_path / "r.json").write_text(json.dumps(hurt))
    code, _, err = inlay_("know", "report", tmp_path / "r.json", "--out", tmp_path / "out")
    assert code == 2 and "no retention" in err
    assert inlay_("know", "study", "--out", tmp_path, "--regimes", "edit")[0] == 2
    assert "unknown condition" in inlay_("know", "study", "--out", tmp_path, "--conditions", "beta")[2]
    for verb in ("interfere", "report", "study"):
        code, text, _ = inlay_("know", verb, "--help")
        assert code == 0 and f"inlay know {verb}" in text


def test_report_from_a_watched_run_has_a_null_where_the_base_is_given(base, facts, tmp_path, inlay_):
    known = tmp_path / "known.jsonl"
    write_items(known, [Item(f"k{i}", f"other {i}:", "a") for i in range(3)])
    argv = (
        "--items",
        facts,
        "--retention",
        known,
        "--rank",
        2,
        "--steps",
        4,
        "--batch-size",
        4,
        "--warmup",
        0,
        "--at",
        "down",
    )
    out = tmp_path / "run"
    code, _, err = inlay_(
        "know", "watch", "--model", base, *argv, "--lr", 0.1, "--at-steps", 1, 2, 4, "--out", out, "--no-progress"
    )
    assert code == 0, err
    for more, has in (((), False), (("--model", base), True)):
        page = tmp_path / f"page{has}"
        code, _, err = inlay_("know", "report", out, *more, "--out", page, "--no-progress")
        assert code == 0, err
        data = json.loads((page / "report.json").read_text())
        (run,) = data["runs"]
        assert run["method"] == "lora" and 0 <= run["retention"] <= 1 and len(run["snapshots"]) == 4
        assert ("deviation" in run) is has and (page / "figures" / "deviation.png").exists() is has
        assert (
            any("no paraphrases" in n for n in data["notes"]) and any("--model" in n for n in data["notes"]) is not has
        )
    if has:
        n = sum(run["deviation"]["bins"]["n"])
        assert n == 10, "items that the base gets wrong"


def test_a_run_watched_without_retained_facts_is_not_reported(base, facts, tmp_path, inlay_):
    argv = ("--items", facts, "--rank", 2, "--steps", 2, "--batch-size", 4, "--warmup", 0, "--at", "down")
    inlay_("know", "watch", "--model", base, *argv, "--out", tmp_path / "run", "--no-progress")
    code, _, err = inlay_("know", "report", tmp_path / "run", "--out", tmp_path / "page")
    assert code == 2 and "retained" in err
