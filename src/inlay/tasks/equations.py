"""Equations of word problems: evaluated without `eval`, and written down step by step.

`X=((22.0-14.0)/4.0)` with answer 2 becomes `22 - 14 = 8. 8 / 4 = 2. The answer is 2`.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable

_SIGNS: dict[type[ast.operator], tuple[str, Callable[[float, float], float]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
TOLERANCE = 1e-3


def worked(equation: str, answer: float | str) -> str | None:
    """The equation worked one operation at a time, and its answer; None if it is unsolved, malformed or not `answer`.

    equation: arithmetic, with or without `name =` before it. An equation whose unknown stands inside the expression is
    not solved: None. Equality is within 0.001, since the published answers are rounded to three or four decimals.
    """
    body = re.sub(r"^\s*[A-Za-z]+\s*=", "", equation).strip()
    steps: list[str] = []
    try:
        gold = float(answer)
        value = _work(ast.parse(body, mode="eval").body, steps)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    if abs(value - gold) > TOLERANCE:
        return None
    if steps:  # the last result as the answer has it: published answers are rounded
        steps[-1] = f"{steps[-1].rpartition('=')[0]}= {_number(gold)}"
    return ". ".join([*steps, f"The answer is {_number(gold)}"])


def _work(node: ast.expr, steps: list[str]) -> float:
    """The value of an expression; each of its operations is appended to `steps`, in the order in which it is done."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_work(node.operand, steps)
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        left, right = _work(node.left, steps), _work(node.right, steps)
        sign, apply = _SIGNS[type(node.op)]
        value = apply(left, right)
        shown = _number(right) if right >= 0 else f"({_number(right)})"
        steps.append(f"{_number(left)} {sign} {shown} = {_number(value)}")
        return value
    raise ValueError("not plain arithmetic")


def _number(value: float) -> str:
    return str(round(value)) if abs(value - round(value)) < 1e-9 else f"{value:.6g}"
