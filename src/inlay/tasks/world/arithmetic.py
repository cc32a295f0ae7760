"""Word problems of the synthetic world: a template gives a question, its equations and its telling as a story."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from functools import cache

from inlay.tasks.world import lexicon as lex
from inlay.tasks.world.templates import TEMPLATES

Number = Decimal
Step = tuple[Number, str, Number, Number]


@dataclass(frozen=True, kw_only=True)
class Template:
    """One problem pattern."""

    family: str
    """Which published set it imitates: addsub, multiarith, singleeq, svamp or gsm8k."""
    expression: str
    """Formula over x, y, w, v that the sampler knows."""
    kind: str
    """Number range: int, small, money, tenth or big."""
    group: str
    """Object groups (comma separated) that may fill {o}."""
    setup: str
    """The situation; [a|b] picks one wording."""
    question: str
    """What is asked."""
    conclusion: str
    """The same thing stated with the answer {a}."""
    held_out: bool = False
    """Seen in test records only."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One filled template."""

    setup: str
    """Situation text."""
    question: str
    """Question text."""
    conclusion: str
    """Declarative result."""
    steps: tuple[Step, ...]
    """Equations (left, operator, right, result) in order."""
    money: bool
    """Numbers carry two decimals."""

    @property
    def answer(self) -> str:
        """The last result, as text."""
        return self.show(self.steps[-1][3])

    def show(self, number: Number) -> str:
        """Text of one number: two decimals for prices, none for whole numbers."""
        return show(number, self.money)

    def asked(self, rng: random.Random) -> str:
        """The problem as a question, sometimes with its last fact moved into an if-clause."""
        facts = re.split(r"(?<=\.)\s+", self.setup.strip())
        last = facts[-1]
        if len(facts) < 2 or rng.random() < 0.6 or "If" in last:
            return f"{self.setup} {self.question}"
        clause = f"If {_lowered(last).rstrip(' .')}"
        comma = " ," if last.endswith(" .") else ","
        return " ".join([*facts[:-1], clause + comma, _lowered(self.question)])

    def equations(self) -> str:
        """`3 + 4 = 7. 7 * 5 = 35.`"""
        return " ".join(f"{self.show(a)} {op} {self.show(b)} = {self.show(c)}." for a, op, b, c in self.steps)

    def story(self, rng: random.Random) -> str:
        """The problem told without a question: situation, equations, result."""
        equations = self.equations()
        end = self.conclusion
        form = rng.random()
        if form < 0.5:
            text = f"{self.setup} {equations} {end}"
        elif form < 0.72:
            text = f"{self.setup} {equations[:-1]}, so {_lowered(end)}"
        elif form < 0.77:
            text = f"{self.setup} {end} {equations}"
        else:
            text = f"{self.setup} So {equations} {end}"
        return text


def show(number: Number, money: bool = False) -> str:
    """Decimal text without exponent: `5.20` for prices, `12` for whole numbers, `0.5` otherwise."""
    if number == number.to_integral_value():
        return str(int(number))
    return f"{number:.2f}" if money else format(number.normalize(), "f")


_NAMES = frozenset(lex.GIRLS) | frozenset(lex.BOYS)


def _lowered(sentence: str) -> str:
    """The sentence with a small first letter unless it starts with a name."""
    first = re.split(r"[ ']", sentence, maxsplit=1)[0]
    return sentence if first in _NAMES else sentence[:1].lower() + sentence[1:]


_OPERATORS: dict[str, Callable[[Number, Number], Number]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}


def _amount(rng: random.Random, kind: str) -> Number:
    """One number of the given range."""
    if kind == "small":
        return Decimal(rng.randint(2, 12))
    if kind == "money":
        return Decimal(rng.randint(25, 999)) / 100 if rng.random() < 0.8 else Decimal(rng.randint(1000, 2500)) / 100
    if kind == "tenth":
        return Decimal(rng.randint(1, 9 if rng.random() < 0.5 else 99)) / 10
    if kind == "big":
        return Decimal(rng.randint(100, 999))
    form = rng.random()
    if form < 0.3:
        return Decimal(rng.randint(2, 12))
    return Decimal(rng.randint(10, 99)) if form < 0.9 else Decimal(rng.randint(100, 500))


def _ordered(rng: random.Random, kind: str) -> tuple[Number, Number]:
    """Two different amounts, the larger first."""
    while True:
        a, b = _amount(rng, kind), _amount(rng, kind)
        if a != b:
            return max(a, b), min(a, b)


