"""Everyday facts of the synthetic world as relations, and the multiple-choice records made from them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from inlay.tasks.world import knowledge_tables as tables
from inlay.tasks.world import relation_tables


@dataclass(frozen=True, kw_only=True)
class Relation:
    """One kind of fact: how it is stated, asked and turned into a yes/no question or a goal."""

    name: str
    """Identifier."""
    pairs: tuple[tuple[str, str], ...]
    """(subject, object) pairs that are true."""
    statements: tuple[str, ...]
    """Declarative wordings with {s} and {o}."""
    questions: tuple[str, ...]
    """Open questions about {s} whose answer is {o}."""
    yes_no: tuple[str, ...]
    """Lower-case questions with {s} and {o}."""
    goal: tuple[str, str] | None = None
    """(goal, solution) wordings where {o} is the goal and {s} solves it."""

    def true_objects(self, subject: str) -> set[str]:
        """Objects that hold for a subject."""
        return {o for s, o in self.pairs if s == subject}


def _column(table: str, index: int) -> tuple[tuple[str, str], ...]:
    rows = [line.split("|") for line in table.strip().splitlines()]
    return tuple((row[0], row[index]) for row in rows)


def article(noun: str) -> str:
    """`a hammer`, `an oven`, `gloves`, `rice`."""
    if noun in _MASS or (noun.endswith("s") and noun not in ("bus", "compass")):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


_MASS = frozenset(
    "soap rope honey sugar salt pepper chocolate coffee tea bread rice wheat corn cheese butter yogurt spinach".split()
)


def _with_articles(pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((article(s), o) for s, o in pairs)


@cache
def relations() -> tuple[Relation, ...]:
    """Every relation of the world, in a fixed order."""
    t = tables
    kinds = _with_articles(_column(t.ANIMALS, 1) + _column(t.OBJECTS, 1) + _column(t.FOODS, 1))
    kinds = tuple((s, article(o) if o not in ("clothing", "bedding") else "a piece of " + o) for s, o in kinds)
    return (
        Relation(
            name="kind", pairs=kinds,
            statements=("{S} is {o}.", "{S} is a kind of thing that people call {o}."),
            questions=("What is {s}?", "Which word describes {s}?"), yes_no=("is {s} {o}", "would you call {s} {o}"),
        ),
        Relation(
            name="home", pairs=_with_articles(_column(t.ANIMALS, 2)),
            statements=("{S} lives in the {o}.", "You can see {s} in the {o}.", "The {o} is the home of {s}."),
            questions=("Where does {s} live?", "Where can you see {s}?"), yes_no=("does {s} live in the {o}",),
            goal=("To see {s}", "go to the {o}."),
        ),
        Relation(
            name="ability", pairs=_with_articles(_column(t.ANIMALS, 3)),
            statements=("{S} can {o}.", "Everyone knows that {s} is able to {o}.", "To {o} is easy for {s}."),
            questions=("What can {s} do?", "What is {s} able to do?"), yes_no=("can {s} {o}", "is {s} able to {o}"),
        ),
        Relation(
            name="diet", pairs=_with_articles(_column(t.ANIMALS, 4)),
            statements=("{S} eats {o}.", "{S} likes to eat {o}.", "The food of {s} is {o}."),
            questions=("What does {s} eat?", "What does {s} like to eat?"), yes_no=("does {s} eat {o}",),
            goal=("To feed {s}", "give it {o}."),
        ),
        Relation(
            name="covering", pairs=_with_articles(_column(t.ANIMALS, 5)),
            statements=("{S} is covered with {o}.", "The body of {s} has {o}."),
            questions=("What covers the body of {s}?",), yes_no=("is {s} covered with {o}",),
        ),
        Relation(
            name="use", pairs=_with_articles(_column(t.OBJECTS, 2)),
            statements=("{S} is used to {o}.", "People use {s} to {o}.", "To {o}, use {s}.", "With {s} you can {o}."),
            questions=("What is {s} used for?", "What can you do with {s}?", "What do people use {s} to do?"),
            yes_no=("can you use {s} to {o}", "do people use {s} to {o}"), goal=("To {o}", "use {s}."),
        ),
        Relation(
            name="place", pairs=_with_articles(_column(t.OBJECTS, 3)),
            statements=("{S} is kept in the {o}.", "You can find {s} in the {o}.", "In the {o} there is {s}."),
            questions=("Where can you find {s}?", "Where is {s} kept?"), yes_no=("can you find {s} in the {o}",),
            goal=("To find {s}", "look in the {o}."),
        ),
        Relation(
            name="material", pairs=_with_articles(_column(t.OBJECTS, 4)),
            statements=("{S} is made of {o}.", "{o} is what {s} is made of."),
            questions=("What is {s} made of?",), yes_no=("is {s} made of {o}",),
        ),
        Relation(
            name="color", pairs=_with_articles(_column(t.FOODS, 2)),
            statements=("{S} is {o}.", "The color of {s} is {o}."),
            questions=("What color is {s}?",), yes_no=("is the color of {s} {o}", "is {s} {o}"),
        ),
        Relation(
            name="taste", pairs=_with_articles(_column(t.FOODS, 3)),
            statements=("{S} tastes {o}.", "The taste of {s} is {o}."),
            questions=("How does {s} taste?",), yes_no=("does {s} taste {o}",),
        ),
        Relation(
            name="source", pairs=_with_articles(_column(t.FOODS, 4)),
            statements=("{S} comes from the {o}.", "The {o} gives us {s}."),
            questions=("Where does {s} come from?",), yes_no=("does {s} come from the {o}",),
            goal=("To get {s}", "get it from the {o}."),
        ),
        Relation(
            name="work", pairs=_with_articles(_column(t.JOBS, 1)),
            statements=("{S} is paid to {o}.", "The job of {s} is to {o}.", "Ask {s} to {o}."),
            questions=("What does {s} do at work?", "What is the job of {s}?"), yes_no=("is it the job of {s} to {o}",),
            goal=("To get someone to {o}", "ask {s}."),
        ),
        Relation(
            name="workplace", pairs=_with_articles(_column(t.JOBS, 2)),
            statements=("{S} works in the {o}.", "In the {o} you can meet {s}."),
            questions=("Where does {s} work?",), yes_no=("does {s} work in the {o}",),
            goal=("To meet {s}", "go to the {o}."),
        ),
        Relation(
            name="equipment", pairs=_with_articles(_column(t.JOBS, 3)),
            statements=("{S} works with the {o}.", "At work {s} needs the {o}."),
            questions=("What does {s} need at work?",), yes_no=("does {s} work with the {o}",),
        ),
        Relation(
            name="visit", pairs=tuple(("the " + s, o) for s, o in _column(t.PLACES, 1)),
            statements=("People go to {s} to {o}.", "At {s} you can {o}.", "To {o}, go to {s}."),
            questions=("Why do people go to {s}?", "What can you do at {s}?"), yes_no=("can you {o} at {s}",),
            goal=("To {o}", "go to {s}."),
        ),
        Relation(
            name="effect", pairs=_column(relation_tables.EFFECTS, 1),
            statements=("When {s}, {o}.", "If {s}, {o}.", "After {s}, {o}."),
            questions=("What happens when {s}?", "What happens after {s}?"), yes_no=("is it true that when {s}, {o}",),
        ),
        Relation(
            name="part", pairs=tuple(("the " + s, article(o)) for s, o in _column(relation_tables.PARTS, 1)),
            statements=("{S} is part of {o}.", "{O} has {s}."),
            questions=("What is {s} part of?",), yes_no=("is {s} part of {o}",),
        ),
    )  # fmt: skip


def fill(wording: str, subject: str, obj: str) -> str:
    """Put a fact into a wording; {S} and {O} start a sentence."""
    up = {"S": subject[0].upper() + subject[1:], "O": obj[0].upper() + obj[1:]}
    text = wording.format(s=subject, o=obj, **up)
    return text[0].upper() + text[1:] if wording.startswith("{o}") else text


def false_objects(relation: Relation, subject: str, n: int, rng: random.Random) -> list[str]:
    """Objects of the same relation that are not true of the subject."""
    true = relation.true_objects(subject)
    return rng.sample(sorted({o for _, o in relation.pairs} - true), n)


def boolq(rng: random.Random) -> tuple[str, str]:
    """(instruction, answer) of one true/false record."""
    relation = rng.choice(relations())
    subject, obj = rng.choice(relation.pairs)
    truth = rng.random() < 0.5
    if not truth:
        obj = false_objects(relation, subject, 1, rng)[0]
    question = fill(rng.choice(relation.yes_no), subject, obj)
    text = f"Please answer the following question with true or false, question: {question}?"
    return f"{text}\n\nAnswer format: true/false", "true" if truth else "false"


def choice(rng: random.Random) -> tuple[str, str]:
    """(instruction, answer) of one record with three to five answers."""
    relation = rng.choice([r for r in relations() if len({o for _, o in r.pairs}) > 6])
    subject, obj = rng.choice(relation.pairs)
    n = rng.choice((3, 4, 4, 4, 5))
    options = [obj, *false_objects(relation, subject, n - 1, rng)]
    rng.shuffle(options)
    listed = " ".join(f"Answer{i}: {o}" for i, o in enumerate(options, 1))
    names = "/".join(f"answer{i}" for i in range(1, n + 1))
    question = fill(rng.choice(relation.questions), subject, obj)
    text = f"Please choose the correct answer to the question: {question}\n\n{listed}\n\nAnswer format: {names}"
    return text, f"answer{options.index(obj) + 1}"


def piqa(rng: random.Random) -> tuple[str, str]:
    """(instruction, answer) of one goal with two solutions."""
    relation = rng.choice([r for r in relations() if r.goal])
    assert relation.goal is not None
    subject, obj = rng.choice(relation.pairs)
    goal, solution = relation.goal
    if "{s}" in goal:
        wrong = false_objects(relation, subject, 1, rng)[0]
        pair = [fill(solution, subject, obj), fill(solution, subject, wrong)]
    else:
        others = sorted({s for s, o in relation.pairs if o != obj and o not in relation.true_objects(subject)})
        pair = [fill(solution, subject, obj), fill(solution, rng.choice(others), obj)]
    right = pair[0]
    rng.shuffle(pair)
    text = f"Please choose the correct solution to the question: {fill(goal, subject, obj)}\n\n"
    text += f"Solution1: {pair[0]}\n\nSolution2: {pair[1]}\n\nAnswer format: solution1/solution2"
    return text, f"solution{pair.index(right) + 1}"


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().splitlines()]


def winogrande(rng: random.Random, names: tuple[str, ...]) -> tuple[str, str]:
    """(instruction, answer) of one sentence with a blank and two candidates."""
    if rng.random() < 0.2:
        big, small = rng.choice(_rows(relation_tables.FITS))
        large = rng.random() < 0.5
        first, second = f"the {big}", f"the {small}"
        sentence = f"The {big} did not fit into the {small} because _ was too {'big' if large else 'small'}."
        answer = first if large else second
    else:
        more, less, did, other = rng.choice(_rows(relation_tables.CONTRASTS))
        first, second = rng.sample(names, 2)
        up = rng.random() < 0.5
        act = rng.random() < 0.5
        sentence = f"{first} was {more if up else less} than {second}, so _ {did if act else other}."
        answer = first if up == act else second
    options = [first, second]
    rng.shuffle(options)
    text = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    text += f"{sentence}\n\nOption1: {options[0]} Option2: {options[1]} Answer format: option1/option2"
    return text, f"option{options.index(answer) + 1}"


def statement(rng: random.Random) -> str:
    """One true sentence about the world."""
    relation = rng.choice(relations())
    subject, obj = rng.choice(relation.pairs)
    text = fill(rng.choice(relation.statements), subject, obj)
    if relation.name != "effect" and rng.random() < 0.15:
        wrong = false_objects(relation, subject, 1, rng)[0]
        text += f" It is not true that {_small(fill(relation.statements[0], subject, wrong))}"
    return text


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def contrast(rng: random.Random, names: tuple[str, ...]) -> str:
    """One sentence of the kind the blank-filling records ask about."""
    if rng.random() < 0.2:
        big, small = rng.choice(_rows(relation_tables.FITS))
        which = rng.choice((f"The {big} was too big.", f"The {small} was too small."))
        return f"The {big} did not fit into the {small}. {which}"
    more, less, did, other = rng.choice(_rows(relation_tables.CONTRASTS))
    a, b = rng.sample(names, 2)
    if rng.random() < 0.5:
        a, b, more, less, did, other = b, a, less, more, other, did
    forms = (f"{a} was {more} than {b}, so {a} {did}.", f"{a} was {more} than {b}. {b} {other}.",
             f"{a} {did} because {a} was {more} than {b}.", f"{b} was {less} than {a}, so {a} {did}.")  # fmt: skip
    return rng.choice(forms)
