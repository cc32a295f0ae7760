"""Lengths of real examples in tokens, so that benchmarks need no data files.

    python -m benchmarks.lengths DATA      writes lengths.json from a folder in LLM-Adapters' layout

A token is counted as four characters and a digit as one, near what LLaMA's tokenizer makes of English (it splits
numbers into digits: Touvron et al. 2023, arXiv:2302.13971). `math` and `commonsense` are real files; `alpaca` is drawn
(log-normal) to have the supervised share (79 %) and padding (x 1.7 in batches of 8) of instruction data of that kind.

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
from pathlib import Path

FILE = Path(__file__).with_name("lengths.json")
COUNT = 512
BATCH = 8
CUTOFF = {"math": 256, "commonsense": 256, "alpaca": 512}


@dataclass(frozen=True)
class Row:
    """Random ids of a real length."""

    input_ids: list[int]
    labels: list[int]


def rows(kind: str, count: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """Examples of random ids with the lengths of this kind; the prompt is not learned."""
    draw = random.Random(seed)
    made = []
    for prompt, answer in json.loads(FILE.read_text())[kind][:count]:
        ids = [draw.randrange(3, vocabulary) for _ in range(prompt + answer)]
        made.append(Row(ids, [-100] * prompt + ids[prompt:]))
    return made


Pair = tuple[int, int]


def padding(pairs: Sequence[Pair]) -> float:
    """Columns of batches of 8 over tokens."""
    cut = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    return sum(max(map(sum, b)) * len(b) for b in cut) / sum(map(sum, pairs))


def typical(pairs: Sequence[Pair]) -> list[Pair]:
    """The same examples in the same batches of 8, those first whose padding is nearest that of all."""
    whole = padding(pairs)
    cut = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    return [pair for b in sorted(cut, key=lambda b: abs(padding(b) - whole)) for pair in b]


def about(examples: Sequence[Row], batch: int) -> str:
    """Supervised share and padding of these examples in batches."""
    tokens = sum(len(e.input_ids) for e in examples)
    padded = sum(
        max(len(e.input_ids) for e in examples[i : i + batch]) * len(examples[i : i + batch])
        for i in range(0, len(examples), batch)
    )
    learned = sum(x != -100 for e in examples for x in e.labels)
    return f"{100 * learned / tokens:.0f} % supervised, padding x {padded / tokens:.2f}"


def main(data: Path) -> None:
    draw = random.Random(0)

    def tokens(text: str) -> int:
        digits = len(re.findall(r"\d", text))
        return max(1, digits - (digits - len(text)) // 4)

    found: dict[str, list[Pair]] = {}
    math = json.loads((data / "math_data.json").read_text())
    commonsense = [
        r for name in ("boolq", "ARC-Easy", "openbookqa") for r in json.loads((data / name / "train.json").read_text())
    ]
    frame = 150  # characters of the prompt template around an instruction
    for kind, records in {"math": math, "commonsense": commonsense}.items():
        chosen = draw.sample(records, COUNT)
        pairs = [(tokens(" " * frame + r["instruction"]), tokens(r["output"])) for r in chosen]
        found[kind] = typical([(p, min(a, CUTOFF[kind] - p)) for p, a in pairs if p < CUTOFF[kind] - 1])
    drawn = []
    for _ in range(COUNT):
        whole = min(CUTOFF["alpaca"], max(12, round(draw.lognormvariate(4.85, 0.43))))
        prompt = max(4, round(whole * draw.uniform(0.12, 0.3)))
        drawn.append((prompt, whole - prompt))
    found["alpaca"] = typical(drawn)
    FILE.write_text(json.dumps(found) + "\n")
    for kind in found:
        print(kind, about(rows(kind, COUNT, 100), BATCH), "| first four batches:", about(rows(kind, 32, 100), BATCH))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
