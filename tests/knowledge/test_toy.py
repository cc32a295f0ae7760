"""The toy world from end to end, on a base of the user's cache (made in minutes where there is none). Thresholds stand
well inside of what was measured; none of them is a published number, and no test asserts an inverted U."""

from __future__ import annotations

import numpy as np
import pytest

from inlay.knowledge import findings, report
from inlay.knowledge.curves import logistic
from inlay.knowledge.design import Job, StudySettings
from inlay.knowledge.interfere import Bench, curve
from inlay.knowledge.measure import MeasureSettings
from inlay.knowledge.study import Lab, study
from inlay.knowledge.trial import Practice

pytestmark = pytest.mark.slow  # 8 minutes on a busy core: 27 runs of 100 steps, 5 of 200
LORA = "lora:rank=4"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    made = Lab(StudySettings(out=tmp_path_factory.mktemp("study"), families=("llama",), progress=False))
    made.rates = {LORA: 3e-3}
    return made


def run(lab, condition, seed, regime="edits", steps=100, **more):
    return lab.run(Job("run", "llama", LORA, regime, condition, seed, 360, steps, (steps,), {"keep": 0.7, **more}))


@pytest.fixture(scope="module")
def controlled(lab):
    """Three paired seeds of the conditions that the checks below compare."""
    names = ("uniform", "beta -2", "beta +2", "shuffled -2", "confidence -2")
    filters = ("random subset", "lowest distance", "lowest loss", "filter A: near and spread features")
    return [run(lab, name, seed) for seed in range(3) for name in (*names, *filters)]


def mean(found, condition, key="paraphrase_em"):
    own = [f["run"][key] for f in found if f["run"]["condition"].startswith(condition)]
    assert len(own) == 3
    return float(np.mean(own))


def test_filters_are_judged_on_what_is_kept_and_on_all_beside_their_controls(controlled):  # check 30, not met
    """Reading A was expected to beat a random subset by 0.08 on kept paraphrases. It did not (five seeds: +0.04, see
    docs/studies/knowledge.md), so that is not asserted; keeping what the base finds likeliest does (+0.16)."""
    kept = {n: mean(controlled, n, "paraphrase_em_kept") for n in ("lowest loss", "random subset")}
    assert kept["lowest loss"] - kept["random subset"] >= 0.08
    rows = {r["name"]: r for r in findings.control_rows(controlled)}
    assert {"lowest distance", "lowest loss"} <= rows.keys()
    for row in rows.values():
        assert {"paraphrase_em", "paraphrase_em_kept", "retention", "paraphrase_em_kept_against"} <= row.keys()


def test_weights_have_an_effect_that_shuffled_ones_lack_and_confidence_stands_beside_it(controlled, tmp_path):
    assert mean(controlled, "beta -2") - mean(controlled, "beta +2") >= 0.08  # check 31
    assert abs(mean(controlled, "shuffled") - mean(controlled, "uniform")) <= 0.05
    data = {"schema": 1, "controls": findings.control_rows(controlled), "runs": [f["run"] for f in controlled]}
    page = report.build(data, tmp_path).read_text()
    assert "confidence -2" in page and "beta -2" in page
    assert all("retention" in r for r in report.read(tmp_path)["runs"])


def test_distance_says_nothing_of_random_pairs_once_its_labels_are_shuffled(lab):  # check 33
    calm = 0
    for seed in range(5):
        made = run(lab, "plain", seed, "random pairs", steps=200)
        table, em = made["table"], np.asarray(made["run"]["snapshots"][-1]["em"], float)
        assert 0 < em.mean() < 1
        mixed = np.random.default_rng([seed, 33]).permutation(np.asarray(table["tsd"], float))
        calm += abs(logistic(mixed, em, list(table["relation"])).z) < 1.96
    assert calm >= 4


def test_facts_learned_together_interfere(lab):  # check 29
    host, tokenizer, world = lab.host("llama")
    items, kept = world.edits(360, 0), world.retention(world.edits(360, 0), 60, 0)
    bench = Bench(host, tokenizer, Practice(settings={"rank": 4}, lr=3e-3), MeasureSettings(batch_size=256))
    points = {p["k"]: p for p in curve(bench, items[:24], items[24:], kept, (24, 360))["curve"]}
    assert points[360]["drop"] - points[24]["drop"] >= 0.1
    assert points[360]["retention"] < points[1]["retention"]


def test_a_study_resumes_where_it_was_and_ends_in_a_valid_report(tmp_path):  # checks 32 and 34, of a study
    small = {"families": ("llama",), "methods": (LORA,), "seeds": (0,), "regimes": ("edits",), "ks": (1, 4)}
    s = StudySettings(
        out=tmp_path, items=48, steps=6, snapshots=(3,), control_steps=3, retained=24, progress=False,
        conditions=("uniform", "beta -2"), **small,
    )  # fmt: skip
    study(s)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "runs").iterdir()}
    report.validate(report.read(tmp_path))
    gone = next((tmp_path / "runs").glob("*beta*"))
    text = gone.read_text()
    gone.unlink()
    study(s)
    after = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "runs").iterdir()}
    assert before.keys() == after.keys() and sum(before[n] != after[n] for n in before) == 1
    import json

    old, new = json.loads(text), json.loads(gone.read_text())
    assert old["paraphrase_N"] == new["paraphrase_N"] and old["run"] == new["run"], "a run depends on its job alone"
