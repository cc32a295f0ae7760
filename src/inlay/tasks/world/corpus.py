"""Declarative pretraining text of the synthetic world: drills, stories, true statements, biographies, small talk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from decimal import Decimal

from inlay.tasks.world import lexicon as lex
from inlay.tasks.world import ontology, people
from inlay.tasks.world.arithmetic import choose, make, show, slots, templates
from inlay.tasks.world.split import drill_held_out, is_test

MIXTURE = {"drill": 0.36, "story": 0.32, "statement": 0.14, "biography": 0.1, "talk": 0.08}
"""Share of each kind of document."""


def equation(rng: random.Random) -> str:
    """One drill such as `37 + 25 = 62`, never one of the held-out sums and differences."""
    while True:
        a, op, b = _operands(rng)
        if not drill_held_out(int(a) if a == int(a) else -1, op, int(b) if b == int(b) else -1):
            break
    result = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else a}[op]
    money = any(x != x.to_integral_value() and x * 10 != (x * 10).to_integral_value() for x in (a, b))
    return f"{show(a, money)} {op} {show(b, money)} = {show(result, money)}"


def _operands(rng: random.Random) -> tuple[Decimal, str, Decimal]:
    r, form = rng.randint, rng.random()
    d = Decimal
    if form < 0.1:
        a, b = r(0, 20), r(0, 20)
        return (d(a), "+", d(b)) if rng.random() < 0.5 else (d(max(a, b)), "-", d(min(a, b)))
    if form < 0.56:
        a, b = r(10, 99), r(1, 99)
        return (d(a), "+", d(b)) if rng.random() < 0.48 else (d(max(a, b)), "-", d(min(a, b)))
    if form < 0.66:
        a, b = r(100, 999), r(2, 999)
        return (d(a), "+", d(b)) if rng.random() < 0.5 else (d(max(a, b)), "-", d(min(a, b)))
    if form < 0.78:
        return d(r(1, 12)), "*", d(r(1, 12))
    if form < 0.83:
        return (d(r(11, 99)), "*", d(r(2, 9))) if rng.random() < 0.6 else (d(r(2, 9)), "*", d(r(11, 60)))
    if form < 0.95:
        w, q = r(1, 12), r(1, 12) if rng.random() < 0.8 else r(11, 40)
        return d(w * q), "/", d(w)
    scale = rng.choice((10, 100))
    a, b = r(1, 99 if scale == 10 else 1500), r(1, 99 if scale == 10 else 1500)
    add = rng.random() < 0.5
    return (d(a) / scale, "+", d(b) / scale) if add else (d(max(a, b)) / scale, "-", d(min(a, b)) / scale)


def drill(rng: random.Random) -> str:
    """Six to twelve equations on one line."""
    return " ".join(equation(rng) + "." for _ in range(rng.randint(6, 12)))


def story(rng: random.Random) -> str:
    """One to three problems told without questions; never one whose question is a test record."""
    parts: list[str] = []
    known = [t for t in templates() if not t.held_out]
    for _ in range(rng.randint(1, 3)):
        problem = make(rng.choice(known), rng)
        if not is_test(f"{problem.setup} {problem.question}") and not _drills_test(problem.steps):
            parts.append(problem.story(rng) + _aside(rng, problem.equations()))
    return " ".join(parts) or drill(rng)


def _drills_test(steps: tuple[tuple[Decimal, str, Decimal, Decimal], ...]) -> bool:
    return any(a == int(a) and b == int(b) and drill_held_out(int(a), op, int(b)) for a, op, b, _ in steps)


def _aside(rng: random.Random, equations: str) -> str:
    """Sometimes a sentence of wondering, so that question words are known words."""
    if rng.random() > 0.2:
        return ""
    name = rng.choice((*lex.GIRLS, *lex.BOYS))
    words = choose(
        "[wondered|asked|wanted to know|could tell|knew|did not know|found out] how [many there were|many were left|"
        "much it was|many there would be|much was left|many more there were|much longer it was] [in all|in total|"
        "altogether|now|then|]", rng,
    )  # fmt: skip
    return f" {name} {words.strip()}; {equations}"


def statements(rng: random.Random) -> str:
    """Three to six true sentences about everyday things."""
    names = (*lex.GIRLS, *lex.BOYS)
    lines = [
        ontology.contrast(rng, names) if rng.random() < 0.15 else ontology.statement(rng)
        for _ in range(rng.randint(3, 6))
    ]
    return " ".join(lines)


_TALK = (
    "{A} [went|walked|ran|drove|came] to the {shop} with {his} {kin} {when}. They "
    "[saw|found|bought|liked] a {c1} {p1} and a {c2} {p2}.",
    '"[Where|When|Why|How] are you going?" asked {A}. "[To the {place}|To see my {kin}|I am going '
    'home now]," said {B}.',
    '"How many {o} do you have?" asked {B}. {A} [smiled|laughed|did not answer|looked at the {o}].',
    '"What is in the {k}?" asked {A}. "There are some {o} in it," said {B}.',
    "If it rains on {d1}, {A} will stay at home and [read a book|play a game|bake {o}|paint a picture].",
    "{A} is a [good|kind|happy|tall|clever|quiet] [boy|girl|friend|student|player]. {He} likes {o} and {job}.",
    "After school {A} and {B} played in the {place} until it was time for dinner. Then they went home.",
    "Each {d1} {A} helps {his} {kin} at the {shop}. {He} puts the {o} in a {k} and counts them.",
    "The teacher gave the class a task. {A} read the instruction and wrote a short response below the question.",
    "Please write the word that completes the sentence, said the teacher. {A} chose the correct "
    "word, and it was the right answer.",
    "{A} asked {B} for help because the second question was hard. {B} described the first part and "
    "the solution was clear.",
    "In {m1} it was cold, but in {m2} it was warm. The {c1} flowers in the {place} [grew|opened|were pretty].",
    "{A} and {B} have a {c1} house near the {place}. Their {kin} lives next door with a dog and two cats.",
    "There was a [false|true] story about the {place}. {A} did not believe it, but {B} thought that it was true.",
    "{A} had the first choice and {B} had the second choice. Both options were good, so they were happy with them.",
    "It takes one hour to go from the {place} to the {shop}. There are 60 minutes in an hour and 24 hours in a day.",
    "There are 7 days in a week and 12 months in a year. {d1} is {A}'s favorite day of the week.",
    "A dollar is 100 cents. A quarter is 25 cents, a dime is 10 cents, and a nickel is 5 cents. {A} "
    "put them in a jar.",
    "A foot is 12 inches and a yard is 3 feet. {A} measured the {obj} with a ruler and wrote the length down.",
    "A dozen is 12. Twice as many means times 2, and half as many means divided by 2.",
    "The total of {x} and {y} is {s}. The sum is {s}, so together they make {s}.",
    "The difference between {s} and {x} is {y}. {s} is {y} more than {x}, and {x} is {y} less than {s}.",
)  # fmt: skip


def talk(rng: random.Random) -> str:
    """Two to four short connected sentences of school-day English."""
    parts: list[str] = []
    for _ in range(rng.randint(2, 4)):
        x, y = rng.randint(2, 60), rng.randint(2, 39)
        words = slots("toy,fruit,school,sweet,media", rng) | {"x": str(x), "y": str(y), "s": str(x + y)}
        text = rng.choice(_TALK)
        if "{s}" in text and drill_held_out(x, "+", y):
            continue
        parts.append(choose(text, rng).format(**words))
    return " ".join(parts) or "It was a good day."


def corpus(seed: int = 0, *, start: int = 0) -> Iterator[str]:
    """Endless documents; document i depends on (seed, i) only, so a run can resume at `start`."""
    person_facts = people.facts(0)
    groups = [person_facts[i : i + len(people.RELATIONS)] for i in range(0, len(person_facts), len(people.RELATIONS))]
    makers = {"drill": drill, "story": story, "statement": statements, "talk": talk}
    index = start
    while True:
        rng = random.Random(f"corpus-{seed}-{index}")
        kind = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()))[0]
        yield people.biography(rng.choice(groups), rng) if kind == "biography" else makers[kind](rng)
        index += 1


__all__ = ["corpus", "drill", "equation", "statements", "story", "talk"]
