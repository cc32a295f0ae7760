"""The table of versions: what pyproject.toml says, what an import checks, and what it costs."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from inlay.compat import versions
from inlay.compat.versions import TESTED, VersionError, compare

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("older", "newer"),
    [("2.6", "2.10"), ("5.0.0rc1", "5.0.0"), ("5.0.0rc1", "5.0"), ("2.13.0", "2.13.1+cpu"), ("0.4.9", "0.4.9.1")],
)
def test_versions_are_ordered_as_pip_orders_them(older, newer):
    assert (compare(older, newer), compare(newer, older)) == (-1, 1)


@pytest.mark.parametrize(("a", "b"), [("2.13", "2.13.0+cpu"), ("5.0", "5.0.0"), ("2.13.0+cu130", "2.13.0")])
def test_missing_and_local_parts_do_not_count(a, b):
    assert compare(a, b) == compare(b, a) == 0


def test_the_lower_bounds_of_pyproject_are_those_of_the_table():
    text = (ROOT / "pyproject.toml").read_text()
    for tested in TESTED:
        bounds = set(re.findall(rf'"{tested.package}(?:>=|==)([\d.]+?)(?:\.\*)?"', text))
        assert bounds == {tested.oldest}, tested.package


@pytest.fixture
def fresh(monkeypatch):
    """No library has been checked yet."""
    monkeypatch.setattr(versions, "_checked", set())
    monkeypatch.delenv(versions.SILENT, raising=False)
    return lambda version: monkeypatch.setattr(versions, "installed", lambda package: version)


def test_a_library_that_is_too_old_is_refused_in_one_line(fresh):
    fresh("4.57.6")
    with pytest.raises(VersionError) as caught:
        versions.check("transformers")
    oldest = versions.RANGES["transformers"].oldest
    assert str(caught.value) == (
        f"transformers 4.57.6 is installed, Inlay needs {oldest} or newer: pip install -U 'transformers>={oldest}'"
    )


def test_an_older_python_is_refused_in_one_line(fresh, monkeypatch):
    fresh(None)
    versions.check_required()
    monkeypatch.setattr(versions, "OLDEST_PYTHON", (99, 1))
    with pytest.raises(VersionError, match=r"^this is Python 3\.[\d.rcab]+, Inlay needs Python 99\.1 or newer$"):
        versions.check_required()
    text = (ROOT / "pyproject.toml").read_text()
    assert 'requires-python = ">=3.10"' in text


def test_a_newer_one_is_announced_once_unless_silenced(fresh, monkeypatch):
    fresh("99.1")
    with pytest.warns(UserWarning, match="not yet tested with peft 99.1 .*INLAY_UNTESTED=1"):
        versions.check("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.check("peft")
        monkeypatch.setenv(versions.SILENT, "1")
        versions.check("trl")
        fresh(None)
        versions.check("gradio")  # not installed: whoever needs it says so


def test_importing_inlay_checks_what_it_needs_and_loads_none_of_it(tmp_path):
    about = tmp_path / "transformers-4.40.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.40.0\n")
    code = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}]\n"
    heavy = "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    fine = subprocess.run([sys.executable, "-c", f"{code}import inlay\n{heavy}"], capture_output=True, text=True)
    assert (fine.returncode, fine.stdout.strip()) == (0, "[]"), fine.stderr
    old = subprocess.run(
        [sys.executable, "-c", f"{code}sys.path[:0] = [{str(tmp_path)!r}]\nimport inlay"],
        capture_output=True,
        text=True,
    )
    assert old.returncode == 1
    assert "VersionError: transformers 4.40.0 is installed, Inlay needs" in old.stderr.strip().splitlines()[-1]
