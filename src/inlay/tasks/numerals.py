"""Reading numbers out of prose: signs, thousands commas, money, percentages, fractions, powers of ten.

The grammar of the clean protocol; the published one reads `-?\\d+\\.?\\d*` and knows none of these.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+"
_SCALE = (
    r"[eE](?P<e>[+-]?\d{1,3})(?!\w)|\s*(?:[x×*]|\\times)\s*10\s*\^\s*\{?(?P<ten>[+-]?\d{1,3})\}?"
    r"|\s*\^\s*\{?(?P<power>\d{1,2})\}?(?!\d)"
)
_NUMBER = re.compile(
    rf"\\[dt]?frac\{{\s*(?P<top>-?\d+)\s*\}}\{{\s*(?P<bottom>\d+)\s*\}}"
    rf"|(?<![\w])(?P<whole>\d+)\s+(?P<part>\d+)/(?P<of>\d+)(?![\d/])"
    rf"|(?P<number>{_PLAIN})(?:{_SCALE}|\s*/\s*(?P<divisor>\d+(?:\.\d+)?)(?![\d/]))?"
)
_MINUS = "-−"
_OPERAND = re.compile(r"[\w)\]}%]\Z|[\d)\]}%][ \t]+\Z")


@dataclass(frozen=True)
class Number:
    """A number found in a text."""

    value: float
    """Its value; 50 % is 50, as the gold answers of all sets have it."""
    start: int
    """Where it begins in the text, its sign and currency included."""
    end: int
    """Where it ends in the text."""


def numbers(text: str) -> list[Number]:
    """All numbers of `text`, in order.

    * `1,000` and `$1,000.50` are one number, `1,2,3` are three; `$` and `%` do not change a value.
    * `3/4`, `1 1/2` and `\\frac{3}{4}` are fractions; dates (`1/2/2003`) and a division by 0 are not.
    * `1.5e3`, `1.5 x 10^3` are powers of ten.
    * A minus is a sign only where it stands at the number and no operand stands before it: `5-3`, `5 - 3`, `x-3` and
      `(a)-3` hold a 3, `= -3` and `-$3` a -3.
    * Digits glued behind a letter (`answer3`, `x2`) are names, not numbers.
    """
    found = []
    for match in _NUMBER.finditer(text):
        if match.start() and (text[match.start() - 1].isalpha() or text[match.start() - 1] == "_"):
            continue
        value = _value(match, text)
        if value is None:
            continue
        start, sign = _sign(text, match.start())
        found.append(Number(sign * value, start, match.end()))
    return found


def _value(match: re.Match[str], text: str) -> float | None:
    """The number without its sign; None for a date, a division by 0 and what no float holds."""
    part = match.groupdict()
    if part["top"] is not None:
        return _ratio(part["top"], part["bottom"])
    if part["whole"] is not None:
        ratio = _ratio(part["part"], part["of"])
        return None if ratio is None else float(part["whole"]) + ratio if ratio < 1 else ratio
    if text[: match.start()].endswith("/") or re.match(r"/\d", text[match.end() :]):
        return None
    number = float(part["number"].replace(",", ""))
    if part["divisor"] is not None:
        return _ratio(number, part["divisor"])
    try:
        value = (
            number * 10.0 ** int(part["e"] or part["ten"] or 0)
            if part["power"] is None
            else number ** int(part["power"])
        )
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def _ratio(top: str | float, bottom: str) -> float | None:
    return float(top) / float(bottom) if float(bottom) else None


def _sign(text: str, start: int) -> tuple[int, int]:
    """Where the number that begins at `start` really begins, and its sign (1 or -1)."""
    before = text[:start]
    if before.endswith("$"):
        before = before[:-1].removesuffix("\\")
    if not before or before[-1] not in _MINUS:
        return len(before), 1
    before = before[:-1]
    if before.endswith("$"):
        return len(before) - 1, -1
    return (len(before) + 1, 1) if _OPERAND.search(before[-20:]) else (len(before), -1)