def sample(expression: str, kind: str, rng: random.Random) -> dict[str, Number]:
    """Operands of an expression such that every step is positive and every division exact.

    Raises:
        KeyError: when the expression is unknown.
    """
    r = rng.randint
    d = Decimal
    if expression in ("x+y", "x+y+w"):
        return {k: _amount(rng, kind) for k in "xyw"}
    if expression == "x-y":
        x, y = _ordered(rng, kind)
        return {"x": x, "y": y}
    if expression in ("x+y-w", "x-w+y"):
        x, y = _amount(rng, kind), _amount(rng, kind)
        top = x + y if expression == "x+y-w" else x
        unit = {"money": 100, "tenth": 10}.get(kind, 1)
        return {"x": x, "y": y, "w": d(r(1, max(1, int(top * unit) - 1))) / unit}
    if expression == "x-y-w":
        y, w = _amount(rng, kind), _amount(rng, kind)
        return {"x": y + w + _amount(rng, kind), "y": y, "w": w}
    if expression == "bill-x-y":
        x, y = _amount(rng, kind), _amount(rng, kind)
        bill = next(b for b in (5, 10, 20, 50, 100) if b > x + y)
        return {"b": d(bill), "x": x, "y": y}
    small: dict[str, Callable[[], tuple[int, ...]]] = {
        "x*y": lambda: (r(2, 12), r(2, 12)) if rng.random() < 0.75 else (r(11, 30), r(2, 9)),
        "(x+y)*w": lambda: (r(2, 10), r(2, 10), r(2, 9)),
        "x*y+w": lambda: (r(2, 10), r(2, 10), r(1, 40)),
        "x*y+w*v": lambda: (r(2, 9), r(2, 9), r(2, 9), r(2, 9)),
        "(x+y)/w": lambda: _split(r, r(2, 10), r(2, 10)),
    }
    if expression in small:
        return {k: d(n) for k, n in zip("xywv", small[expression](), strict=False)}
    return _exact(expression, rng)


def _exact(expression: str, rng: random.Random) -> dict[str, Number]:
    """Operands of the formulas that are solved backwards from a whole result."""
    r = rng.randint
    q, k, m = r(2, 10), r(2, 10), r(2, 40)
    solved: dict[str, tuple[int, ...]] = {
        "x/y": (q * k, k) if rng.random() < 0.8 else (r(11, 40) * k, k),
        "(x-y)/w": (m + q * k, m, k),
        "(x-y)*w": (m % 10 + 1 + q, m % 10 + 1, k),
        "x*y-w": (q, k, r(1, q * k - 1)),
        "x/y+w": (q * k, k, m),
        "x/y-w": (q * k, k, r(1, max(1, q - 1))),
        "x/(y-w)": (q * k, k + m % 9 + 1, m % 9 + 1),
        "x-y*w": (q * k + m, q, k),
        "x*2+x": (r(2, 40),),
        "x/2+x": (2 * r(2, 25),),
        "x*y/w": _product(r),
    }
    return {k: Decimal(n) for k, n in zip("xyw", solved[expression], strict=False)}


def _split(r: Callable[[int, int], int], q: int, w: int) -> tuple[int, ...]:
    """Two parts of q * w, and w."""
    part = r(1, q * w - 1)
    return part, q * w - part, w


def _product(r: Callable[[int, int], int]) -> tuple[int, ...]:
    """x, y, w with x * y divisible by w."""
    w, q = r(2, 6), r(2, 6)
    return w * r(1, 2), q, w


_PLANS: dict[str, str] = {
    "x+y": "x+y", "x-y": "x-y", "x+y+w": "x+y r+w", "x+y-w": "x+y r-w", "x-w+y": "x-w r+y", "x-y-w": "x-y r-w",
    "bill-x-y": "x+y b-r", "x*y": "x*y", "x/y": "x/y", "(x+y)*w": "x+y r*w", "(x-y)*w": "x-y r*w",
    "(x+y)/w": "x+y r/w", "(x-y)/w": "x-y r/w", "x*y+w": "x*y r+w", "x*y-w": "x*y r-w", "x*y+w*v": "x*y w*v r+s",
    "x/y+w": "x/y r+w", "x/y-w": "x/y r-w", "x/(y-w)": "y-w x/r", "x-y*w": "y*w x-r", "x*2+x": "x*2 r+x",
    "x/2+x": "x/2 r+x", "x*y/w": "x*y r/w",
}  # fmt: skip


def solve(expression: str, numbers: dict[str, Number]) -> tuple[Step, ...]:
    """Worked steps: `r` is the last result, `s` the one before (kept in written order)."""
    steps: list[Step] = []
    for text in _PLANS[expression].split():
        left, op, right = text[0], text[1], text[2]
        last = [s[3] for s in steps]
        pool = dict(numbers)
        if last:
            pool["r"] = last[-1]
        if text == "r+s":
            pool["r"], pool["s"] = last[-2], last[-1]
        pool["2"] = Decimal(2)
        a, b = pool[left], pool[right]
        steps.append((a, op, b, _OPERATORS[op](a, b)))
    return tuple(steps)


