"""Time and memory read off a diagram: products of the axes that an operation is about and of those it is woven over."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import sympy

from torchfolio.diagrams.sheet import Sheet, Step, Wire

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What a diagram says of time and memory.

    Attributes:
        flops: floating-point operations of every operation by its index: two for each product of a contraction (linear,
            convolution, einsum), as `torch.utils.flop_counter` counts, a polynomial in the names of axes; 0 for all
            others.
        operations: one for every element that another operation gives, likewise; 0 for what only moves data.
        memory: elements alive at every column of data, weights aside.
        working: elements alive while the operations of a column are under way: what goes in and what comes out.
        sizes: lengths of the axes by name.
        fixed: kinds of operations without a formula in the names of axes that were counted at the lengths of the
            example, by torch's own formulas.
        uncounted: kinds of operations that could not be counted; their floating-point operations are missing.
        kinds: `(kind, path)` of every operation.
        depth: columns of operations: the time with unlimited parallel hardware.
    """

    flops: tuple[sympy.Expr, ...]
    operations: tuple[sympy.Expr, ...]
    memory: tuple[sympy.Expr, ...]
    working: tuple[sympy.Expr, ...]
    sizes: Mapping[str, int]
    kinds: tuple[tuple[str, str], ...]
    depth: int
    fixed: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    def total(self, **sizes: int) -> int:
        """Floating-point operations of the whole, of other sizes where they are given.

        Warns of operations that are not counted, and at other sizes of those that are counted at the example's.
        """
        if self.uncounted:
            warnings.warn(f"not counted: {', '.join(self.uncounted)}", stacklevel=2)
        if self.fixed and any(self.sizes.get(name) != size for name, size in sizes.items()):
            warnings.warn(f"counted at the sizes of the example: {', '.join(self.fixed)}", stacklevel=2)
        return self._value(sum(self.flops, sympy.Integer(0)), sizes)

    def peak(self, **sizes: int) -> int:
        """Most elements alive at one column of data."""
        return max(self._value(m, sizes) for m in self.memory)

    def working_peak(self, **sizes: int) -> int:
        """Most elements alive at any time, in the midst of operations too."""
        return max(self._value(m, sizes) for m in (*self.memory, *self.working))

    def polynomial(self) -> sympy.Expr:
        """Floating-point operations of the whole, in the names of axes."""
        return sympy.expand(sum(self.flops, sympy.Integer(0)))

    def _value(self, expression: sympy.Expr, sizes: Mapping[str, int]) -> int:
        unknown = [name for name in sizes if name not in self.sizes]
        if unknown:
            raise ValueError(f"the diagram has no axis {unknown[0]!r}; its axes are {', '.join(self.sizes)}")
        known: dict[Any, Any] = {
            sympy.Symbol(n, positive=True, integer=True): s for n, s in {**self.sizes, **sizes}.items()
        }
        return int(expression.subs(known))

    def to_frame(self, **sizes: int) -> pd.DataFrame:
        """A row for every operation: `kind`, `path`, `flops` and `operations` as formulas and as numbers."""
        import pandas as pd

        rows = [
            {"kind": kind, "path": path, "flops": self._value(f, sizes), "flops_formula": str(f),
             "operations": self._value(o, sizes), "operations_formula": str(o)}
            for (kind, path), f, o in zip(self.kinds, self.flops, self.operations, strict=True)
        ]  # fmt: skip
        return pd.DataFrame(rows)


def cost_of(sheet: Sheet) -> Cost:
    """Read time and memory off a diagram.

    A contraction costs the product of all distinct axes of what goes in and comes out, doubled; a convolution its output
    positions times window, channels in and channels out over groups; an elementwise operation its axes.
    """
    steps = [step for column in sheet.columns for step in column]
    wires = [w for level in sheet.levels for t in level for w in t.wires]
    sizes = {name_of(w): int(w.size) for w in wires}
    memory = tuple(sum((_product(t.wires) for t in level), sympy.Integer(0)) for level in sheet.levels)
    working = tuple(
        sum((_product(t.wires) for t in {t.key: t for t in (*a, *b)}.values()), sympy.Integer(0))
        for a, b in pairwise(sheet.levels)
    )
    priced = [_price(step) for step in steps]
    return Cost(
        tuple(s.times * f for s, (f, _) in zip(steps, priced, strict=True)),
        tuple(s.times * o for s, (_, o) in zip(steps, priced, strict=True)), memory, working, sizes,
        tuple((s.kind, s.path) for s in steps), len(sheet.columns),
        tuple(sorted({s.kind for s in steps if s.params.get("counted")})),
        tuple(sorted({s.kind for s in steps if s.params.get("counted", 0) is None})),
    )  # fmt: skip


def name_of(wire: Wire) -> str:
    """The name of an axis as it is set; the two lines of a group get numbers."""
    text = "".join(s.text for s in wire.label)
    return f"{text}_{'w' if wire.twin else 'h'}" if wire.twin or wire.heads else text


def axis_symbols(sheet: Sheet) -> dict[int, sympy.Symbol]:
    """Names of the axes of a graph that a sheet was made of, as the costs have them."""
    wires = [w for level in sheet.levels for t in level for w in t.wires]
    return {int(w.axis.removeprefix("a")): _symbol(w) for w in reversed(wires)}


def _symbol(wire: Wire) -> sympy.Symbol:
    return sympy.Symbol(name_of(wire), positive=True, integer=True)


def _product(wires: Iterable[Wire]) -> sympy.Expr:
    """Product of the axes, each once."""
    distinct = {w.axis: _symbol(w) for w in wires}
    return sympy.Mul(*distinct.values())


def _price(step: Step) -> tuple[sympy.Expr, sympy.Expr]:
    """Floating-point operations of contractions, and of the rest."""
    nothing = sympy.Integer(0)
    if step.kind in ("linear", "einsum"):
        return 2 * _product([*step.in_wires, *step.out_wires]), nothing
    if step.kind in ("conv", "conv weight"):
        spatial, wires = step.params.get("spatial", set()), [*step.in_wires, *step.out_wires]
        if step.kind == "conv":
            placed = step.in_wires if step.params.get("transposed") else step.out_wires
        else:  # the derivative by the weight costs as much as the convolution
            wires, placed = step.inputs[0].wires, step.inputs[1].wires
        across = [w for w in wires if w.axis in step.core and w.axis not in spatial]
        window = sympy.Rational(int(step.params.get("window", 1)), int(step.params.get("groups", 1)))
        return 2 * window * _product([*placed, *across]), nothing
    if step.kind == "pool":
        return nothing, int(step.params.get("window", 1)) * _product(step.out_wires)
    if step.kind == "reduce":
        return nothing, _product(step.in_wires)
    if step.kind in ("elementwise", "binary", "softmax", "norm", "dropout"):
        return nothing, _product(step.out_wires)
    if step.params.get("counted"):
        return sympy.Integer(step.params["counted"]), nothing
    return nothing, nothing  # copies, views, bars and tags move data
