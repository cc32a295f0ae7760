"""Real examples, for a base whose tokenizer and weights are real; recorded lengths (`lengths`) for all others."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.bases import REAL, llama
from benchmarks.lengths import COUNT, CUTOFF, Row, rows, typical

TASKS = {"math": ("math_data",), "commonsense": ("boolq", "arc_easy", "obqa"), "mawps": ("mawps",)}
"""Training sets of a folder in LLM-Adapters' layout: those of `lengths.json`, and MAWPS, whose answers are short."""


def examples(size: str, kind: str, count: int, data: Path | None = None) -> tuple[list[Row], str]:
    """`count` examples, and what they are: texts of `data` if the base is real and has such texts, else recorded
    lengths with random ids. ValueError for a kind that is neither recorded nor found."""
    if data is not None and size in REAL and kind in TASKS:
        from inlay.models.base import load_tokenizer

        return encoded(kind, data, load_tokenizer(size))[:count], "real texts"
    if kind not in CUTOFF:
        raise ValueError(f"no lengths are recorded for {kind!r}: give --data and one of {', '.join(REAL)} as --size")
    return rows(kind, count, llama(size, device="meta").config.vocab_size), "recorded lengths, random ids"


def encoded(kind: str, data: Path, tokenizer: Any) -> list[Row]:
    """A sample of real examples behind LLM-Adapters' template, the answers learned; typical batches come first."""
    from inlay.tasks import load, protocols, templates

    protocol = replace(protocols.CLEAN, train=templates.PUBLISHED_DEMO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that a file lacks or that do not fit: a sample is taken anyway
        records = [r for task in TASKS[kind] for r in load(task, "train", data)]
    chosen = random.Random(0).sample(records, min(COUNT, len(records)))
    made = [protocols.encode(r, tokenizer, protocol, CUTOFF.get(kind, 256)) for r in chosen]
    # `typical` orders (prompt, answer, beginnings): the last of these carries the example's place here
    return [Row(made[i].input_ids, made[i].labels) for _, _, (i,) in typical(_measures(made))]


def _measures(made: Sequence[Any]) -> list[tuple[int, int, list[int]]]:
    learned = [sum(x != -100 for x in e.labels) for e in made]
    return [(len(e.input_ids) - n, n, [i]) for i, (e, n) in enumerate(zip(made, learned, strict=True))]


def write(examples: Sequence[Row], file: Path) -> None:
    """For processes that are to hold nothing but the examples: no tokenizer, no data set."""
    file.write_text(json.dumps([asdict(e) for e in examples]))


def read(file: Path) -> list[Row]:
    """What `write` wrote."""
    return [Row(**e) for e in json.loads(file.read_text())]
