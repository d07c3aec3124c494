"""What a drawing leaves out of a graph: the order in which memory holds axes, and products of axes that nothing is about.

A reshape that another one takes back, the transposes around a product and the views that a layer needs are how a network
is written, not what it does. Axes keep the order that they come in, and the results get theirs back at the end.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from torchfolio.diagrams.graph import Draft, Graph, Value

__all__ = ["simplified", "without_views"]

MOVES = ("view", "transpose", "reshape")
BY_AXES = (*MOVES, "linear", "einsum")
"""Operations for which a product of axes is as good as its factors."""
MOST = 3
"""Axes of parts that are drawn as one split: the wires of each of them cross those of the others."""


def without_views(graph: Graph, steps: list[Draft]) -> list[Draft]:
    """Without operations that change nothing that is drawn; their results are uses of what they took."""
    kept = []
    for step in steps:
        if step.kind in MOVES[:2] and graph.visible(step.outputs[0]) == graph.visible(step.inputs[0]):
            step.outputs[0].origin = step.inputs[0]
        else:
            kept.append(step)
    return kept


def simplified(graph: Graph, steps: list[Draft]) -> list[Draft]:
    """The operations that are drawn, in order; the axes of their tensors, and the outputs of the graph, change in place."""
    values = {id(v): v for v in [*graph.inputs, *(v for s in steps for v in (*s.inputs, *s.outputs)), *graph.outputs]}
    for value in values.values():
        value.axes = graph.visible(value)
    _take_apart(graph, steps, list(values.values()))
    steps = _untangled(graph, steps, list(values.values()))
    return _parted(graph, _sunk(graph, steps))


# ------------------------------------------------------------------------------------------------ products of axes


def _take_apart(graph: Graph, steps: list[Draft], values: list[Value]) -> None:
    """Put factors in the place of products that nothing is about, so that fewer bars join and split axes."""
    chosen = _products(graph, steps)
    changed = True
    while changed:  # a use of a tensor has as many axes as the tensor
        changed = False
        for value in (v for v in values if v.origin is not None):
            for mine, theirs in zip(value.axes, graph.visible(value.root), strict=False):
                if (mine in chosen) != (theirs in chosen):
                    chosen -= {mine, theirs}
                    changed = True

    def parts(axis: int) -> list[int]:
        return [p for f in graph.factors[axis] for p in parts(graph.find(f))] if axis in chosen else [axis]

    for value in values:
        value.axes = [p for a in value.axes for p in parts(a) if graph.size[p] != 1]
    for step in steps:
        step.core = {p for a in step.core for p in parts(graph.find(a))}
        if step.kind == "reshape":
            step.core &= set(step.inputs[0].axes) ^ set(step.outputs[0].axes)


def _products(graph: Graph, steps: list[Draft]) -> set[int]:
    """Axes with factors that are split again, or heads that a linear map takes together."""
    split, joined, barred, mapped = set[int](), set[int](), set[int](), set[int]()
    for step in steps:
        core = {graph.find(a) for a in step.core}
        if step.kind not in BY_AXES or (step.kind == "reshape" and step.params.get("note")):
            barred |= core
        elif step.kind == "linear":
            mapped |= core & set(step.inputs[0].axes)
        elif step.kind == "reshape":
            split |= set(step.inputs[0].axes) - set(step.outputs[0].axes)
            joined |= set(step.outputs[0].axes) - set(step.inputs[0].axes)
    cut = {graph.find(a) for a in graph.cuts}
    known = {a for a, f in graph.factors.items() if len(f) > 1 and math.prod(graph.size[x] for x in f) == graph.size[a]}
    heads = {a for a in joined & mapped & known if any(graph.find(f) in cut for f in graph.factors[a])}
    return ((split & known) | heads) - barred


# ------------------------------------------------------------------------------------------------- the order of axes


def _untangled(graph: Graph, steps: list[Draft], values: list[Value]) -> list[Draft]:
    """Without transposes, but for those that give the outputs their order."""
    uses: dict[int, list[Value]] = defaultdict(list)
    for value in values:
        uses[id(value.root)].append(value)
    wanted = [list(v.axes) for v in graph.outputs]
    orders: dict[int, list[int]] = {}

    def turn(made: Value, order: Sequence[int]) -> None:
        orders[id(made)] = list(order)
        for value in uses[id(made)]:
            value.axes = [value.axes[i] for i in order]

    kept = []
    for step in steps:
        source = step.inputs[0] if step.inputs else None
        if source is None:
            kept.append(step)
        elif step.kind == "split":
            value = source
            while id(value) not in orders and value.origin is not None:
                value = value.origin
            order, cut = orders.get(id(value), list(range(len(source.axes)))), source.axes
            whole = len(step.outputs[0].axes) == len(source.axes)
            gone = None if whole else next(i for i, a in enumerate(cut) if a in step.core)
            place = None if gone is None else order[gone]
            order = [i - (place is not None and i > place) for i in order if i != place]
            for made in step.outputs:
                turn(made, order)
            kept.append(step)
        elif step.kind in MOVES and sorted(source.axes) == sorted(set(step.outputs[0].axes)):
            made = step.outputs[0]
            turn(made, [made.axes.index(a) for a in source.axes])
            made.origin = source
        else:
            for made in step.outputs:
                turn(made, _placed(step, made))
            kept.append(step)
    _beside(kept, graph.outputs)
    for i, (value, axes) in enumerate(zip(graph.outputs, wanted, strict=True)):
        if value.axes != axes:
            graph.outputs[i] = Value(axes, name=value.name)
            kept.append(Draft("transpose", [value], [graph.outputs[i]]))
    return kept


def _beside(steps: list[Draft], outputs: list[Value]) -> None:
    """Put the axes of a product side by side that a linear map takes together."""
    makers = {id(o): s for s in steps for o in s.outputs}
    uses = Counter(id(v.root) for v in [*(v for s in steps for v in s.inputs), *outputs])
    for step in (s for s in steps if s.kind == "linear"):
        value, root = step.inputs[0], step.inputs[0].root
        if uses[id(root)] == 1 and id(root) in makers and makers[id(root)].kind == "einsum":
            inside = [i for i, a in enumerate(value.axes) if a in step.core]
            order = [i for i in range(len(value.axes)) if i not in inside]
            order[inside[0] : inside[0]] = inside
            for each in {id(v): v for v in (value, root)}.values():
                each.axes = [each.axes[i] for i in order]


def _placed(step: Draft, made: Value) -> list[int]:
    """Places of the axes of a result in the order of what it comes from; new ones stand where old ones end."""
    if len(set(made.axes)) < len(made.axes):
        return list(range(len(made.axes)))
    inputs = sorted(step.inputs, key=lambda v: -len(v.axes)) if step.kind == "binary" else step.inputs
    before = list(dict.fromkeys(a for v in inputs for a in v.axes))
    order = [a for a in before if a in made.axes]
    new = [a for a in made.axes if a not in before]
    at = next((i for i, a in enumerate(inputs[0].axes) if a not in made.axes), None)
    if at is not None:
        at = sum(a in made.axes for a in inputs[0].axes[:at])
    for k, axis in enumerate(new):
        order.insert(made.axes.index(axis) if at is None else at + k, axis)
    return [made.axes.index(a) for a in order]


def _sunk(graph: Graph, steps: list[Draft]) -> list[Draft]:
    """With every index just before what takes its result and in its module, where one operation does."""
    users: dict[int, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for value in step.inputs:
            users[id(value.root)].append(i)
    leaving = {id(v.root) for v in graph.outputs}
    place = list(map(float, range(len(steps))))
    for i in reversed(range(len(steps))):
        step = steps[i]
        if step.kind == "index" and len(users[id(step.outputs[0])]) == 1 and id(step.outputs[0]) not in leaving:
            user = users[id(step.outputs[0])][0]
            if step.stack == steps[user].stack[: len(step.stack)]:
                place[i] = place[user] - 0.5 + i / (4 * len(steps))
                step.stack = steps[user].stack
    return [steps[i] for i in sorted(range(len(steps)), key=place.__getitem__)]


def _parted(graph: Graph, steps: list[Draft]) -> list[Draft]:
    """With one split in the place of several indices along the same axis of a tensor, where they are all its uses."""
    uses: dict[int, list[Draft | None]] = defaultdict(list)
    for step in steps:
        for value in step.inputs:
            uses[id(value.root)].append(step)
    for value in graph.outputs:
        uses[id(value.root)].append(None)
    gone, first = set[int](), dict[int, Draft]()
    for found in uses.values():
        parts = [s for s in found if s is not None and s.kind == "index" and len(s.core) == 1]
        if len(parts) < len(found) or len(parts) == 1:
            continue
        sources = [s.inputs[0] for s in parts]
        places = {next(iter(v.axes.index(a) for a in s.core)) for s, v in zip(parts, sources, strict=True)}
        entries = {s.params.get("index_text") for s in parts}
        if len(sources[0].axes) <= MOST + 1 and len(places) == 1 and len(entries) == len(parts):
            outputs, one = [o for s in parts for o in s.outputs], parts[0]
            first[id(one)] = Draft("split", [sources[0]], outputs, set(one.core), stack=one.stack, times=one.times)
            gone |= {id(s) for s in parts}
    return [first.get(id(s), s) for s in steps if id(s) in first or id(s) not in gone]
