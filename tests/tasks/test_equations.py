"""Worked equations of word problems."""

import pytest

from inlay.tasks.equations import worked


@pytest.mark.parametrize(
    ("equation", "answer", "wanted"),
    [
        ("X=((22.0-14.0)/4.0)", 2.0, "22 - 14 = 8. 8 / 4 = 2. The answer is 2"),
        ("x=3*6", 18.0, "3 * 6 = 18. The answer is 18"),
        ("X=((5.0+2.0)-3.0)", "4", "5 + 2 = 7. 7 - 3 = 4. The answer is 4"),
        ("x=5-(2-1)", 4, "2 - 1 = 1. 5 - 1 = 4. The answer is 4"),
        ("x=8/(4/2)", 4, "4 / 2 = 2. 8 / 2 = 4. The answer is 4"),
        ("hours=4.0*0.5/3.0", 0.6667, "4 * 0.5 = 2. 2 / 3 = 0.6667. The answer is 0.6667"),
        ("number=1.477/-7.0", -0.211, "1.477 / (-7) = -0.211. The answer is -0.211"),
        ("( 8.0 - 3.0 )", 5, "8 - 3 = 5. The answer is 5"),
        ("x=3*(2-7)", -15, "2 - 7 = -5. 3 * (-5) = -15. The answer is -15"),
        ("x=5", 5, "The answer is 5"),
    ],
)
def test_one_operation_a_step(equation: str, answer: float | str, wanted: str) -> None:
    assert worked(equation, answer) == wanted


@pytest.mark.parametrize(
    ("equation", "answer"),
    [
        ("x=2+2", 5),
        ("X-6=52", "58"),
        ("7=3+x", 4),
        ("X=0.32=0.21", "0.53"),
        ("x=1/0", 0),
        ("x=__import__('os').getpid()", 1),
        ("x=2**3", 8),
        ("x=True+1", 2),
        ("x=", 0),
        ("x=2", "two"),
    ],
)
def test_what_is_unsolved_wrong_or_no_arithmetic_is_left_out(equation: str, answer: float | str) -> None:
    assert worked(equation, answer) is None
