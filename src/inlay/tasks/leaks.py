"""Leak report: which test questions stand in a training set, word for word or nearly so.

Normalisation: Unicode-folded, lower case, and the runs of letters and digits alone, one blank between them; so blanks,
punctuation, currency signs and tokenised apostrophes are nothing. Near duplicates agree once every number is masked.
Optionally a test question also counts where most of its n-grams occur in the training set (Brown et al. 2020, appendix
C, uses n = 13).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError
from inlay.tasks.loading import read_rows
from inlay.tasks.task import Record

if TYPE_CHECKING:
    from rich.table import Table

_WORD = re.compile(r"[^\W_]+")
_FIELDS = ("instruction", "original_text", "question", "sQuestion", "question_stem", "sentence", "goal", "Problem")
_DIGITS = re.compile(r"\d+(?: \d+)*")


@dataclass(frozen=True)
class Match:
    """One leaked question."""

    test_index: int
    """Its place in the test set."""
    train_index: int
    """The first training record that has it."""
    test: str
    """The test question, as it stands."""
    train: str
    """The training question, as it stands."""


@dataclass(frozen=True, kw_only=True)
class Leak:
    """What one test set shares with the training set."""

    name: str
    """Name of the test set."""
    n: int
    """Its records."""
    distinct: int
    """Its distinct questions after normalisation."""
    exact: int
    """Records whose normalised question stands in the training set."""
    exact_distinct: int
    """As `exact`, each question counted once."""
    near: int
    """Further records that agree with a training question once numbers are masked."""
    contained: int | None
    """Further records most of whose n-grams stand in the training set; None where this was not asked for."""
    exact_examples: tuple[Match, ...]
    """The first exact matches."""
    near_examples: tuple[Match, ...]
    """The first near matches."""


@dataclass(frozen=True)
class LeakReport:
    """Every test set against one training set."""

    train_n: int
    """Training records."""
    train_distinct: int
    """Distinct training questions after normalisation."""
    sets: tuple[Leak, ...]
    """One entry per test set."""

    def __getitem__(self, name: str) -> Leak:
        for leak in self.sets:
            if leak.name == name:
                return leak
        raise InlayError(f"no test set {name!r} in this report; it has {', '.join(leak.name for leak in self.sets)}")

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def table(self) -> Table:
        """The report as a table for the terminal."""
        from rich.table import Table

        out = Table(title=f"overlap with {self.train_n} training records ({self.train_distinct} distinct)")
        out.add_column("test set")
        for name in ("n", "exact", "exact, distinct", "numbers masked", "n-grams", "leaked %"):
            out.add_column(name, justify="right")
        for leak in self.sets:
            share = 100 * (leak.exact + leak.near + (leak.contained or 0)) / leak.n
            grams = "-" if leak.contained is None else str(leak.contained)
            distinct = f"{leak.exact_distinct} of {leak.distinct}"
            out.add_row(leak.name, str(leak.n), str(leak.exact), distinct, str(leak.near), grams, f"{share:.1f}")
        return out


def normalise(text: str) -> str:
    """The words and digit runs of a text, folded and separated by one blank."""
    return " ".join(_WORD.findall(unicodedata.normalize("NFKC", text).casefold()))


def masked(normal: str) -> str:
    """A normalised text with every run of numbers replaced by `#`."""
    return _DIGITS.sub("#", normal)


def report(
    train: Sequence[Record | str],
    test: Sequence[Record | str] | Mapping[str, Sequence[Record | str]],
    ngram: int | None = None,
    threshold: float = 0.8,
    examples: int = 3,
) -> LeakReport:
    """Overlap of `train` with each test set.

    test: records, or several sets by name. ngram: also count records at least `threshold` of whose n-grams of words
    occur in the training set. examples: how many matches of each sort are kept per set.
    """
    if not train:
        raise InlayError("no training records to look into")
    if ngram is not None and ngram < 1 or not 0 < threshold <= 1:
        raise InlayError(f"ngram {ngram}, threshold {threshold}: n from 1 on and a share in (0, 1] are needed")
    sets = test if isinstance(test, Mapping) else {"test": test}
    index = _Index([_question(r) for r in train], ngram)
    leaks = tuple(index.leak(name, [_question(r) for r in rows], threshold, examples) for name, rows in sets.items())
    return LeakReport(len(train), len(index.exact), leaks)


def read_questions(path: str | Path) -> list[str]:
    """Every question of a data file, whatever its form, so that no row escapes the report.

    `load` leaves out rows it cannot learn from (MAWPS's unsolved equations); a leak report must see those, too. Raises
    InlayError, naming file and record, where a row has none of the known question fields.
    """
    questions = []
    for place, row in read_rows(Path(path)):
        name = next((n for n in _FIELDS if isinstance(row, dict) and isinstance(row.get(n), str)), None)
        if name is None:
            raise InlayError(f"{path}, record {place}: no question; one of the fields {', '.join(_FIELDS)} is needed")
        questions.append(_question(Record(row[name], row.get("input") or "")))
    return questions


def _question(record: Record | str) -> str:
    if isinstance(record, str):
        return record
    return f"{record.instruction}\n{record.input}" if record.input else record.instruction


def _grams(normal: str, n: int) -> set[int]:
    words = normal.split()
    return {hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1))}


class _Index:
    """The training questions, by normalised text, by masked text and by n-gram."""

    def __init__(self, texts: list[str], ngram: int | None) -> None:
        self.texts, self.ngram = texts, ngram
        self.exact: dict[str, int] = {}
        self.near: dict[str, int] = {}
        for i, text in enumerate(texts):
            normal = normalise(text)
            self.exact.setdefault(normal, i)
            self.near.setdefault(masked(normal), i)
        self.grams: set[int] = set().union(*(_grams(t, ngram) for t in self.exact)) if ngram else set()

    def leak(self, name: str, texts: list[str], threshold: float, examples: int) -> Leak:
        if not texts:
            raise InlayError(f"test set {name!r} is empty")
        normals = [normalise(t) for t in texts]
        exact = [i for i, t in enumerate(normals) if t in self.exact]
        rest = [i for i, t in enumerate(normals) if t not in self.exact]
        near = [i for i in rest if masked(normals[i]) in self.near]
        seen = set(near)
        contained = None
        if self.ngram:
            contained = sum(self._share(normals[i]) >= threshold for i in rest if i not in seen)

        def pairs(found: Iterable[int], where: Mapping[str, int], key: list[str]) -> tuple[Match, ...]:
            return tuple(Match(i, where[key[i]], texts[i], self.texts[where[key[i]]]) for i in list(found)[:examples])

        return Leak(
            name=name,
            n=len(texts),
            distinct=len(set(normals)),
            exact=len(exact),
            exact_distinct=len({normals[i] for i in exact}),
            near=len(near),
            contained=contained,
            exact_examples=pairs(exact, self.exact, normals),
            near_examples=pairs(near, self.near, [masked(t) for t in normals]),
        )

    def _share(self, normal: str) -> float:
        assert self.ngram is not None
        grams = _grams(normal, self.ngram)
        return len(grams & self.grams) / len(grams)
