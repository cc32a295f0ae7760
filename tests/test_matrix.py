"""The generated tables name every family and method there is."""

from __future__ import annotations

import inlay
from tests.laws.zoo import FAMILIES
from tests.matrix import MARKS, ROOT


def test_the_support_matrix_is_current():
    text = (ROOT / "README.md").read_text().split(MARKS[0])[1].split(MARKS[1])[0]
    rows = [line.split("|")[1].strip() for line in text.strip().splitlines()[2:]]
    assert rows == list(inlay.METHODS)
    assert [c.strip() for c in text.strip().splitlines()[0].split("|")[2:-1]] == FAMILIES


def test_the_measured_equalities_are_current():
    text = (ROOT / "docs" / "results" / "equality.md").read_text()
    assert all(f"| {name} |" in text for name in [*inlay.METHODS, *FAMILIES])
