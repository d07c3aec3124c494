"""Conditions on measured values, written as text so that a report can show the threshold beside the figure."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"abs": abs, "min": min, "max": max, "log10": math.log10, "sqrt": math.sqrt}


class ExpressionError(ValueError):
    """A condition cannot be read, or speaks of something that was not measured."""


def holds(expression: str, values: Mapping[str, float]) -> bool:
    """Whether a condition holds for measured values.

    It may compare (also in chains), join with `and`, `or`, `not`, calculate, and call abs, min, max, log10, sqrt.
    Nothing else is run. With a value that is not a number among those it names it does not hold.

    Args:
        expression: such as `"ours >= baseline - 2"`.
        values: measured values by name.

    Raises:
        ExpressionError: if it cannot be read, names something unknown, or is no condition.
    """
    tree = parse(expression, values)
    if any(math.isnan(values[name]) for name in names(expression)):
        return False
    try:
        result = _value(tree, values)
    except ArithmeticError:
        return False
    return bool(result)


def names(expression: str) -> set[str]:
    """The values that a condition names."""
    tree = _parsed(expression)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - called


def parse(expression: str, values: Mapping[str, float]) -> ast.expr:
    """Check a condition before anything is measured with it.

    Raises:
        ExpressionError: see `holds`.
    """
    tree = _parsed(expression)
    _check(tree, expression)
    unknown = sorted(names(expression) - set(values))
    if unknown:
        raise ExpressionError(
            f"{expression!r} speaks of {unknown[0]!r}; measured are {', '.join(values) or 'no values'}"
        )
    if not isinstance(tree, ast.Compare | ast.BoolOp) and not (
        isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not)
    ):
        raise ExpressionError(f"{expression!r} is no condition, expected a comparison such as 'a >= b'")
    return tree


def _parsed(expression: str) -> ast.expr:
    try:
        return ast.parse(expression, mode="eval").body
    except SyntaxError as error:
        raise ExpressionError(f"{expression!r} cannot be read: {error.msg}") from error


def _check(node: ast.expr, expression: str) -> None:
    children: list[ast.expr]
    match node:
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
            children = [left, *rest]
        case ast.BoolOp(values=values):
            children = values
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            children = [left, right]
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _ARITHMETIC:
            children = [operand]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            children = args
        case ast.Constant(value=int() | float()) | ast.Name():
            children = []
        case _:
            raise ExpressionError(f"{expression!r} has {ast.unparse(node)!r}, which is not allowed in a condition")
    for child in children:
        _check(child, expression)


def _value(node: ast.expr, values: Mapping[str, float]) -> Any:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=rest):
            sides = [_value(side, values) for side in (left, *rest)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(_value(part, values) for part in parts)
        case ast.BinOp(left=left, op=op, right=right):
            return _ARITHMETIC[type(op)](_value(left, values), _value(right, values))
        case ast.UnaryOp(op=op, operand=operand):
            return _ARITHMETIC[type(op)](_value(operand, values))
        case ast.Call(func=ast.Name(id=name), args=args):
            return _FUNCTIONS[name](*(_value(arg, values) for arg in args))
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[name]
    raise ExpressionError(f"cannot evaluate {ast.unparse(node)!r}")
