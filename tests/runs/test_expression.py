"""Conditions: what they may say, and that nothing else runs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchfolio.runs.expression import ExpressionError, holds, names


@pytest.mark.parametrize(
    ("expression", "true"),
    [
        ("a >= b - 2", True),
        ("a >= b", False),
        ("a < b < 4", True),
        ("a >= b - 2 and a > 5", False),
        ("a > 5 or not b > 5", True),
        ("abs(a - b) <= 0.7 * max(a, b)", True),
        ("a / 0 > 1", False),
        ("-a < 0", True),
    ],
)
def test_conditions(expression, true):
    assert holds(expression, {"a": 1.0, "b": 3.0}) is true


def test_not_a_number_never_holds():
    assert not holds("a != b", {"a": float("nan"), "b": 1.0})
    assert holds("b == 1", {"a": float("nan"), "b": 1.0})


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "a.real > 1",
        "a[0] > 1",
        "(lambda: 1)() > 0",
        "print(a) > 1",
        "a",
        "a + 1",
        "a >",
        "'x' > a",
        "c > 1",
        "",
    ],
)
def test_nothing_else_is_allowed(expression):
    with pytest.raises(ExpressionError):
        holds(expression, {"a": 1.0, "b": 2.0})


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_agrees_with_python(a, b):
    assert holds("a * 2 - b >= min(a, b)", {"a": a, "b": b}) == (a * 2 - b >= min(a, b))


def test_names():
    assert names("abs(x - y) < z and x > 1") == {"x", "y", "z"}
