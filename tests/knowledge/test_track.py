"""The tracker: it changes nothing, says what generation says, and goes on where a run goes on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import inlay
from inlay.core.errors import InlayError
from inlay.evaluate import GenerateSettings, generate
from inlay.knowledge.feature import Space
from inlay.knowledge.items import Item
from inlay.knowledge.measure import MeasureSettings, measure
from inlay.knowledge.states import states
from inlay.knowledge.track import Tracker, TrackSettings, read_watched, summary
from inlay.knowledge.weights import soft_distance
from inlay.knowledge.wording import answer_of, examples
from inlay.train import fit
from tests.evaluate.tiny import base, tokenizer
from tests.knowledge import ranked
from tests.train.ranked import launch
from tests.train.tiny import copy, same
from tests.train.tiny import settings as train_settings

TOK = tokenizer()
ITEMS = [Item(f"i{n}", f"Item {n} is", f"t{n}", relation="r", paraphrases=(f"{n}?",) * (n % 2)) for n in range(5)]
KEPT = [Item(f"k{n}", f"Keep {n}", f"t{n}") for n in range(3)]
HOW = TrackSettings(measure=MeasureSettings(max_new_tokens=4), probes=3, probe_every=2, at=(2, 4, 6))


def wearing(family: str = "llama"):
    host = inlay.attach(base(family))
    return host.add("a", inlay.method("lora").make(rank=4), at="q,v,down", seed=5)


def run(out, tracker=None, host=None, steps=6, resume=False, **changes):
    host = host or wearing()
    settings = train_settings(out, steps=steps, lr=2e-2, **changes)
    fit(host, "a", examples(ITEMS, TOK), [], settings, out, TOK, resume=resume, observers=[tracker] if tracker else [])
    return host


def tracker(how=HOW, **more):
    return Tracker(TOK, ITEMS, KEPT, how, **more)


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_watching_changes_nothing(tmp_path, engine):
    with_it = run(tmp_path / "w", tracker(), engine=engine)
    without = run(tmp_path / "o", engine=engine)
    assert same(copy(with_it), copy(without))
    lines = [[json.loads(x) for x in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in "wo"]
    assert [a["loss"] for a in lines[0]] == [b["loss"] for b in lines[1]]
    assert "pushed_away" in lines[0][0] and "em" in lines[0][1] and "retention_em" in lines[0][-1]


def test_a_snapshot_is_what_generation_says(tmp_path):
    host = run(tmp_path / "r", tracker())
    found = read_watched(tmp_path / "r")
    assert [s["step"] for s in found.snapshots] == [0, 2, 4, 6]
    how = GenerateSettings(max_new_tokens=4, stop=("\n",))
    for plan, at in ((None, found.snapshots[0]), ("a", found.snapshots[-1])):
        said = [answer_of(g.text) for g in generate(host, TOK, [i.prompt for i in ITEMS], plan, how)]
        assert at["answers"] == said
        kept = [answer_of(g.text) for g in generate(host, TOK, [i.prompt for i in KEPT], plan, how)]
        assert at["retention_em"] == [k == i.target for k, i in zip(kept, KEPT, strict=True)]
        assert [e is None for e in at["paraphrase_em"]] == [not i.paraphrases for i in ITEMS]
        want = states(found.table["tsd"], at["distance"], at["em"])
        assert at["state"] == want.tolist() and at["summary"] == summary(at)
    first = found.snapshots[0]
    assert first["distance"] == found.table["tsd"].tolist() and set(first["state"]) == {"stalled"}
    assert first["answers"] == found.table["answer0"].tolist()


def test_the_table_is_the_bases_own(tmp_path):
    run(tmp_path / "r", tracker())
    bare = measure(inlay.attach(base("llama")), TOK, ITEMS, HOW.measure)
    found = read_watched(tmp_path / "r").table
    assert all(np.array_equal(bare[k], found[k]) for k in bare.rows) and found.about == bare.about


@pytest.mark.parametrize("engine", ["packed", "plain"])
def test_a_probe_is_the_soft_distance_of_the_answer(tmp_path, engine):
    watch = tracker()
    host = run(tmp_path / "r", watch, engine=engine)
    looks = read_watched(tmp_path / "r").probes
    assert [p["step"] for p in looks] == [1, 3, 5] and all(len(p["before"]) == 3 for p in looks)

    def by_hand(plan):
        found = []
        E = host.model.get_input_embeddings().weight.detach()
        for row in watch.probe:
            with host.using(plan), torch.no_grad():
                logits = host.model(torch.tensor([row.input_ids])).logits[:, :-1]
            found.append(float(soft_distance(logits, torch.tensor([row.labels])[:, 1:], E, skip=[TOK.eos_token_id])))
        return found

    assert looks[0]["before"] == pytest.approx(by_hand(None), abs=1e-5)  # a fresh adapter says what the base says
    assert looks[0]["after"] == looks[0]["before"]  # the first step of a warm-up has rate 0
    assert looks[1]["after"] != looks[1]["before"]
    for look in looks:
        assert look["pushed_away"] == np.mean(np.array(look["after"]) > np.array(look["before"]))


def files(out):
    folder = out / "watched"
    names = sorted(p.name for p in folder.glob("*.json*"))
    return {n: (folder / n).read_text() for n in names}


def test_an_interrupted_run_resumes_to_the_same_snapshots(tmp_path, monkeypatch):  # check 34
    from inlay.train.loop import Loop

    whole = run(tmp_path / "whole", tracker())
    real = Loop.advance

    def advance(self):
        if self.step == 5:
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(Loop, "advance", advance)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tracker())
    assert len(files(tmp_path / "cut")) == 5
    monkeypatch.undo()
    again = run(tmp_path / "cut", tracker(), resume=True)
    assert same(copy(whole), copy(again))
    assert files(tmp_path / "whole") == files(tmp_path / "cut")


def test_what_a_resumed_run_does_again_is_forgotten(tmp_path):
    whole = run(tmp_path / "r", tracker())
    before = files(tmp_path / "r")
    again = run(tmp_path / "r", tracker(), resume=tmp_path / "r" / "checkpoint-2")
    assert same(copy(whole), copy(again)) and files(tmp_path / "r") == before


def test_two_ranks_watch_as_one(tmp_path):
    run(tmp_path / "one", tracker())
    assert launch(2, ranked.watched, tmp_path / "two", patience=120) == [None, None]
    one, two = (read_watched(tmp_path / d) for d in ("one", "two"))
    assert [s["step"] for s in two.snapshots] == [0, 2, 4, 6] and [p["step"] for p in two.probes] == [1, 3, 5]
    for a, b in zip(one.snapshots, two.snapshots, strict=True):
        assert a["answers"] == b["answers"] and a["retention_em"] == b["retention_em"] and a["state"] == b["state"]
        assert a["distance"] == pytest.approx(b["distance"], abs=1e-6)
    for a, b in zip(one.probes, two.probes, strict=True):
        assert a["before"] == pytest.approx(b["before"], abs=1e-5) and a["after"] == pytest.approx(b["after"], abs=1e-5)


def test_another_watch_of_the_same_run_is_refused(tmp_path):
    run(tmp_path / "r", tracker())
    other = dataclasses.replace(HOW, probe_every=1)
    with pytest.raises(InlayError, match="watched otherwise"):
        run(tmp_path / "r", tracker(other), resume=tmp_path / "r" / "checkpoint-2")


@pytest.mark.parametrize("family", ["gptj", "bloom"])
def test_other_families_and_hidden_spaces_are_watched(tmp_path, family):
    how = dataclasses.replace(
        HOW, measure=MeasureSettings(max_new_tokens=4, space=Space("hidden:1")), at=(), snapshots=1
    )
    host = run(tmp_path / "r", tracker(how), wearing(family), steps=3)
    found = read_watched(tmp_path / "r")
    assert [s["step"] for s in found.snapshots] == [0, 3]
    bare = inlay.attach(base(family))
    assert np.array_equal(found.table["tsd"], measure(bare, TOK, ITEMS, how.measure)["tsd"])
    assert host.plan == ((),)


def test_motion_against_the_target_is_away_by_the_other_rule(tmp_path):
    run(tmp_path / "r", tracker(dataclasses.replace(HOW, rule="direction")))
    last = read_watched(tmp_path / "r").snapshots[-1]
    for state, toward, d, d0 in zip(
        last["state"], last["direction"], last["distance"], read_watched(tmp_path / "r").table["tsd"], strict=True
    ):
        if state != "learned" and abs(d - d0) > 1e-6:
            assert state == ("away" if toward < 0 else "approached")


def test_when_snapshots_are_taken():
    assert TrackSettings().steps(400) == [50, 141, 400]
    assert TrackSettings(at=(50, 900)).steps(400) == [50, 400] and TrackSettings(snapshots=0).steps(9) == []
    assert TrackSettings(snapshots=5).steps(2) == [1, 2]


def test_mistakes_are_told(tmp_path):
    with pytest.raises(InlayError, match="no items"):
        Tracker(TOK, [])
    with pytest.raises(InlayError, match="probe_every must be at least 1"):
        TrackSettings(probe_every=0)
    with pytest.raises(InlayError, match="steps 1 and later"):
        TrackSettings(at=(0,))
    with pytest.raises(InlayError, match="was not watched"):
        read_watched(tmp_path)
    table = measure(inlay.attach(base("llama")), TOK, ITEMS[:2], HOW.measure)
    with pytest.raises(InlayError, match="other items"):
        tracker(table=table)
