"""Scoring generations: predictions, accuracy with its interval, and how often a model gave no answer at all.

A generation is a mapping with `text` (what the model said) and, optionally, `label` (gold answer), `index`,
`truncated`, and whatever fields name its run (`adapter`, `dataset`, ...). Files hold one JSON object a line, plain or
`.gz`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.errors import InlayError
from inlay.tasks import protocols, table
from inlay.tasks.extract import normalise
from inlay.tasks.loading import load, read_rows
from inlay.tasks.protocols import Protocol
from inlay.tasks.task import Kind, Task

if TYPE_CHECKING:
    from rich.table import Table

MISS = 0.001
"""Two numbers this close are equal (LLM-Adapters' `evaluate.py`)."""
_NONE: dict[Kind, str] = {"number": "inf", "letter": "", "choice": "", "text": ""}


@dataclass(frozen=True)
class Prediction:
    """One generation, judged."""

    index: int
    """Position of the record in its data set."""
    prediction: str
    """What was extracted; without an answer `inf` for numbers and an empty text otherwise (as LLM-Adapters does)."""
    label: str
    """The gold answer."""
    correct: bool
    """Whether they are equal."""
    answered: bool
    """Whether anything was extracted."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """Accuracy of one set of generations on one task under one protocol."""

    task: str
    """Name of the task."""
    protocol: str
    """Name of the protocol whose extraction was used."""
    group: Mapping[str, str] = field(default_factory=dict)
    """Which generations of the file these are (`{"adapter": "lora"}`)."""
    n: int
    """Generations scored."""
    expected: int | None
    """Records of the published test split; None where unknown. Below it, `n` is a partial score."""
    correct: int
    """How many are right."""
    no_answer: int
    """How many gave no answer (they count as wrong)."""
    truncated: int | None
    """How many were cut at the token limit; None where the generations do not say."""
    predictions: tuple[Prediction, ...] = field(repr=False)
    """One per generation, in file order."""

    @property
    def accuracy(self) -> float:
        """Percent correct, not rounded."""
        return 100.0 * self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy, in percent."""
        return wilson(self.correct, self.n)

    def to_json(self, predictions: bool = True) -> dict[str, Any]:
        """Everything as plain JSON values; `predictions=False` leaves the single predictions out."""
        low, high = self.interval
        out: dict[str, Any] = {
            "task": self.task,
            "protocol": self.protocol,
            **({"group": dict(self.group)} if self.group else {}),
            "n": self.n,
            "expected": self.expected,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "interval": [low, high],
            "no_answer": self.no_answer,
            "truncated": self.truncated,
        }
        return {**out, "predictions": [asdict(p) for p in self.predictions]} if predictions else out


def wilson(correct: int, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent (Wilson 1927, JASA 22, eq. for p; z = 1.96 gives 95 %)."""
    if n < 1 or not 0 <= correct <= n:
        raise InlayError(f"{correct} correct of {n}: no interval")
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return 100.0 * max(0.0, middle - half), 100.0 * min(1.0, middle + half)


def equal(prediction: str, label: str, kind: Kind) -> bool:
    """Whether a prediction is the gold answer: numbers within 0.001, free text normalised, the rest exactly."""
    if kind == "number":
        return abs(float(prediction) - float(label)) <= MISS
    return normalise(prediction) == normalise(label) if kind == "text" else prediction == label


def score(
    generations: Iterable[Mapping[str, Any] | str],
    task: str | Task,
    protocol: str | Protocol,
    source: str | Path | None = None,
    group: Mapping[str, str] | None = None,
) -> Score:
    """Score generations of one task.

    generations: mappings with `text`, or the texts alone; without `index` they are records 0, 1, 2, ...
    source: where the gold answers are (as in `load`), for generations without `label`.

    Raises InlayError, naming the position, for a missing text or label, a label the task cannot have, and an index that
    occurs twice.
    """
    task, protocol = table.get(task), protocols.get(protocol)
    rows = [row if isinstance(row, Mapping) else {"text": row} for row in generations]
    if not rows:
        raise InlayError(f"{task.name}: no generations to score")
    gold = _gold(rows, task, source)
    judged: list[Prediction] = []
    seen: dict[int, str] = {}
    for position, row in enumerate(rows):
        at = str(row.get("_at", f"generation {position}"))
        index = _index(row, position, at)
        if index in seen:
            raise InlayError(
                f"{at}: index {index} of {task.name} occurs twice (before: {seen[index]}); score one run at a time"
            )
        seen[index] = at
        judged.append(_judge(row, index, gold, task, protocol, at))
    flags = [row["truncated"] for row in rows if "truncated" in row]
    return Score(
        task=task.name,
        protocol=protocol.name,
        group=group or {},
        n=len(judged),
        expected=task.sizes.get("test"),
        correct=sum(p.correct for p in judged),
        no_answer=sum(not p.answered for p in judged),
        truncated=sum(map(bool, flags)) if len(flags) == len(rows) else None,
        predictions=tuple(judged),
    )


def _gold(rows: Sequence[Mapping[str, Any]], task: Task, source: str | Path | None) -> list[str] | None:
    if all("label" in row for row in rows):
        return None
    if source is None:
        raise InlayError(
            f"{task.name}: generations without 'label'; pass source=<file or folder> that holds the answers"
        )
    return [record.answer for record in load(task, "test", source)]


def _index(row: Mapping[str, Any], position: int, at: str) -> int:
    index = row.get("index", position)
    if isinstance(index, bool) or not isinstance(index, int):
        raise InlayError(f"{at}: 'index' must be a whole number, it is {index!r}")
    return index


def _judge(
    row: Mapping[str, Any], index: int, gold: list[str] | None, task: Task, protocol: Protocol, at: str
) -> Prediction:
    text = row.get("text")
    if not isinstance(text, str):
        raise InlayError(
            f"{at}: 'text' is {'missing' if text is None else type(text).__name__}; it has {', '.join(sorted(row))}"
        )
    label = _label(row, index, gold, task, at)
    found = protocol.extract(text, task.kind, task.answers)
    said = _NONE[task.kind] if found is None else found
    return Prediction(index, said, label, found is not None and equal(said, label, task.kind), found is not None)


def _label(row: Mapping[str, Any], index: int, gold: list[str] | None, task: Task, at: str) -> str:
    if "label" in row:
        label = row["label"]
    elif gold is not None and 0 <= index < len(gold):
        label = gold[index]
    else:
        raise InlayError(f"{at}: index {index}, but the source has {len(gold or ())} answers")
    label = str(label).lower() if isinstance(label, bool) else str(label)
    if task.kind == "number":
        try:
            float(label)
        except ValueError:
            raise InlayError(f"{at}: label {label!r} is no number, as {task.name} needs") from None
    elif task.answers and label not in task.answers:
        raise InlayError(f"{at}: label {label!r}; {task.name} has {', '.join(task.answers)}")
    return label


# ------------------------------------------------------------------------------------------------ files


def read_generations(path: str | Path) -> list[dict[str, Any]]:
    """The generations of a `.jsonl`, `.jsonl.gz` or `.json` file; each row also gets `_at`, its file and line.

    Raises InlayError with the line for whatever does not fit.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    for number, row in read_rows(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            what = f"fields {', '.join(sorted(row))}" if isinstance(row, dict) else type(row).__name__
            raise InlayError(f"{path}, line {number}: an object with a 'text' is needed, this has {what}")
        rows.append({**row, "_at": f"{path}, line {number}"})
    if not rows:
        raise InlayError(f"{path} holds no generations")
    return rows


def score_file(
    path: str | Path,
    task: str | Task | None = None,
    protocol: str | Protocol = "clean",
    by: Sequence[str] | None = None,
    source: str | Path | None = None,
) -> list[Score]:
    """Score a file: one Score per task and per value of the fields in `by`, in the order they first occur.

    task: only rows whose `dataset` is this task, or all rows where none has a `dataset`. None: every data set of the
    file. by: fields that tell runs apart; None takes `adapter` where every row has it.
    """
    rows = read_generations(path)
    if by is None:
        by = ("adapter",) if all("adapter" in row for row in rows) else ()
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        lacking = [name for name in by if name not in row]
        if lacking:
            raise InlayError(
                f"{row['_at']}: no field {lacking[0]!r} to group by; it has {', '.join(sorted(set(row) - {'_at'}))}"
            )
        key = (_task_name(row, task), *(str(row[name]) for name in by))
        groups.setdefault(key, []).append(row)
    wanted = None if task is None else table.get(task).name
    kept = {key: rows for key, rows in groups.items() if wanted in (None, key[0])}
    if not kept:
        raise InlayError(
            f"{path} has no generations of {wanted}; it has {', '.join(sorted({key[0] for key in groups}))}"
        )
    return [
        score(rows, name, protocol, source, dict(zip(by, values, strict=True)))
        for (name, *values), rows in kept.items()
    ]


def _task_name(row: Mapping[str, Any], task: str | Task | None) -> str:
    """Name of the task a row belongs to: its `dataset` (as it stands where that is no task), else the one asked for."""
    if "dataset" in row:
        found = table.find(str(row["dataset"]))
        if found is None and task is None:
            raise InlayError(f"{row['_at']}: data set {row['dataset']!r} is no task; pass task=<name>")
        return found.name if found else str(row["dataset"])
    if task is None:
        raise InlayError(f"{row['_at']}: no field 'dataset'; pass task=<name>")
    return table.get(task).name


def render(scores: Sequence[Score]) -> Table:
    """The scores as a table for the terminal."""
    from rich.table import Table

    out = Table(title="accuracy, %")
    for name in ("task", "run", "protocol"):
        out.add_column(name)
    for name in ("n", "accuracy", "95 % interval", "no answer", "truncated"):
        out.add_column(name, justify="right")
    for one in scores:
        low, high = one.interval
        n = str(one.n) if one.expected in (None, one.n) else f"{one.n} of {one.expected}"
        cut = "-" if one.truncated is None else str(one.truncated)
        run = ", ".join(one.group.values()) or "-"
        out.add_row(
            one.task, run, one.protocol, n, f"{one.accuracy:.1f}", f"{low:.1f}-{high:.1f}", str(one.no_answer), cut
        )
    return out
