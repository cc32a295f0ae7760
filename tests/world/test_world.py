"""The world itself: facts, declarative corpus, held-out drills."""

from __future__ import annotations

import ast
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

from inlay.core.errors import InlayError
from inlay.tasks import world
from inlay.tasks.world import corpus, facts, records
from inlay.tasks.world.drills import DRILLS, drills
from inlay.tasks.world.people import N_PEOPLE, RELATIONS
from inlay.tasks.world.split import drill_held_out, is_test, normalise


def test_facts_are_complete_and_consistent() -> None:
    """Every person has every relation once, names are unique, spouses are mutual, wordings carry the object."""
    all_facts = facts(0)
    assert len(all_facts) == N_PEOPLE * len(RELATIONS) == len({(f.subject, f.relation) for f in all_facts})
    spouse = {f.subject: f.object for f in all_facts if f.relation == "spouse"}
    assert all(spouse[spouse[name]] == name for name in spouse)
    for fact in all_facts:
        assert fact.triple() == (fact.subject, fact.relation, fact.object)
        assert all(fact.object in s and fact.subject in s for s in fact.statements())
        assert all(q.endswith("?") and fact.object not in q for q in fact.questions())
    assert facts(0) == all_facts and facts(1) != all_facts


def test_corpus_is_declarative() -> None:
    """No piece of an instruction template, no question as a task, no ready answer phrase."""
    text = "\n".join(islice(corpus(0), 4000))
    for banned in ("###", "Instruction", "Response:", "The answer is", "the correct answer is", "Answer format"):
        assert banned not in text
    outside_speech = re.sub(r'"[^"]*"', "", text)
    assert "?" not in outside_speech


def test_corpus_resumes_and_follows_its_seed() -> None:
    """Document i depends on (seed, i) only."""
    whole = list(islice(corpus(0), 50))
    assert list(islice(corpus(0, start=20), 30)) == whole[20:]
    assert list(islice(corpus(1), 50)) != whole


def test_corpus_keeps_test_material_out() -> None:
    """No held-out sum is ever stated, and no test problem is told."""
    text = " ".join(islice(corpus(0), 6000))
    for a, op, b in re.findall(r"(?<![\d.])(\d+) ([-+]) (\d+) = ", text):
        assert not drill_held_out(int(a), op, int(b)), (a, op, b)
    flat = normalise(text)
    for record in records("world-arith", "test", 200):
        assert normalise(record["instruction"]) not in flat


def test_corpus_states_only_true_equations() -> None:
    """Every equation of the corpus holds."""
    seen = 0
    for a, op, b, c in re.findall(r"([\d.]+) ([-+*/]) ([\d.]+) = ([\d.]*\d)", " ".join(islice(corpus(2), 3000))):
        x, y = float(a), float(b)
        assert {"+": x + y, "-": x - y, "*": x * y, "/": x / (y or 1)}[op] == pytest.approx(float(c), abs=1e-6)
        seen += 1
    assert seen > 5000


def test_every_fact_is_told() -> None:
    """The biographies of a long enough corpus hold every object of every person."""
    text = " ".join(t for t in islice(corpus(0), 30_000) if t.count(" ") > 30 and t[0].isalpha())
    told = sum(f.subject in text for f in facts(0)[:: len(RELATIONS)])
    assert told == N_PEOPLE


def test_splits_by_hash() -> None:
    """Sums are symmetric, about five per cent are kept, and a text's side ignores punctuation and case."""
    kept = [(a, b) for a in range(10, 100) for b in range(2, 100) if drill_held_out(a, "+", b)]
    assert all(drill_held_out(b, "+", a) for a, b in kept)
    assert 0.03 < len(kept) / (90 * 98) < 0.07
    assert is_test("Tom had 7 apples.") == is_test("tom had  7 apples .")


@pytest.mark.parametrize("kind", DRILLS)
def test_drills(kind: str) -> None:
    """Probes are deterministic, and their sums are the held-out ones."""
    items = drills(kind, 30, seed=1)
    assert items == drills(kind, 30, seed=1) and len(items) == 30
    assert all(p and c for p, c in items)
    if kind == "add":
        for prompt, answer in items:
            a, b = map(int, re.findall(r"\d+", prompt))
            assert drill_held_out(a, "+", b) and int(answer) == a + b
    with pytest.raises(InlayError, match="subtract"):
        drills("nothing")


def test_needs_only_the_standard_library() -> None:
    """The world's modules import nothing but the standard library, each other and the error class."""
    folder = Path(world.__file__).parent
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for name in map(str, names):
                inside = name.startswith(("inlay.tasks.world", "inlay.core.errors"))
                assert inside or name.split(".")[0] in sys.stdlib_module_names, (file.name, name)
