"""Figures and the report, from made-up plain data: nothing missing, nothing outside the page, no silent gaps."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from inlay.core.errors import InlayError
from inlay.knowledge import figures, report, sections
from inlay.knowledge.figures.style import plain
from tests.knowledge.synthetic import study


@pytest.fixture(scope="module")
def made():
    return study(40, seeds=1)


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    report.build(made, out)
    return out


def test_the_report_holds_retention_of_every_run(folder):
    kept = report.read(folder)
    report.validate(kept)
    assert kept["runs"] and all(0 <= r["retention"] <= 1 for r in kept["runs"])


@pytest.mark.parametrize("part", ["runs", "controls", "interference"])
@pytest.mark.parametrize("value", ["absent", None, float("nan"), 1.2, "0.5"])
def test_a_report_without_retention_is_refused(made, part, value):
    hurt = copy.deepcopy({k: v for k, v in made.items() if k in ("schema", "tables", part)})
    entry = hurt[part][0]["curve"][1] if part == "interference" else hurt[part][1]
    if value == "absent":
        del entry["retention"]
    else:
        entry["retention"] = value
    with pytest.raises(InlayError, match="no retention"):
        report.validate(hurt)


def test_other_mistakes_are_told(made):
    with pytest.raises(InlayError, match="schema"):
        report.validate({})
    with pytest.raises(InlayError, match="unknown part 'run'"):
        report.validate({"schema": 1, "run": []})
    with pytest.raises(InlayError, match="table"):
        report.validate({"schema": 1, "runs": made["runs"]})
    with pytest.raises(InlayError, match="there is no"):
        report.read("nowhere.json")


def test_every_figure_has_a_picture_and_its_numbers(folder):
    pictures = {f.stem for f in folder.glob("figures/*.png")}
    numbers = {f.stem for f in folder.glob("figures/*.json")}
    assert pictures == numbers and len(pictures) >= 14
    for file in folder.glob("figures/*.json"):
        twin = json.loads(file.read_text(), parse_constant=pytest.fail)
        assert twin["words"] and len(twin) > 3


def test_the_page_needs_nothing_beside_it(folder):
    page = (folder / "report.html").read_text()
    assert not re.search(r'(src|href)="(?!data:image/png;base64,|#)', page) and "<script" not in page
    assert page.count("<img") == len(list(folder.glob("figures/*.png")))
    for anchor in re.findall(r'href="#([^"]+)"', page):
        assert f'id="{anchor}"' in page
    for word in ("retention", "confidence weights", "random subset", "lowest distance", "kept, %", "all, %"):
        assert word in page


def test_what_is_read_back_gives_the_same_page(folder, tmp_path):
    report.build(report.read(folder), tmp_path)
    again = (tmp_path / "report.html").read_text()
    want = (folder / "report.html").read_text()
    strip = re.compile(r"base64,[^\"]+")
    assert strip.sub("", again) == strip.sub("", want)


def test_names_from_data_cannot_become_markup(made, tmp_path):
    hurt = {"schema": 1, "title": "<b>x</b>", "runs": [{**made["runs"][0], "method": "<i>", "snapshots": []}]}
    page = report.build(hurt, tmp_path).read_text()
    assert "<b>x" not in page and "<i>" not in page


def test_an_empty_report_is_still_a_page(tmp_path):
    assert "Terms" in report.build({"schema": 1}, tmp_path).read_text()


def test_merging_joins_runs_and_refuses_two_filters(made):
    a = {"schema": 1, "title": "a", "runs": made["runs"][:2], "tables": {"t": 1}}
    b = {"schema": 1, "title": "b", "runs": made["runs"][2:], "filter": {"x": 1}}
    whole = report.merge([a, b])
    assert whole["title"] == "a" and len(whole["runs"]) == len(made["runs"]) and whole["filter"]
    with pytest.raises(InlayError, match="two of the reports"):
        report.merge([b, b])
    with pytest.raises(InlayError, match="table 't'"):
        report.merge([a, {**a, "tables": {"t": 2}}])


def test_the_target_frame_figure_colours_each_item_by_its_change(made):
    (drawn,) = [d for d in sections.space(made) if d.name.startswith("target_frame")]
    radius, colour = np.array(drawn.twin["radius"]), np.array(drawn.twin["colour"])
    delta = radius[-1] - radius[0]
    assert (colour[delta > 1e-6] == "red").all() and (colour[delta < -1e-6] == "green").all()
    assert sum(drawn.twin["count"].values()) == len(colour)


def test_deviation_bins_that_are_empty_differ_from_those_that_are_zero():
    from inlay.knowledge.states import deviation

    d0 = np.array([0.05, 0.06, 0.55, 0.56])
    made = deviation(
        d0, [0.5, 0.5, 0.1, 0.1], [0] * 4, ["r"] * 4, lambda to, of: (d0[to], d0[to] < 0), np.linspace(0, 1, 11)
    )
    axes = figures.deviations(made).figure.axes[0]
    hatched = sum(1 for p in axes.patches if p.get_hatch())
    zeros = sum(1 for t in axes.texts if t.get_text() == "0")
    assert (hatched, zeros) == (8, 1)


def test_numbers_that_are_not_finite_become_null():
    assert plain({"a": np.array([1.0, np.nan]), "b": (float("inf"), np.float32(2))}) == {
        "a": [1.0, None],
        "b": [None, 2],
    }
