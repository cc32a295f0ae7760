"""The number grammar of the clean protocol."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.tasks.numerals import numbers

CASES = [
    ("5-3", [5, 3]),
    ("5 - 3", [5, 3]),
    ("5 -3", [5, 3]),
    ("x-3", [3]),
    ("(a)-3", [3]),
    ("50%-3", [50, 3]),
    ("= -3", [-3]),
    ("is -3 degrees", [-3]),
    ("is \u22127", [-7]),
    ("(-3)", [-3]),
    ("-$3", [-3]),
    ("$-3", [-3]),
    ("\\$-3 and -\\$4", [-3, -4]),
    ("$5 -$3", [5, 3]),
    ("a\n-5", [-5]),
    ("- 5 apples", [5]),
    ("pages 3\u20135", [3, 5]),
    ("1,000", [1000]),
    ("$1,000.50.", [1000.5]),
    ("12,345,678", [12345678]),
    ("1,2,3", [1, 2, 3]),
    ("3/4", [0.75]),
    ("1 1/2 cups", [1.5]),
    ("5 10/2", [5]),
    ("\\frac{3}{4}", [0.75]),
    ("-\\dfrac{1}{2}", [-0.5]),
    ("1/2/2003", []),
    ("5/0", []),
    ("24/2 = 12", [12, 12]),
    ("1.5e3", [1500]),
    ("2e-2", [0.02]),
    ("1.5 x 10^3", [1500]),
    ("2 \\times 10^{-2}", [0.02]),
    ("2^10", [1024]),
    ("50%", [50]),
    ("costs $.50", [0.5]),
    ("Rs.400", [400]),
    ("It is 12.", [12]),
    ("answer3 mp3 x_2", []),
    ("9" * 400, []),
    ("1e999", []),
    ("", []),
]


@pytest.mark.parametrize(("text", "wanted"), CASES, ids=[c[0][:20] for c in CASES])
def test_grammar(text: str, wanted: list[float]) -> None:
    assert [n.value for n in numbers(text)] == pytest.approx(wanted)


@given(st.integers(-(10**12), 10**12))
def test_an_integer_reads_back_plain_with_commas_and_as_money(value: int) -> None:
    for written in (f"{value}", f"{value:,}", f"so ${value:,} left", f"is {value}."):
        assert [n.value for n in numbers(written)] == [value]


@given(st.text(alphabet="0123456789.,/-$% e^x{}\\frac\n", max_size=60))
def test_no_text_breaks_it_and_spans_stay_in_order(text: str) -> None:
    found = numbers(text)
    assert all(0 <= n.start < n.end <= len(text) for n in found)
    assert all(a.end <= b.start for a, b in zip(found, found[1:], strict=False))
