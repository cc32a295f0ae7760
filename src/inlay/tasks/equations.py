"""Equations of word problems: evaluated without `eval`, and written down tidily.

`X=((22.0-14.0)/4.0)` with answer 2 becomes `(22 - 14) / 4 = 2. The answer is 2`.
"""

from __future__ import annotations

import ast
import re

_SIGNS: dict[type[ast.operator], tuple[str, int]] = {
    ast.Add: ("+", 1),
    ast.Sub: ("-", 1),
    ast.Mult: ("*", 2),
    ast.Div: ("/", 2),
}
TOLERANCE = 1e-3


def worked(equation: str, answer: float | str) -> str | None:
    """The worked equation and its answer in words, or None if it is unsolved, malformed or not equal to `answer`.

    equation: arithmetic, with or without `name =` before it. An equation whose unknown stands inside the expression is
    not solved: None. Equality is within 0.001, since the published answers are rounded to three or four decimals.
    """
    body = re.sub(r"^\s*[A-Za-z]+\s*=", "", equation).strip()
    try:
        gold = float(answer)
        tree = ast.parse(body, mode="eval").body
        value = _value(tree)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return None
    if abs(value - gold) > TOLERANCE:
        return None
    said = str(round(gold)) if abs(gold - round(gold)) < 1e-9 else f"{gold:.6g}"
    return f"{_text(tree)[0]} = {said}. The answer is {said}"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
        left, right = _value(node.left), _value(node.right)
        sign = _SIGNS[type(node.op)][0]
        return (
            left + right
            if sign == "+"
            else left - right
            if sign == "-"
            else left * right
            if sign == "*"
            else left / right
        )
    raise ValueError("not plain arithmetic")


def _text(node: ast.expr) -> tuple[str, int]:
    """The expression with the fewest brackets, and how tightly its outer sign binds (1 sum, 2 product, 3 number)."""
    if isinstance(node, ast.UnaryOp):
        inner, tight = _text(node.operand)
        return "-" + (inner if tight == 3 else f"({inner})"), 1
    if isinstance(node, ast.BinOp):
        sign, level = _SIGNS[type(node.op)]
        (left, left_level), (right, right_level) = _text(node.left), _text(node.right)
        left = left if left_level >= level else f"({left})"
        right = right if right_level > level else f"({right})"
        return f"{left} {sign} {right}", level
    assert isinstance(node, ast.Constant)
    number = float(node.value)  # type: ignore[arg-type]
    return (str(int(number)) if number.is_integer() else repr(number)), 3
