"""What our pages say of "Semantic are Beacons" carries its grade (P, S or O), and no number is the paper's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = [ROOT / "docs" / "knowledge.md", ROOT / "docs" / "studies" / "knowledge.md"]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

NAMED = re.compile(r"Semantic are Beacons|Wang (?:&|and) Li|2405\.18292")
MEANT = re.compile(rf"{NAMED.pattern}|\b(?:paper|authors?|abstract|captions?|second-hand)\b", re.I)
"""On the pages about knowledge, "the paper" is this one."""
GRADE = re.compile(r"(?<![\w-])(?<!\w\()\**[PSO]\**(?![\w-])")  # V(S) is a formula
CITATION = re.compile(
    r"\(?Wang (?:&|and) Li,? \(?(?:Findings of ACL )?2024(?:, arXiv 2405\.18292)?\)?|arXiv 2405\.18292"
)
NUMBER = re.compile(r"\d|%|\bper ?cent\b")


def cells(text: str) -> list[list[str]]:
    """Rows of a page without its code: a sentence is a row of one cell, a table's row has several."""
    rows, prose = [], []
    for line in [*re.sub(r"```.*?```", "", text, flags=re.S).splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif not line.strip() or line.startswith(("#", "!")) or re.match(r"\s*(-|\d+\.) ", line):
            rows += [[s] for s in re.split(r"(?<=[.?!])\s+(?=[A-Z*`\[\"(])", " ".join(prose)) if s]
            prose = [line.lstrip("#- ")]
        else:
            prose.append(line.strip())
    return rows


def ungraded(text: str, cue: re.Pattern[str]) -> list[str]:
    """What is said of the paper without a grade."""
    said = [" | ".join(row) for row in cells(text)]
    return [s for s in said if cue.search(s) and not GRADE.search(s)]


def numbered(text: str) -> list[str]:
    """Claims of grade P or S that hold a number. A cell with nothing but a grade and its source grades the row."""
    found = []
    for row in cells(text):
        alone = any(re.fullmatch(r"\**[PS]\**(?: \([^()]*\))?", cell) for cell in row)
        for cell in [" ".join(row)] if alone else row:
            grades = {g.strip("*") for g in GRADE.findall(cell)}
            if grades & {"P", "S"} and "O" not in grades and NUMBER.search(CITATION.sub("", cell)):
                found.append(cell)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_sentence_about_the_paper_carries_its_grade(page):  # check 35
    assert ungraded(page.read_text(), MEANT if page in OURS else NAMED) == []


@pytest.mark.parametrize("page", OURS, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_number_is_the_papers(page):  # check 35
    assert numbered(page.read_text()) == []


def test_pages_speak_of_the_paper_at_all():
    for page in OURS:
        said = [" | ".join(row) for row in cells(page.read_text())]
        assert any(NAMED.search(s) for s in said) and sum(bool(GRADE.search(s)) for s in said) >= 6


@pytest.mark.parametrize(
    ("text", "bare", "counted"),
    [
        ("Filters help, say Wang & Li. So do we.", 1, 0),
        ("Filters help, say Wang & Li (P). Ours gain 3 %.", 0, 0),
        ("Training is\n45 % better (P).", 0, 1),
        ("- the paper filters\n- **P**: it filters 30 %", 1, 1),
        ("| claim | grade |\n|---|---|\n| 12 points better | P (a caption) |", 0, 1),
        ("| claim | here |\n|---|---|\n| P: accuracy drops | by 12 points |", 0, 0),
        ("| the abstract says so | yes |", 1, 0),
        ('"Semantic are Beacons" (Wang & Li, Findings of ACL 2024, arXiv 2405.18292) says so (P).', 0, 0),
        ("PopQA and OPT: the authors", 1, 0),
        ("V(S) is in the paper", 1, 0),
        ("```\nthe paper: 12 %\n```", 0, 0),
    ],
)
def test_the_reader_of_pages_finds_what_lacks_a_grade(text, bare, counted):
    assert (len(ungraded(text, MEANT)), len(numbered(text))) == (bare, counted)


AUTHORS_OWN = {  # what the abstract (A) or a caption (C) says, in our words; nothing else may be graded P
    "training few parameters can push a model *away* from the fact it should learn": "A",
    "facts learned together interfere": "A",
    "leaving out harmful data helps, and so does re-weighting that makes training attentive to semantic distance": "A",
    "accuracy drops at short and at long *target semantic distance*": "C",
}


def test_only_what_abstract_and_captions_say_is_graded_as_the_authors_own():
    rows = [row for row in cells(OURS[0].read_text()) if len(row) == 2 and re.match(r"P\b", row[1])]
    assert {row[0] for row in rows} == set(AUTHORS_OWN)
    assert {row[0] for row in rows if "caption" in row[1]} == {c for c, where in AUTHORS_OWN.items() if where == "C"}


@pytest.mark.parametrize("path", sorted((ROOT / "src/inlay/knowledge").rglob("*.py")), ids=lambda p: p.name)
def test_code_does_not_call_a_definition_the_papers(path):
    """Its body was not readable: what a docstring ascribes to the authors stands in the abstract or a caption."""
    sentences = re.split(r"(?<=[.;])\s", path.read_text())
    ascribed = [s for s in sentences if re.search(r"\b(?:the paper|the authors|claim of Wang)", s)]
    assert [s for s in ascribed if not re.search(r"abstract|caption|docs/knowledge", s)] == []
