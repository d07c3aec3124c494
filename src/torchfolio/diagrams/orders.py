"""In which order the products of a diagram are best taken.

Contractions are linear, so they may be shifted past each other: `q (k v)` is `(q k) v` for far less work where the
sequence is long. A chain of contractions is one product of several tensors; all orders of taking it in pairs are priced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import sympy

from torchfolio.diagrams.graph import Draft, Graph, Value

__all__ = ["ContractionOrder", "contraction_orders"]

MOST = 10
"""Tensors in a product of which all orders are tried; their number grows as the third power of three to that number."""


@dataclass(frozen=True)
class ContractionOrder:
    """A product of several tensors, as it is taken and as it is best taken.

    Attributes:
        signature: axes of the whole product, `y k, x k, x l -> y l`.
        now: floating-point operations of the order that the diagram has, two for each product, in the names of axes.
        best: those of the best order for the sizes of the diagram.
        order: signatures of that order, pair by pair.
        saving: operations of the present order over those of the best, at the sizes of the diagram.
    """

    signature: str
    now: sympy.Expr
    best: sympy.Expr
    order: tuple[str, ...]
    saving: float


def contraction_orders(graph: Graph, symbols: Mapping[int, sympy.Symbol]) -> list[ContractionOrder]:
    """The products of three tensors or more in a graph, those that gain most from another order first.

    Args:
        graph: whose contractions are looked at. Multiplication by a number between two contractions is no obstacle.
        symbols: names of its axes.
    """
    found = [_ordered(graph, symbols, *product) for product in _products(graph)]
    return sorted(found, key=lambda o: -o.saving)


def _products(graph: Graph) -> Iterator[tuple[list[Value], Value, list[Draft]]]:
    """Contractions that follow each other, with nothing but numbers between: their tensors, their result, themselves."""
    steps = graph.alive()
    maker = {id(o): s for s in steps for o in s.outputs}
    uses = Counter(id(v.root) for v in [*(v for s in steps for v in s.inputs), *graph.outputs])

    def inner(value: Value) -> Draft | None:
        """The contraction that a tensor comes from, if nothing else uses it."""
        step = maker.get(id(value.root))
        alone = step is not None and uses[id(value.root)] == 1
        if alone and step is not None and step.kind == "elementwise" and step.params.get("linear"):
            return inner(step.inputs[0])
        return step if alone and step is not None and step.kind == "einsum" else None

    def leaves(step: Draft) -> tuple[list[Value], list[Draft]]:
        tensors: list[Value] = []
        members = [step]
        for value in step.inputs:
            before = inner(value)
            if before is None:
                tensors.append(value)
            else:
                own, more = leaves(before)
                tensors += own
                members += more
        return tensors, members

    taken: set[int] = set()
    for step in reversed(steps):
        if step.kind == "einsum" and id(step) not in taken:
            tensors, members = leaves(step)
            taken |= {id(m) for m in members}
            axes = [graph.visible(v) for v in tensors]
            if 3 <= len(tensors) <= MOST and all(len(set(a)) == len(a) for a in axes):
                yield tensors, step.outputs[0], members


def _ordered(
    graph: Graph, symbols: Mapping[int, sympy.Symbol], tensors: Sequence[Value], result: Value, members: Sequence[Draft]
) -> ContractionOrder:
    axes, out = [frozenset(graph.visible(v)) for v in tensors], frozenset(graph.visible(result))

    def price(one: frozenset[int], other: frozenset[int]) -> int:
        return 2 * math.prod(graph.size[a] for a in one | other)

    def named(own: frozenset[int]) -> str:
        return " ".join(sorted((str(symbols[a]) for a in own), key=lambda n: (len(n), n))) or "1"

    def formula(pairs: Sequence[tuple[frozenset[int], frozenset[int]]]) -> sympy.Expr:
        return sympy.Add(*(2 * sympy.Mul(*(symbols[a] for a in one | other)) for one, other in pairs))

    now = [(inputs[0], frozenset[int]().union(*inputs[1:])) for inputs in
           ([frozenset(graph.visible(v)) for v in member.inputs] for member in members)]  # fmt: skip
    least, best = _cheapest(axes, out, price)
    order = tuple(f"{named(one)}, {named(other)} -> {named(made)}" for one, other, made in best)
    whole = f"{', '.join(' '.join(str(symbols[a]) for a in graph.visible(v)) for v in tensors)} -> "
    whole += " ".join(str(symbols[a]) for a in graph.visible(result))
    saving = sum(price(*pair) for pair in now) / least
    return ContractionOrder(whole, formula(now), formula([pair[:2] for pair in best]), order, saving)


def _cheapest(
    axes: Sequence[frozenset[int]], out: frozenset[int], price: Callable[[frozenset[int], frozenset[int]], int]
) -> tuple[int, tuple[tuple[frozenset[int], frozenset[int], frozenset[int]], ...]]:
    """The least price of a product of tensors of given axes, and its pairs: axes of the one, the other, their product."""
    every = frozenset(range(len(axes)))

    @cache
    def left(of: frozenset[int]) -> frozenset[int]:
        """Axes of the product of some of the tensors: those that the others or the result have too."""
        inside = frozenset[int]().union(*(axes[i] for i in of))
        return inside & out.union(*(axes[i] for i in every - of))

    @cache
    def best(of: frozenset[int]) -> tuple[int, tuple[tuple[frozenset[int], frozenset[int], frozenset[int]], ...]]:
        if len(of) == 1:
            return 0, ()
        first, options = min(of), []
        rest = sorted(of - {first})
        for count in range(len(rest)):
            for others in combinations(rest, count):
                one = frozenset([first, *others])
                (a, before), (b, more) = best(one), best(of - one)
                pair = left(one), left(of - one)
                options.append((a + b + price(*pair), (*before, *more, (*pair, left(of)))))
        return min(options, key=lambda o: o[0])

    return best(every)
