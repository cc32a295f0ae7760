"""A study's plan, its conditions, and what its findings say; the runs themselves are in test_toy.py (slow)."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge import findings, report
from inlay.knowledge import study as studying
from inlay.knowledge.curves import two_lines
from inlay.knowledge.design import AGAINST, BY_NAME, CONDITIONS, Job, StudySettings, condition, jobs, method_of, rates
from inlay.knowledge.slick import Known
from inlay.knowledge.study import Lab, _there, assemble, file_of
from tests.knowledge.synthetic import run, study, table


def settings(out=Path("out"), **more):
    small = {"families": ("llama", "bloom"), "methods": ("lora:rank=4", "ia3"), "seeds": (0, 1), "items": 24}
    return StudySettings(out=out, **{**small, **more})


def test_the_plan_has_every_run_once_and_the_baselines_first():
    made = jobs(settings())
    assert len({j.name for j in made}) == len(made)
    plain = {(j.family, j.method, j.regime, j.seed) for j in made if j.condition == "plain"}
    assert len(plain) == 2 * (2 + 1 + 1 + 1 + 1)  # both methods and families, two further regimes, two seeds each
    assert {j.condition for j in made if j.kind == "run"} == {"plain", *CONDITIONS}
    assert [j.condition for j in made[:2]] == ["plain", "plain"]
    controlled = [j.condition for j in made if j.condition in CONDITIONS and j.seed == 1]
    assert controlled[0] == "uniform", "a study that is cut short has what others are compared with"


def test_all_mandatory_controls_are_there():
    for name in ("random subset", "lowest distance", "lowest loss", "shuffled -2", "confidence -2", "lr-matched -2"):
        assert not condition(name).remedy
    assert {c.kind for c in CONDITIONS.values()} == set(AGAINST)
    assert all(against in CONDITIONS for against in AGAINST.values())


def test_unknown_facts_leave_first_where_that_control_is_asked_for():
    assert "no unknown" not in CONDITIONS and "no unknown" in BY_NAME  # of edits it leaves nothing to compare
    category = np.array(["Unknown"] * 30 + ["MaybeKnown"] * 12 + ["HighlyKnown"] * 8, dtype=object)
    measured = {"tsd": np.linspace(0, 1, 50), "features": np.ones((50, 2)), "categories": category}
    kept = condition("no unknown").keep(measured, 0.5, seed=0)
    assert kept.sum() == 25 and kept[30:].all()
    assert "no unknown" in {j.condition for j in jobs(settings(conditions=("random subset", "no unknown")))}


@pytest.mark.parametrize("category", ["Unknown", "MaybeKnown"])
def test_a_control_that_compares_nothing_is_refused(tmp_path, monkeypatch, category):
    found = [Known(f"i{n}", float(category != "Unknown") / 2, 0.5 * (category != "Unknown")) for n in range(4)]
    monkeypatch.setattr(studying, "slick", lambda *args, **more: found)
    lab = Lab(settings(tmp_path, progress=False))
    lab.hosts["llama"] = (None, None, None)
    job = Job("run", "llama", "lora:rank=4", "edits", "no unknown", 0, 4, 1)
    with pytest.raises(InlayError, match=f"{4 if category == 'Unknown' else 0} of 4 facts are Unknown.*new people"):
        lab._categories(job, [])


def test_filters_keep_as_many_as_their_controls():
    draw = np.random.default_rng(0)
    measured = {"tsd": draw.random(50), "features": draw.normal(size=(50, 8)), "loss": draw.random(50)}
    for one in CONDITIONS.values():
        kept = one.keep(measured, 0.7, seed=3)
        assert kept.sum() == (35 if one.kind == "filter" else 50)
    low = condition("lowest distance").keep(measured, 0.7, 0)
    assert measured["tsd"][low].max() <= measured["tsd"][~low].min()
    a, b = (condition("random subset").keep(measured, 0.7, s) for s in (0, 1))
    assert (a != b).any() and (a == condition("random subset").keep(measured, 0.7, 0)).all()


def test_weights_are_those_of_the_training_options():
    know = condition("shuffled -2").settings()
    assert (know.signal, know.beta, know.control) == ("dynamic", -2.0, "shuffled")
    assert condition("uniform").settings() is None and condition("gamma 1").settings().gamma == 1
    assert condition("beta -2 to +2").settings().beta_end == 2


def test_methods_are_written_with_their_settings():
    assert method_of("lora:rank=4") == ("lora", {"rank": 4}) and method_of("ia3") == ("ia3", {})
    assert rates("ia3") != rates("lora:rank=1") == rates("lora:rank=4")
    for wrong in ("lora:rank", "lore", "lora:size=3"):
        with pytest.raises((InlayError, TypeError)):
            method_of(wrong)
    with pytest.raises(InlayError, match="unknown regime"):
        settings(regimes=("edit",))


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path):
    job = jobs(settings())[0]
    file = tmp_path / "run.json"
    assert not _there(file, job)
    file.write_text(json.dumps({"job": job.plain()}))
    assert _there(file, job)
    with pytest.raises(InlayError, match="other settings"):
        _there(file, dataclasses.replace(job, steps=7))


def controlled(condition: str, seed: int, right: float, n: int = 200, kept=None):
    draw = np.random.default_rng([seed, len(condition)])
    em = (draw.random(n) < right).astype(float)
    numbers = {"em": 1.0, "paraphrase_em": em.mean(), "paraphrase_em_kept": em.mean(), "retention": 0.2}
    one = {"condition": condition, "seed": seed, "presentations": 8, "table": "made-up", **numbers}
    return {"run": one, "paraphrase_N": em.tolist(), "kept_N": kept or [True] * n}


def test_controls_are_compared_with_their_own_baseline_on_shared_seeds():
    found = [controlled(c, s, p) for c, p in (("uniform", 0.3), ("beta -2", 0.6)) for s in range(3)]
    found += [controlled("confidence -2", 0, 0.6), controlled("lowest distance", 0, 0.5)]
    rows = {r["name"]: r for r in findings.control_rows(found)}
    assert set(rows) == {"beta -2", "confidence -2"}, "no random subset, so nothing to compare a filter with"
    assert rows["beta -2"]["low"] > 0.15 and rows["beta -2"]["seeds"] == 3 and rows["confidence -2"]["seeds"] == 1
    assert rows["beta -2"]["remedy"] and not rows["confidence -2"]["remedy"]
    assert rows["beta -2"]["difference"] == pytest.approx(
        rows["beta -2"]["paraphrase_em"] - rows["beta -2"]["paraphrase_em_against"]
    )


def test_findings_of_made_up_runs():
    data = study(60, seeds=2)
    data["controls"] = []
    found = findings.findings(data)["plain"]
    lora = next(f for f in found if f["method"] == "lora")
    assert lora["seeds"] == 2 and lora["near_quartile_em"] > lora["far_quartile_em"]
    assert len(lora["logistic_z"]) == len(lora["logistic_z_shuffled"]) == 2
    assert np.mean(lora["drop_per_seed"]) == pytest.approx(lora["near_quartile_em"] - lora["far_quartile_em"])
    assert np.mean(lora["drop_interval"]) == pytest.approx(np.mean(lora["drop_per_seed"]))
    assert 0 <= lora["inverted_u_splits"] <= findings.SPLITS and (lora["inverted_u_splits"] or not lora["inverted_u"])
    assert lora["away"]["0"] == 0 and lora["away"]["25"] > 0


def test_intervals_over_seeds_are_students():
    assert findings.over_seeds([0.0, 1.0, 2.0]) == pytest.approx([1 - 2.4841, 1 + 2.4841], abs=1e-4)  # 4.3027 / sqrt 3
    assert findings.over_seeds([0.3]) is None


def test_findings_as_tables_say_what_the_numbers_say():
    rows = [controlled(c, s, p) for c, p in (("uniform", 0.3), ("beta -2", 0.6)) for s in range(3)]
    data = {**study(40, seeds=2), "controls": findings.control_rows(rows)}
    found = report.plain(findings.findings(data))
    text = findings.markdown(found)
    assert text.count("| ---") >= 4 and "**beta -2**" in text
    for p in found["plain"]:
        assert f"| {100 * p['paraphrase_em']:.1f} | {100 * p['retention']:.1f} |" in text
    assert f"| 360 | {100 * 0.6:.1f} | +40.0 |" in text


def test_a_study_cut_short_is_reported_as_far_as_it_went(tmp_path):
    s = settings(tmp_path)
    with pytest.raises(InlayError, match="no runs yet"):
        assemble(s)
    made, job = table(24), jobs(s)[0]
    one = {"job": job.plain(), "run": run(made, 0), "table": made}
    file = file_of(s, job)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(report.plain(one)))
    data = assemble(s)
    report.validate(data)
    assert data["about"]["runs"] == f"1 of {len(jobs(s))}" and len(data["runs"]) == 1


def test_a_job_has_a_name_that_is_a_file():
    name = Job("run", "llama", "lora:rank=4", "new people", "beta -2 to +2", 3, 1, 1).name
    assert "/" not in name and " " not in name and ":" not in name


def test_shapes_of_flat_data_are_not_inverted_us():
    d = np.linspace(0, 1, 300)
    assert not two_lines(d, np.tile([0, 1, 1], 100)).inverted_u
    assert math.isfinite(two_lines(d, np.tile([0, 1, 1], 100)).left)
