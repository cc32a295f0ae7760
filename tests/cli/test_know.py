"""`inlay know items, base, measure, watch`: from nothing to watched items in the shell's own words."""

from __future__ import annotations

import json

import pytest

from inlay.knowledge import pretrain
from inlay.knowledge.items import read_items, write_items
from inlay.knowledge.table import Table
from inlay.knowledge.track import read_watched


@pytest.fixture(scope="module")
def small(tmp_path_factory, monkeypatch_module):
    """A base that hardly knows its four people."""
    from inlay.knowledge.world import World

    monkeypatch_module.setattr(pretrain, "ROWS", 8)
    folder = tmp_path_factory.mktemp("know") / "base"
    return pretrain.make_base("llama", 0, folder, world=World(0, people=8, strangers=8), steps=20)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture
def facts(small, tmp_path, inlay_):
    files = tmp_path / "facts.jsonl", tmp_path / "kept.jsonl"
    argv = ("--base", small, "--limit", 8, "--out", files[0], "--retention", files[1])
    code, out, err = inlay_("know", "items", "--source", "world-edits", *argv)
    assert code == 0 and "8 items" in out, err
    return files


def test_a_base_says_what_it_knows_and_is_not_made_twice(small, inlay_):
    code, out, err = inlay_("know", "base", "--people", 8, "--strangers", 8, "--steps", 20, "--out", small)
    assert code == 0 and "%" in out and "base" in out, err
    code, _, err = inlay_("know", "base", "--people", 9, "--out", small)
    assert code == 2 and "made otherwise" in err


def test_measure_leaves_a_table_and_a_summary(small, facts, tmp_path, inlay_, monkeypatch):
    monkeypatch.setenv("INLAY_CACHE", str(tmp_path / "cache"))
    argv = ("know", "measure", "--model", small, "--items", facts[0], "--out", tmp_path / "table", "--no-progress")
    code, out, err = inlay_(*argv)
    assert code == 0 and "median distance" in out and "all" in out, err
    table = Table.load(tmp_path / "table")
    assert table["id"].tolist() == [i.id for i in read_items(facts[0])]
    (kept,) = (tmp_path / "cache" / "tables").iterdir()
    assert Table.load(kept).about == table.about
    code, _, err = inlay_(*argv, "--space", "hidden:1", "--center", "--no-cache")
    assert code == 0 and Table.load(tmp_path / "table").about["settings"]["space"]["name"] == "hidden:1", err


def test_slick_writes_a_category_for_each_item(small, facts, tmp_path, inlay_):
    argv = ("--model", small, "--items", facts[0], "--out", tmp_path / "c.json", "--prompts", 2, "--shots", 1)
    code, out, err = inlay_("know", "slick", *argv, "--samples", 2, "--no-progress")
    found = json.loads((tmp_path / "c.json").read_text()) if code == 0 else err
    assert list(found) == [i.id for i in read_items(facts[0])] and "Unknown" in out
    assert set(found.values()) <= {"HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"}
    code, _, err = inlay_("know", "slick", *argv, "--shots", 7)
    assert code == 2 and "fewer shots" in err


def test_watch_trains_and_shows_every_snapshot(small, facts, tmp_path, inlay_):
    argv = ("--model", small, "--items", facts[0], "--retention", facts[1], "--out", tmp_path / "run", "--rank", 2)
    more = ("--steps", 4, "--warmup", 1, "--no-progress", "--loggers", "none", "--at-steps", 2, 4, "--probe-every", 2)
    code, out, err = inlay_("know", "watch", *argv, *more)
    assert code == 0 and "retained" in out and "away" in out, err
    found = read_watched(tmp_path / "run")
    assert [s["step"] for s in found.snapshots] == [0, 2, 4] and [p["step"] for p in found.probes] == [1, 3]
    assert len(found.snapshots[0]["retention_em"]) == len(read_items(facts[1]))
    about = json.loads((tmp_path / "run" / "data.json").read_text())
    assert about["know"]["items"] == 8 and (tmp_path / "run" / "adapter" / "adapter.json").is_file()
    code, _, err = inlay_("know", "watch", *argv, *more)
    assert code == 2 and "holds a run" in err
    assert inlay_("know", "watch", *argv, *more, "--resume")[0] == 0


def test_a_filtered_and_weighted_run_is_watched_on_all_items(small, facts, tmp_path, inlay_):
    table = tmp_path / "table"
    given = ("--model", small, "--items", facts[0])
    assert inlay_("know", "measure", *given, "--out", table, "--no-cache", "--no-progress")[0] == 0
    steer = ("--table", table, "--filter", "features", "--keep", 0.5, "--signal", "static", "--beta", -1)
    more = ("--steps", 3, "--warmup", 1, "--no-progress", "--loggers", "none", "--snapshots", 1, "--rank", 2)
    code, _, err = inlay_("know", "watch", *given, *steer, *more, "--out", tmp_path / "run")
    assert code == 0, err
    found = read_watched(tmp_path / "run")
    assert len(found.snapshots[-1]["em"]) == 8 and found.table["tsd"].tolist() == Table.load(table)["tsd"].tolist()
    assert json.loads((tmp_path / "run" / "data.json").read_text())["train"]["examples"] == 4


def test_public_files_become_items(tmp_path, inlay_):
    row = {"src": "Who?", "alt": "Ada", "rephrase": "By whom?", "subject": "X", "loc": "nq question: a", "loc_ans": "b"}
    (tmp_path / "z.json").write_text(json.dumps([row]))
    argv = ("--file", tmp_path / "z.json", "--out", tmp_path / "i.jsonl", "--retention", tmp_path / "k.jsonl")
    assert inlay_("know", "items", "--source", "zsre", *argv)[0] == 0
    assert read_items(tmp_path / "i.jsonl")[0].target == "Ada" and read_items(tmp_path / "k.jsonl")[0].target == "b"


def test_mistakes_are_one_line_and_exit_2(small, facts, tmp_path, inlay_):
    def told(*argv):
        code, _, err = inlay_(*argv)
        assert code == 2 and "Traceback" not in err
        return " ".join(err.split())

    out = ("--out", tmp_path / "t")
    assert "no file of items" in told("know", "measure", "--model", small, "--items", tmp_path / "x.jsonl", *out)
    assert "unknown space 'logits'" in told(
        "know", "measure", "--model", small, "--items", facts[0], "--space", "logits", *out
    )
    assert "not predict" in told("know", "measure", "--model", small, "--items", facts[0], "--space", "predict:1", *out)
    assert "trained on and to be retained" in told(
        "know", "watch", "--model", small, "--items", facts[0], "--retention", facts[0], *out
    )
    assert "leave it out" in told("know", "items", "--source", "zsre", "--base", small, *out)
    assert "is generated" in told("know", "items", "--source", "world-new", "--file", facts[0], *out)
    write_items(tmp_path / "val.jsonl", [])
    assert "holds no items" in told("know", "watch", "--model", small, "--items", tmp_path / "val.jsonl", *out)