def choose(text: str, rng: random.Random) -> str:
    """Resolve every [one|other] wording."""
    return re.sub(r"\[([^\[\]]*)\]", lambda m: rng.choice(m.group(1).split("|")), text)


def slots(group: str, rng: random.Random) -> dict[str, str]:
    """Random words for every named place of a template."""
    kind = rng.choice(group.split(","))
    one, many = (part.replace("_", " ") for part in rng.choice(lex.OBJECTS[kind]).split(" ", 1))
    one2, many2 = (part.replace("_", " ") for part in rng.choice(lex.OBJECTS[kind]).split(" ", 1))
    while many2 == many:
        one2, many2 = (part.replace("_", " ") for part in rng.choice(lex.OBJECTS[kind]).split(" ", 1))
    girl = rng.random() < 0.5
    first = rng.choice(lex.GIRLS if girl else lex.BOYS)
    others = rng.sample([n for n in (*lex.GIRLS, *lex.BOYS) if n != first], 2)
    c1, c2 = rng.sample(lex.COLORS, 2)
    d1, d2 = rng.sample(lex.DAYS, 2)
    m1, m2 = rng.sample(lex.MONTHS, 2)
    p1, p2, p3 = rng.sample(lex.PRICED, 3)
    i1, i2, i3 = rng.sample(lex.INGREDIENTS, 3)
    holder = rng.choice(lex.HOLDERS[kind].split(","))
    return {
        "A": first, "B": others[0], "C": others[1],
        "he": "she" if girl else "he", "He": "She" if girl else "He",
        "his": "her" if girl else "his", "His": "Her" if girl else "His", "him": "her" if girl else "him",
        "o": many, "o1": one, "t": many2, "t1": one2,
        "c1": c1, "c2": c2, "d1": d1, "d2": d2, "m1": m1, "m2": m2, "p1": p1, "p2": p2, "p3": p3,
        "i1": i1, "i2": i2, "i3": i3,
        "shop": rng.choice(lex.SHOPS[kind].split(",")), "place": rng.choice(lex.PLACES[kind].split(",")),
        "k": holder, "ks": _plural(holder), "when": rng.choice(lex.TIMES), "kin": rng.choice(lex.RELATIVES),
        "job": rng.choice(lex.CHORES), "len": rng.choice(lex.LENGTHS), "wt": rng.choice(lex.WEIGHTS),
        "vol": rng.choice(lex.VOLUMES), "liq": rng.choice(lex.LIQUIDS), "obj": rng.choice(lex.THINGS_MEASURED),
    }  # fmt: skip


def _plural(word: str) -> str:
    """English plural of a container word."""
    if word.endswith(("x", "s", "ch", "sh")):
        return word + "es"
    if word.endswith("shelf"):
        return word[:-1] + "ves"
    return word + "s"


@cache
def templates() -> tuple[Template, ...]:
    """Every pattern of the world, in a fixed order."""
    return tuple(
        Template(family=f, expression=e, kind=k, group=g, setup=s, question=q, conclusion=c, held_out=i % 9 == 8)
        for i, (f, e, k, g, s, q, c) in enumerate(TEMPLATES)
    )


def make(template: Template, rng: random.Random) -> Problem:
    """Fill one template."""
    numbers = sample(template.expression, template.kind, rng)
    steps = solve(template.expression, numbers)
    money = template.kind == "money"
    words = slots(template.group, rng)
    words |= {key: show(value, money) for key, value in numbers.items()}
    words["a"] = show(steps[-1][3], money)
    words["w0"], words["w1"] = str(rng.randint(2, 99)), str(rng.randint(2, 12))
    spaced = rng.random() < 0.4

    def fill(text: str) -> str:
        out = choose(text, rng).format(**words)
        out = re.sub(r"\ba (?=[aeio][a-z])", "an ", out)
        out = out[0].upper() + out[1:]
        return tokenised(out) if spaced else out

    return Problem(
        setup=fill(template.setup),
        question=fill(template.question),
        conclusion=choose(template.conclusion, rng).format(**words),
        steps=steps,
        money=money,
    )


def tokenised(text: str) -> str:
    """The blank-separated punctuation of the older problem sets: `7 apples .`"""
    text = re.sub(r"([,?])", r" \1", text)
    text = re.sub(r"\.(?=\s|$)", " .", text)
    return re.sub(r"\$(?=\d)", "$ ", re.sub(r"(?<=\w)'s\b", " 's", text))
