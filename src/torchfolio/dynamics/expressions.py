"""Formulas as expression trees in prefix order: evaluated on NumPy arrays and torch tensors, changed, written out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["BINARY", "UNARY", "Expression", "Node", "mutate", "random_expression", "without_one_operator"]

Node = str | int | float
"""An operator, the number of a variable, or a constant."""

BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
}
"""Operators of two arguments, by sign."""
UNARY = ("sin", "cos", "tan", "tanh", "exp", "log", "sqrt", "abs", "square")
"""Operators of one argument."""


@dataclass(frozen=True)
class Expression:
    """A formula.

    Args:
        nodes: tree in prefix order: operators as text, variables as `int`, constants as `float`.

    >>> Expression(("/", 0, "+", 1.0, 0))  # x0 / (1 + x0)
    x0/(x0 + 1.0)
    """

    nodes: tuple[Node, ...]

    @property
    def complexity(self) -> int:
        """Number of nodes."""
        return len(self.nodes)

    @property
    def constants(self) -> list[float]:
        """Constants, in their order in the tree."""
        return [node for node in self.nodes if isinstance(node, float)]

    def with_constants(self, values: Sequence[Any]) -> Expression:
        """The same formula with other constants."""
        rest = iter(values)
        return Expression(tuple(float(next(rest)) if isinstance(node, float) else node for node in self.nodes))

    def evaluate(self, columns: Sequence[Any], constants: Sequence[Any] | None = None) -> Any:
        """Value on columns of data.

        Args:
            columns: one NumPy array or torch tensor a variable.
            constants: numbers, or scalar tensors that want gradients, in place of the constants.

        Returns:
            array or tensor; a number if no variable occurs.
        """
        values = list(self.constants if constants is None else constants)
        stack: list[Any] = []
        for node in reversed(self.nodes):
            if isinstance(node, float):
                stack.append(values.pop())
            elif isinstance(node, int):
                stack.append(columns[node])
            elif node in BINARY:
                a, b = stack.pop(), stack.pop()
                try:
                    stack.append(BINARY[node](a, b))
                except (ZeroDivisionError, OverflowError):
                    stack.append(float("nan"))
            else:
                stack.append(_unary(node, stack.pop()))
        return stack.pop()

    def to_sympy(self, names: Sequence[str] | None = None) -> Any:
        """As a sympy expression.

        Args:
            names: names of the variables; x0, x1, … if None.
        """
        import sympy

        stack: list[Any] = []
        for node in reversed(self.nodes):
            if isinstance(node, float):
                stack.append(sympy.Float(node))
            elif isinstance(node, int):
                stack.append(sympy.Symbol(f"x{node}" if names is None else names[node]))
            elif node in BINARY:
                stack.append(BINARY[node](stack.pop(), stack.pop()))
            elif node == "square":
                stack.append(stack.pop() ** 2)
            else:
                stack.append(getattr(sympy, "Abs" if node == "abs" else node)(stack.pop()))
        return stack.pop()

    def __repr__(self) -> str:
        return str(self.to_sympy())


def _unary(name: str, value: Any) -> Any:
    if name == "square":
        return value * value
    if isinstance(value, float | int | np.ndarray | np.generic):
        return getattr(np, name)(value)
    return getattr(value, name)()  # torch tensors


def arity(node: Node) -> int:
    """Number of a node's children."""
    return 0 if not isinstance(node, str) else 2 if node in BINARY else 1


def subtree(nodes: Sequence[Node], start: int) -> int:
    """End of the subtree that begins at an index."""
    wanted, end = 1, start
    while wanted:
        wanted += arity(nodes[end]) - 1
        end += 1
    return end


def random_expression(rng: random.Random, variables: int, unary: Sequence[str], size: int) -> list[Node]:
    """A random tree of at most about `size` nodes."""
    if size < 3 or rng.random() < 0.3:
        return [rng.randrange(variables) if rng.random() < 0.6 else rng.gauss(0, 1)]
    if unary and rng.random() < 0.3:
        return [rng.choice(unary), *random_expression(rng, variables, unary, size - 1)]
    left = random_expression(rng, variables, unary, (size - 1) // 2)
    return [rng.choice("+-*/"), *left, *random_expression(rng, variables, unary, (size - 1) // 2)]


def mutate(
    nodes: Sequence[Node], other: Sequence[Node], rng: random.Random, variables: int, unary: Sequence[str]
) -> list[Node]:
    """A changed copy of a tree.

    A constant is jittered (0.4), an operator or a leaf swapped (0.15), one inserted (0.15) or deleted (0.1), a subtree
    replaced by a random one (0.1) or by one of another tree (0.05), or constants are folded (0.05).

    Args:
        nodes: tree.
        other: tree that crossover takes a subtree from.
        rng: generator.
        variables: number of variables.
        unary: unary operators.
    """
    nodes, draw = list(nodes), rng.random()
    at = rng.randrange(len(nodes))
    if draw < 0.4:
        constants = [i for i, node in enumerate(nodes) if isinstance(node, float)]
        if constants:
            i = rng.choice(constants)
            nodes[i] = float(nodes[i]) * rng.gauss(1, 0.3) + rng.gauss(0, 0.1)
            return nodes
        draw = 0.4  # there is none: swap instead
    if draw < 0.55:
        node = nodes[at]
        if arity(node) == 2:
            nodes[at] = rng.choice("+-*/")
        elif arity(node) == 1:
            nodes[at] = rng.choice(unary)
        else:
            nodes[at] = random_expression(rng, variables, unary, 1)[0]
    elif draw < 0.7:
        end = subtree(nodes, at)
        if unary and rng.random() < 0.3:
            nodes[at:end] = [rng.choice(unary), *nodes[at:end]]
        else:
            pair = [nodes[at:end], random_expression(rng, variables, unary, 1)]
            rng.shuffle(pair)
            nodes[at:end] = [rng.choice("+-*/"), *pair[0], *pair[1]]
    elif draw < 0.8:
        if arity(nodes[at]):
            first = subtree(nodes, at + 1)
            end = subtree(nodes, at)
            keep = nodes[at + 1 : first] if first == end or rng.random() < 0.5 else nodes[first:end]
            nodes[at:end] = keep
    elif draw < 0.9:
        nodes[at : subtree(nodes, at)] = random_expression(rng, variables, unary, 5)
    elif draw < 0.95:
        begin = rng.randrange(len(other))
        nodes[at : subtree(nodes, at)] = other[begin : subtree(other, begin)]
    else:
        nodes = fold(nodes)
    return nodes


def without_one_operator(nodes: Sequence[Node]) -> Iterator[list[Node]]:
    """Trees in which one operator has given way to one of its operands."""
    nodes = list(nodes)
    for at, node in enumerate(nodes):
        if arity(node):
            first, end = subtree(nodes, at + 1), subtree(nodes, at)
            yield nodes[:at] + nodes[at + 1 : first] + nodes[end:]
            if first < end:
                yield nodes[:at] + nodes[first:end] + nodes[end:]


def fold(nodes: Sequence[Node]) -> list[Node]:
    """Replace subtrees without variables by their value."""
    result, at = [], 0
    while at < len(nodes):
        end = subtree(nodes, at)
        part = tuple(nodes[at:end])
        if len(part) > 1 and not any(isinstance(node, int) for node in part):
            with np.errstate(all="ignore"):
                result.append(float(Expression(part).evaluate(())))
            at = end
        else:
            result.append(nodes[at])
            at += 1
    return result
