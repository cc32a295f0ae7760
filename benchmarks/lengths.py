"""Lengths of real examples in tokens and what they begin with alike, so that benchmarks need no data files.

    python -m benchmarks.lengths DATA      writes lengths.json from a folder in LLM-Adapters' layout

A token is counted as four characters and a digit as one, near what LLaMA's tokenizer makes of English (it splits
numbers into digits: Touvron et al. 2023, arXiv:2302.13971). `math` and `commonsense` are real files, behind
LLM-Adapters' template, which all prompts share; questions of one data set share some words more. `alpaca` is drawn
(log-normal) to have the supervised share (79 %) and padding (x 1.7 in batches of 8) of instruction data of that kind,
and shares nothing.

A benchmark times a few batches of 8. Few batches taken as they come may hold far more padding than the data have, which
would flatter whoever does not compute padding; so the file is ordered with typical batches first (`typical`).
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from typing import Any

from benchmarks.choice import FRAME
from inlay.engine.shared import tree

FILE = Path(__file__).with_name("lengths.json")
COUNT = 512
BATCH = 8
TOKEN = 4
"""Characters."""
CUTOFF = {"math": 256, "commonsense": 256, "alpaca": 512}


@dataclass(frozen=True)
class Row:
    """Random ids of a real length."""

    input_ids: list[int]
    labels: list[int]


def computed(batch: Sequence[Row]) -> int:
    """Tokens of a batch, those of shared beginnings counted once."""
    return tree([r.input_ids for r in batch], [r.labels for r in batch]).tokens


Measure = tuple[int, int, list[int]]
"""Tokens of the prompt and of the answer, and which beginnings the prompt has, one after another."""


def rows(kind: str, count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Examples of random ids with the lengths and shared beginnings of this kind; the prompt is not learned."""
    draw = random.Random(seed)
    held = json.loads(FILE.read_text())[kind]
    beginnings = [[draw.randrange(3, vocabulary) for _ in range(n)] for n in held["beginnings"]]
    made = []
    for prompt, answer, begins in held["rows"][:count]:
        ids = [t for b in begins for t in beginnings[b]]
        ids += [draw.randrange(3, vocabulary) for _ in range(prompt + answer - len(ids))]
        made.append(Row(ids, [-100] * prompt + ids[prompt:]))
    return made


def padding(measures: Sequence[Measure]) -> float:
    """Columns of batches of 8 over tokens."""
    whole = [prompt + answer for prompt, answer, _ in measures]
    cut = [whole[i : i + BATCH] for i in range(0, len(whole), BATCH)]
    return sum(max(b) * len(b) for b in cut) / sum(whole)


def typical(measures: Sequence[Measure]) -> list[Measure]:
    """The same examples in the same batches of 8, those first whose padding is nearest that of all."""
    whole = padding(measures)
    cut = [measures[i : i + BATCH] for i in range(0, len(measures), BATCH)]
    return [measure for b in sorted(cut, key=lambda b: abs(padding(b) - whole)) for measure in b]


def about(examples: Sequence[Row], batch: int) -> str:
    """Supervised share, padding and shared beginnings of these examples in batches."""
    tokens = sum(len(e.input_ids) for e in examples)
    padded = sum(
        max(len(e.input_ids) for e in examples[i : i + batch]) * len(examples[i : i + batch])
        for i in range(0, len(examples), batch)
    )
    learned = sum(x != -100 for e in examples for x in e.labels)
    once = sum(computed(examples[i : i + batch]) for i in range(0, len(examples), batch))
    share = f", {100 * (1 - once / tokens):.0f} % in shared beginnings" if once < tokens else ""
    return f"{100 * learned / tokens:.0f} % supervised, padding x {padded / tokens:.2f}{share}"


def main(data: Path) -> None:
    draw = random.Random(0)

    def tokens(text: str) -> int:
        digits = len(re.findall(r"\d", text))
        return max(1, digits - (digits - len(text)) // TOKEN)

    found: dict[str, Any] = {}
    for kind, names in {
        "math": ("math_data",),
        "commonsense": ("boolq/train", "ARC-Easy/train", "openbookqa/train"),
    }.items():
        records = [(n, r) for n in names for r in json.loads((data / f"{n}.json").read_text())]
        starts = {n: commonprefix([r["instruction"] for name, r in records if name == n]) for n in names}
        said = ["", *dict.fromkeys(t for t in starts.values() if len(t) >= TOKEN)]
        before = FRAME.partition("{}")[0]
        ends = [len(before + t) // TOKEN for t in said]
        chosen = draw.sample(records, COUNT)
        measures = []
        for name, r in chosen:
            prompt, answer = tokens(" " * (len(FRAME) - 2) + r["instruction"]), tokens(r["output"])
            begins = [0, said.index(starts[name])] if starts[name] in said[1:] else [0]
            if prompt < CUTOFF[kind] - 1:
                measures.append((prompt, min(answer, CUTOFF[kind] - prompt), begins))
        found[kind] = {"beginnings": [ends[0], *(n - ends[0] for n in ends[1:])], "rows": typical(measures)}
    drawn = []
    for _ in range(COUNT):
        whole = min(CUTOFF["alpaca"], max(12, round(draw.lognormvariate(4.85, 0.43))))
        prompt = max(4, round(whole * draw.uniform(0.12, 0.3)))
        drawn.append((prompt, whole - prompt, []))
    found["alpaca"] = {"beginnings": [], "rows": typical(drawn)}
    FILE.write_text(json.dumps(found) + "\n")
    for kind in found:
        print(kind, about(rows(kind, COUNT, 100), BATCH), "| first four batches:", about(rows(kind, 32, 100), BATCH))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
