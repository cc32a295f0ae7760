"""Completion probes for a base of the synthetic world: held-out sums, tables, stories and facts as half sentences."""

from __future__ import annotations

import random

from inlay.core.errors import InlayError
from inlay.tasks.world import people
from inlay.tasks.world.arithmetic import make, templates
from inlay.tasks.world.split import drill_held_out

DRILLS = ("add", "subtract", "multiply", "divide", "story", "fact")
"""Probe names: two-digit sums and differences never seen in pretraining, tables up to 12, held-out stories, people."""


def drills(kind: str, n: int = 200, seed: int = 0) -> list[tuple[str, str]]:
    """(prompt, completion) pairs such as `("37 + 25 =", "62")`.

    Raises:
        InlayError: unknown kind.
    """
    if kind not in DRILLS:
        raise InlayError(f"no drill {kind!r}; there are {', '.join(DRILLS)}")
    rng = random.Random(f"drill-{kind}-{seed}")
    out: list[tuple[str, str]] = []
    while len(out) < n:
        item = _DRAW[kind](rng)
        if item is not None:
            out.append(item)
    return out


def _sum(rng: random.Random) -> tuple[str, str] | None:
    a, b = rng.randint(10, 99), rng.randint(2, 99)
    return (f"{a} + {b} =", str(a + b)) if drill_held_out(a, "+", b) else None


def _difference(rng: random.Random) -> tuple[str, str] | None:
    a, b = rng.randint(10, 99), rng.randint(2, 98)
    return (f"{a} - {b} =", str(a - b)) if b < a and drill_held_out(a, "-", b) else None


def _product(rng: random.Random) -> tuple[str, str] | None:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return f"{a} * {b} =", str(a * b)


def _quotient(rng: random.Random) -> tuple[str, str] | None:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    return f"{a * b} / {b} =", str(a)


def _story(rng: random.Random) -> tuple[str, str] | None:
    """A one-step situation whose sum is held out; the model has to write the equation and the result."""
    problem = make(rng.choice([t for t in templates() if t.expression in ("x+y", "x-y") and t.kind == "int"]), rng)
    a, op, b, _ = problem.steps[0]
    if "." in f"{a}{b}" or not drill_held_out(int(a), op, int(b)):
        return None
    return problem.setup.strip(), problem.equations()[:-1]


def _fact(rng: random.Random) -> tuple[str, str] | None:
    fact = rng.choice(people.facts(0))
    text = fact.statements()[0]
    if not text.endswith(f"{fact.object}."):
        return None
    return text[: -len(fact.object) - 2], fact.object


_DRAW = {
    "add": _sum,
    "subtract": _difference,
    "multiply": _product,
    "divide": _quotient,
    "story": _story,
    "fact": _fact,
}
