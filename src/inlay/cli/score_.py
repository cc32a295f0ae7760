"""`inlay score`: judge saved generations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from inlay.cli.verbs import Verb

if TYPE_CHECKING:
    from inlay.tasks.score import Score


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What is scored."""

    generations: Path
    """A .jsonl or .jsonl.gz file, an object a line with `text` (what the model said) and `label` (the gold answer)."""
    task: str | None = None
    """The data set, by name or alias in any case; all data sets of the file if not given."""
    protocol: Literal["published", "clean"] = "clean"
    """How answers are extracted."""
    source: Path | None = None
    """Where the gold answers are, for generations without `label`."""
    by: tuple[str, ...] = ()
    """Fields that tell runs in one file apart (default: `adapter`, where every record has one)."""
    predictions: bool = False
    """Also print every prediction."""
    table: bool = False
    """Print a table for people instead of JSON."""


def run(s: ScoreSettings) -> None:
    """Print the score: `n`, `correct`, `accuracy` (percent), `no_answer`; and `runs`, where the file holds several."""
    from inlay.tasks.score import render, score_file

    scores = score_file(s.generations, s.task, s.protocol, s.by or None, s.source)
    if s.table:
        from rich.console import Console

        Console().print(render(scores))
    else:
        print(json.dumps(summary(scores, s.predictions)))


def summary(scores: list[Score], predictions: bool = False) -> dict[str, Any]:
    """One object: a single score as it is, several together with each in `runs`."""
    if len(scores) == 1:
        return scores[0].to_json(predictions)
    n, correct = sum(one.n for one in scores), sum(one.correct for one in scores)
    return {
        "task": scores[0].task if len({one.task for one in scores}) == 1 else None,
        "protocol": scores[0].protocol,
        "n": n,
        "correct": correct,
        "accuracy": 100.0 * correct / n,
        "no_answer": sum(one.no_answer for one in scores),
        "runs": [one.to_json(predictions) for one in scores],
    }


VERB = Verb(
    "score",
    "Score saved generations of a task under a named protocol.",
    ScoreSettings,
    run,
    (
        "inlay score --task gsm8k --protocol published --generations said.jsonl.gz",
        "inlay score --generations said.jsonl --table",
    ),
)
