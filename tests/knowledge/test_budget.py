"""What a run can afford to watch: within the budget, drawn with the seed, and the same on every machine."""

from __future__ import annotations

import dataclasses

import pytest

from inlay.core.errors import InlayError
from inlay.knowledge.budget import LEAST, Asking, afford, everything, spaced
from inlay.knowledge.track import TrackSettings, read_watched
from tests.knowledge import test_track as watched

ASKING = Asking(paraphrases=[2] * 300 + [0] * 60, retained=180, question=18.0, again=0, limit=11, step=330.0)


def portion(total, budget=0.05, snapshots=3, seed=0, asking=ASKING):
    return afford(asking, budget, snapshots, 16, 50, total, seed)


def test_snapshots_are_at_equal_ratios_from_an_eighth_of_the_run():
    assert spaced(400, 3) == [50, 141, 400] and spaced(400, 1) == [400] and spaced(400, 0) == []
    assert spaced(2, 5) == [1, 2] and spaced(1000, 2) == [125, 1000]


@pytest.mark.parametrize("total", [200, 400, 1000, 5000, 40000])
@pytest.mark.parametrize("budget", [0.02, 0.05, 0.2])
def test_a_portion_stays_within_its_budget_and_grows_with_the_run(total, budget):
    made, longer = portion(total, budget), portion(2 * total, budget)
    assert made.share <= budget or len(made.items) == LEAST and len(made.at) == 1
    assert made.at[-1] == total
    assert (len(longer.at), len(longer.items)) >= (len(made.at), len(made.items)) or longer.paraphrases is None


def test_what_is_drawn_follows_from_the_seed_alone():
    a, b = portion(400), portion(400, seed=1)
    assert a == portion(400) and a.items != b.items and LEAST <= len(a.items) < 360
    assert a.items == sorted(set(a.items)) and a.retained == sorted(set(a.retained))
    assert all((k == -1) == (ASKING.paraphrases[i] == 0) for i, k in zip(a.items, a.paraphrases, strict=True))
    assert set(a.items) <= set(portion(1000).items) or len(portion(1000).at) > len(a.at)


def test_long_runs_are_watched_whole():
    made = portion(40000)
    assert made.paraphrases is None and len(made.items) == 360 and len(made.retained) == 180
    assert made == everything(ASKING, spaced(40000, 3), 16, 50, 40000)


def test_a_run_too_short_for_its_budget_still_ends_with_a_snapshot_of_a_few_items_and_says_what_it_costs():
    made = portion(20)
    assert made.at == [20] and len(made.items) == LEAST and made.share > 0.05


def test_features_of_hidden_spaces_are_paid_for():
    dear = dataclasses.replace(ASKING, again=1)
    assert len(portion(400, asking=dear).items) < len(portion(400).items)


def test_probes_take_a_third_of_the_budget_at_most():
    rare = portion(400, budget=0.01)
    assert rare.probe_every > 50 and ASKING.probes(16, rare.probe_every, 400) <= 0.01 * 400 / 3
    assert portion(400, snapshots=0).at == []


def test_of_a_portion_a_watched_run_says_what_it_says_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.knowledge.budget.LEAST", 2)
    some = dataclasses.replace(watched.HOW, at=(), snapshots=1)
    all_of_it = dataclasses.replace(some, budget=None)
    told = []
    watched.run(tmp_path / "some", watched.tracker(some, tell=told.append))
    watched.run(tmp_path / "all", watched.tracker(all_of_it))
    few, every = read_watched(tmp_path / "some"), read_watched(tmp_path / "all")
    at = few.about["portion"]["items"]
    assert few.table["id"].tolist() == [watched.ITEMS[n].id for n in at] and len(at) == 2
    assert [s["step"] for s in few.snapshots] == [s["step"] for s in every.snapshots] == [0, 6]
    for a, b in zip(few.snapshots, every.snapshots, strict=True):
        for key in ("answers", "em", "state", "paraphrase_em"):
            assert a[key] == [b[key][n] for n in at]
        assert a["distance"] == pytest.approx([b["distance"][n] for n in at])
        assert a["retention_em"] == [b["retention_em"][n] for n in few.about["portion"]["retained"]]
    assert told == [few.told] and "2 of 5 items, 2 of 3 retained facts, drawn" in few.told
    assert "5 of 5 items" in every.told and "drawn" not in every.told


def test_a_run_that_goes_on_asks_what_it_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("inlay.knowledge.budget.LEAST", 2)
    how = dataclasses.replace(watched.HOW, at=(), snapshots=1)
    watched.run(tmp_path / "r", watched.tracker(how))
    before = watched.files(tmp_path / "r")
    monkeypatch.setattr("inlay.knowledge.budget.LEAST", 4)  # whatever would be chosen now
    watched.run(tmp_path / "r", watched.tracker(how), resume=tmp_path / "r" / "checkpoint-2")
    assert watched.files(tmp_path / "r") == before


def test_a_budget_is_a_positive_share():
    with pytest.raises(InlayError, match=r"such as 0\.05"):
        TrackSettings(budget=0.0)
