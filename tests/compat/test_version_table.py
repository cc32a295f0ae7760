"""The table and scripts of `make test-versions`: what they name exists, and reports are counted right."""

from __future__ import annotations

import re
import sys

import pytest

from inlay.compat.versions import TESTED
from tests.conftest import ROOT


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    for name in ("version_table", "versions_page", "test_versions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import test_versions
    import version_table
    import versions_page

    yield version_table, versions_page, test_versions
    for name in ("version_table", "versions_page", "test_versions"):
        sys.modules.pop(name, None)


def test_the_table_names_what_there_is(scripts):
    table, _, _ = scripts
    names = [e.name for e in table.ENVIRONMENTS]
    assert len(set(names)) == len(names) and {"oldest", "newest", "lock-3.10", "lock-3.13"} <= set(names)
    assert all((ROOT / test).exists() for test in table.CONTRACT)
    for bounds in TESTED:
        assert any(e.pins.get(bounds.package) == bounds.oldest for e in table.ENVIRONMENTS)
        assert any(e.pins.get(bounds.package) == bounds.newest for e in table.ENVIRONMENTS)


@pytest.mark.parametrize(
    ("installed", "bound", "equal"),
    [("2.6.0+cu124", "2.6", True), ("5.0.0", "5.0", True), ("2.16.0", "2.1", False), (None, "1.0", False)],
)
def test_an_installed_version_is_its_bound_without_zeros_and_builds(scripts, installed, bound, equal):
    assert scripts[1].same(installed, bound) is equal


def test_a_report_without_a_passed_test_is_a_failure(scripts, tmp_path):
    report = tmp_path / "report.xml"
    case = '<testcase classname="tests.a.test_b" name="test_{}">{}</testcase>'
    body = case.format("c", '<failure message="AssertionError: 1&#10; != 2"/>') + case.format("d", "")
    body += case.format("e", '<skipped message="needs a part"/>') + case.format("f", '<error message="no fixture"/>')
    report.write_text(f"<testsuites><testsuite>{body}</testsuite></testsuites>")
    counted = scripts[2].count(report)
    assert {k: counted[k] for k in ("outcome", "passed", "failed", "skipped")} == {
        "outcome": "failed", "passed": 1, "failed": 2, "skipped": 1
    }  # fmt: skip
    assert counted["failures"]["tests/a/test_b.py::test_c"] == "AssertionError: 1 != 2"
    report.write_text("<testsuites><testsuite/></testsuites>")
    assert scripts[2].count(report)["outcome"] == "failed"


def test_the_lock_holds_what_the_ranges_allow_and_no_place_to_fetch_from():
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    assert "://" not in lock and "+" not in lock
    from inlay.compat.versions import compare

    for bounds in TESTED:
        found = re.findall(rf"^{bounds.package.replace('_', '.')}==([\w.]+)", lock, flags=re.MULTILINE)
        assert found and all(compare(bounds.oldest, v) <= 0 <= compare(bounds.newest, v) for v in found), bounds
