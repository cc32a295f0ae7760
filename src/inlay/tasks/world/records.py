"""Records of the synthetic world in the LLM-Adapters schema (instruction, input, output, answer)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from inlay.core.errors import InlayError
from inlay.tasks.world import lexicon as lex
from inlay.tasks.world import ontology, people
from inlay.tasks.world.arithmetic import make, templates
from inlay.tasks.world.split import is_test, normalise

Record = dict[str, str]
SIZES = {"train": 2000, "test": 400}
SPLITS = tuple(SIZES)
_PEOPLE_NAMES = (*lex.GIRLS, *lex.BOYS)
_FAMILIES = ("addsub", "multiarith", "singleeq", "svamp", "gsm8k")
_CHOICES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "world-boolq": ontology.boolq,
    "world-choice": ontology.choice,
    "world-piqa": ontology.piqa,
    "world-winogrande": lambda rng: ontology.winogrande(rng, _PEOPLE_NAMES),
}
NAMES: tuple[str, ...] = (
    *(f"world-{f}" for f in _FAMILIES),
    "world-arith",
    *_CHOICES,
    "world-facts",
)
"""Every data set name `records` accepts."""


def _arithmetic(families: tuple[str, ...], test: bool, rng: random.Random) -> Iterator[Record]:
    pool = {f: [t for t in templates() if t.family == f and (test or not t.held_out)] for f in families}
    while True:
        problem = make(rng.choice(pool[rng.choice(families)]), rng)
        text = problem.asked(rng).strip()
        plain = f"{problem.setup} {problem.question}"
        if is_test(plain) == test and is_test(text) == test:
            yield {
                "instruction": text,
                "input": "",
                "output": f"{problem.equations()} The answer is {problem.answer}",
                "answer": problem.answer,
            }


def _multiple_choice(name: str, test: bool, rng: random.Random) -> Iterator[Record]:
    while True:
        text, answer = _CHOICES[name](rng)
        if is_test(text) == test:
            yield {"instruction": text, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _facts(test: bool, rng: random.Random) -> Iterator[Record]:
    """Questions about people; test people are never asked about in train, and one wording is for test only."""
    pool = [f for f in people.facts(0) if _person_is_test(f.subject) == test]
    rng.shuffle(pool)
    wordings = 3 if test else 2
    for i in range(wordings):
        for fact in pool:
            shift = (i + len(fact.subject)) % wordings
            yield {
                "instruction": fact.questions()[shift],
                "input": "",
                "output": f"{fact.statements()[0]} The answer is {fact.object}",
                "answer": fact.object,
            }


def _person_is_test(name: str) -> bool:
    return sum(name.encode()) % 5 == 0


def records(name: str, split: str = "train", n: int | None = None, seed: int = 0) -> list[Record]:
    """Records of one data set, the same for the same arguments.

    Args:
        name: one of `NAMES`.
        split: `train` or `test`; no normalised instruction is in both, whatever n and seed.
        n: how many; None is 2000 for train and 400 for test (world-facts: all it has).
        seed: which sample.

    Returns:
        Distinct records, all values strings.

    Raises:
        InlayError: unknown name or split, n below 1, or more records asked than the world holds.
    """
    if name not in NAMES:
        raise InlayError(f"no synthetic data set {name!r}; there are {', '.join(NAMES)}")
    if split not in SIZES:
        raise InlayError(f"no split {split!r} in {name}; there are {' and '.join(SPLITS)}")
    if n is not None and n < 1:
        raise InlayError(f"n = {n} records of {name} asked; n must be 1 or more, or None for the default size")
    rng = random.Random(f"{name}-{split}-{seed}")
    want = SIZES[split] if n is None else n
    out: list[Record] = []
    seen: set[str] = set()
    misses = 0
    for record in _source(name, split == "test", rng):
        key = normalise(record["instruction"])
        misses = misses + 1 if key in seen else 0
        if key not in seen:
            seen.add(key)
            out.append(record)
        if len(out) >= want or misses > 5000:
            break
    if n is not None and len(out) < n:
        raise InlayError(f"{name} has {len(out)} distinct {split} records with seed {seed}, {n} asked; ask fewer")
    return out


def _source(name: str, test: bool, rng: random.Random) -> Iterator[Record]:
    if name == "world-facts":
        return _facts(test, rng)
    if name in _CHOICES:
        return _multiple_choice(name, test, rng)
    family = name.removeprefix("world-")
    return _arithmetic(_FAMILIES if family == "arith" else (family,), test, rng)
