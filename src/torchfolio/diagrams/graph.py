"""What a diagram is: operations on tensors whose axes have an identity.

An axis is known by where it comes from, never by its length: each operation says which axes of its result are axes of
its arguments, and which are new. Two axes that an operation sets against each other (an addition, the letters of a
product) are one.

A `Graph` is made by reading a module that was traced (`exported`), by composing expressions (`algebra`), or by
differentiating another graph (`vjp`). It is drawn (`assembly`), priced, compared, and written as Python (`compile`).

Longer than most because it holds the axes and the operations, which change together.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torchfolio.shown import Shown

__all__ = ["Draft", "Graph", "Value"]


@dataclass(eq=False)
class Value:
    """A tensor of a graph.

    Attributes:
        axes: identities of its axes, from the first to the last.
        origin: tensor of which this is one use. A use has axes of its own: those of keys and queries made from one
            tensor are not the same axis.
        name: name of an input, or of a weight in the state of the module.
        learned: whether it is a weight that is trained.
        whole: whether its entries are not of floating point, so that nothing is differentiated by them.
    """

    axes: list[int]
    origin: Value | None = None
    name: str = ""
    learned: bool = False
    whole: bool = False

    @property
    def root(self) -> Value:
        """The tensor itself, of which this is one use."""
        value = self
        while value.origin is not None:
            value = value.origin
        return value


@dataclass(eq=False)
class Draft:
    """An operation of a graph.

    Attributes:
        kind: name of the pictogram.
        inputs, outputs: tensors that it takes and gives.
        core: axes that it is about.
        params: settings of the pictogram.
        learned: whether it has weights that are trained.
        stack: modules that it is in, `(path, class)` from the outermost on.
        weights: tensors that it takes beside its inputs and that are not drawn.
        code: Python for it where its axes do not say it: `{0}` stands for an input, `{w0}` for a weight, `{s0}` for a
            length.
        sizes: lengths that `code` speaks of: axes, or formulas in the lengths of the inputs' axes.
        pure: `code` without side effects, where it has any.
        weave: axes that it is broadcast along: all others of its inputs and outputs.
        times: number of times that it is done, where it stands for several that are repeated.
    """

    kind: str
    inputs: list[Value]
    outputs: list[Value]
    core: set[int] = field(default_factory=set)
    params: dict[str, Any] = field(default_factory=dict)
    learned: bool = False
    stack: tuple[tuple[str, str], ...] = ()
    weights: list[Value] = field(default_factory=list)
    code: str = ""
    sizes: list[Any] = field(default_factory=list)
    pure: str = ""
    weave: set[int] = field(default_factory=set)
    times: int = 1


class Graph(Shown):
    """Operations in an order in which they can be run.

    Attributes:
        inputs, outputs: tensors.
        steps: operations.
        constants: operations on weights alone, which are not drawn.
        weights: parameters, buffers and constants by name.
        saved: names of those weights that the state of a module holds.
        name, size: names and lengths of all axes.
        symbols: formulas of the axes whose length is one.
        factors: axes of which another was made, or into which it was taken apart, by that axis.
        cuts: axis and the other part, by a part of the axis.
        twins: axis of a tensor, by the axis that another use of the tensor has.
        stated: axes whose length is a number that the network states.
        functions: functions that operations call, by name.
        unknown: names of operations that have no sign.
        named: whether the names of the axes are to stand in the drawing as they are.
    """

    def __init__(self) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.named = False
        self.parent: list[int] = []
        self.name: list[str] = []
        self.size: list[int] = []
        self.symbols: dict[int, Any] = {}
        self.factors: dict[int, list[int]] = {}
        self.cuts: dict[int, tuple[int, int]] = {}
        self.twins: dict[int, int] = {}
        self.stated: set[int] = set()
        self.inputs: list[Value] = []
        self.outputs: list[Value] = []
        self.steps: list[Draft] = []
        self.constants: list[Draft] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.saved: set[str] = set()
        self.copies: list[Value] = []
        self.branches: list[tuple[int, int]] = []
        self.unknown: list[str] = []
        self._stack: tuple[tuple[str, str], ...] = ()

    # -- axes

    def axis(self, name: str, size: int | torch.SymInt) -> int:
        """A new axis; its length may be a formula, as `torch.export` gives those that can vary."""
        made = len(self.parent)
        self.parent.append(made)
        self.name.append(name)
        self.size.append(hint(size))
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
            self.symbols[made] = size.node.expr
        return made

    def find(self, axis: int) -> int:
        while self.parent[axis] != axis:
            axis = self.parent[axis]
        return axis

    def unite(self, one: int, other: int) -> int:
        one, other = self.find(one), self.find(other)
        if one != other:
            self.parent[max(one, other)] = min(one, other)
            if not self.name[min(one, other)]:  # axes of weights have no name of their own
                self.name[min(one, other)] = self.name[max(one, other)]
        return min(one, other)

    def twin(self, axis: int) -> int:
        """A new axis like another, with factors of its own."""
        made = self.axis(self.name[axis], self.size[axis])
        self.twins[made] = axis
        if axis in self.symbols:
            self.symbols[made] = self.symbols[axis]
        if self.find(axis) in self.factors:
            self.factors[made] = [self.twin(f) for f in self.factors[self.find(axis)]]
        return made

    def merge(self, one: int, other: int) -> int:
        """Make two axes one, and their factors too."""
        a, b = (self.factors.get(self.find(x)) for x in (one, other))
        root = self.unite(one, other)
        if a and b and [self.size[x] for x in a] == [self.size[x] for x in b]:
            for x, y in zip(a, b, strict=True):
                self.merge(x, y)
        elif a or b:
            self.factors[root] = a or b or []
        return root

    def factored(self, axis: int) -> list[int]:
        """An axis as the factors that it was made of, or taken apart into."""
        axis = self.find(axis)
        return [f for part in self.factors[axis] for f in self.factored(part)] if axis in self.factors else [axis]

    def regrouped(self, before: Sequence[int], sizes: Sequence[int]) -> list[int] | None:
        """Axes of given sizes in place of others of the same product, by way of factors common to both.

        None where they have none, as of 4 and 3 in place of 6 and 2.
        """
        parts: list[list[int]] = [[] for _ in sizes]
        cuts: list[tuple[int, list[int]]] = []
        queue = [(self.find(a), self.size[a]) for a in before][::-1]
        for part, size in zip(parts, sizes, strict=True):
            while size > 1:
                axis, length = queue.pop()
                if size % length and length % size:
                    return None
                if length <= size:
                    part.append(axis)
                    size //= length
                    continue
                # The axis is cut: its first factor belongs here, the rest to what follows.
                one, other = self.axis("h", size), self.axis("k", length // size)
                cuts.append((axis, [one, other]))
                self.cuts |= {one: (axis, other), other: (axis, one)}
                part.append(one)
                queue.append((other, length // size))
                size = 1
        self.factors |= dict(cuts)
        return [self._product(part) for part in parts]

    def _product(self, parts: Sequence[int]) -> int:
        """The axis that runs over several others; the same one for the same others."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return self.axis("", 1)
        key = [self.find(a) for a in parts]
        for axis, factors in self.factors.items():
            if [self.find(f) for f in factors] == key:
                return axis
        made = self.axis("m", math.prod(self.size[a] for a in parts))
        self.factors[made] = list(parts)
        return made

    # -- operations

    def add(
        self, kind: str, inputs: Sequence[Value], outputs: Sequence[Value], core: Iterable[int] = (), **more: Any
    ) -> Value:
        """Put an operation at the end; what `more` has beside the fields of a `Draft` are its `params`."""
        own = {k: more.pop(k) for k in ("learned", "weights", "code", "sizes", "pure", "stack") if k in more}
        own["learned"] = bool(own.get("learned", False))
        step = Draft(kind, list(inputs), list(outputs), set(core), more, **{"stack": self._stack, **own})
        self.steps.append(step)
        return outputs[0]

    def use(self, value: Value) -> Value:
        """One of several uses of a tensor, with axes of its own."""
        made = Value([self.twin(a) for a in value.axes], value.root)
        self.copies.append(made)
        return made

    def visible(self, value: Value) -> list[int]:
        """The axes of a tensor that are drawn: those of length one are not."""
        return [self.find(a) for a in value.axes if self.size[a] != 1]

    def members(self) -> dict[int, list[int]]:
        """All identities that came to be one axis, by the one that stands for them."""
        found: dict[int, list[int]] = defaultdict(list)
        for axis in range(len(self.parent)):
            found[self.find(axis)].append(axis)
        return found

    def alive(self, outputs: Sequence[Value] | None = None) -> list[Draft]:
        """The operations that some tensors depend on, the outputs by default."""
        wanted = {id(v.root) for v in (self.outputs if outputs is None else outputs)}
        kept = []
        for step in reversed(self.steps):
            if any(id(o) in wanted for o in step.outputs):
                kept.append(step)
                wanted |= {id(v.root) for v in step.inputs}
        return kept[::-1]

    def settle(self, apart: bool = False) -> None:
        """Decide which axes are one, once everything is read, and over which axes each operation is woven.

        Args:
            apart: whether to keep the axes of every weight apart, so that a product with it can be written by its axes.
        """
        steps = self.alive()
        self._merge_copies(steps, [w for s in steps for w in s.weights] if apart else [])
        for step in steps:
            core = {self.find(a) for a in step.core}
            step.weave = {self.find(a) for v in (*step.inputs, *step.outputs) for a in v.axes} - core

    def _merge_copies(self, steps: list[Draft], weights: list[Value]) -> None:
        """Axes of a copy are those of its origin, unless a tensor would have one axis twice.

        The only use of a tensor is no copy of it.
        """
        used = [v for s in steps for v in s.inputs] + self.outputs
        uses = Counter(id(v.origin) for v in used)
        own = {id(v) for v in self.copies}
        for value in used:
            if value.origin is not None and uses[id(value.origin)] == 1 and id(value) in own:
                for mine, theirs in zip(value.axes, value.origin.axes, strict=True):
                    self.merge(mine, theirs)
        where: dict[int, set[int]] = defaultdict(set)
        values = [*self.inputs, *used, *(o for s in steps for o in s.outputs), *weights]
        for i, value in enumerate(values):
            for axis in value.axes:
                where[self.find(axis)].add(i)
        copies = [(m, t) for v in used if v.origin is not None for m, t in zip(v.axes, v.origin.axes, strict=True)]
        for mine, theirs in [*self.branches, *copies]:
            a, b = self.find(mine), self.find(theirs)
            if a != b and not where[a] & where[b]:
                together = where[a] | where[b]
                where[self.merge(a, b)] = together

    def copy(self) -> Graph:
        """A graph of its own on the same weights."""
        return copy.deepcopy(self, {id(self.weights): self.weights})


def hint(size: int | torch.SymInt) -> int:
    """A length as a number: of one that can vary, or depends on values, that of the example."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            return int(size.node.expr.xreplace(size.node.shape_env.real_tensor_prop_unbacked_vals))
        return int(size.node.hint)
    return int(size)
