"""Which texts and which sums are kept for testing: decided by a hash of the text, not by the order of drawing."""

from __future__ import annotations

import hashlib
import re


def normalise(text: str) -> str:
    """Lower-case words and numbers only, so that punctuation and blanks do not make two records different."""
    return " ".join(re.findall(r"[a-z]+|\d+(?:\.\d+)?", text.lower()))


def _bucket(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


def is_test(text: str) -> bool:
    """Ten per cent of all texts."""
    return _bucket(normalise(text)) < 10


def drill_held_out(a: int, op: str, b: int) -> bool:
    """Five per cent of the sums and differences with a two-digit operand; symmetric for sums."""
    if op not in "+-" or a < 0 or b < 0 or not (10 <= max(a, b) <= 198) or min(a, b) < 2:
        return False
    low, high = (min(a, b), max(a, b)) if op == "+" else (b, a)
    return _bucket(f"{high}{op}{low}") < 5
