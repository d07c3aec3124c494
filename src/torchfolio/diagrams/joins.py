"""Pictograms in which tensors part and meet: copies, sums, concatenations, splits, contractions, memory."""

from __future__ import annotations

from collections.abc import Sequence

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.shapes import Command, Path, ease, polyline
from torchfolio.diagrams.sheet import Step, Wire
from torchfolio.diagrams.strokes import (
    MEMORY_FACE,
    Drawn,
    Place,
    Plan,
    boxed,
    dot,
    floating,
    letters,
    memory_name,
    regular,
)


def copy(step: Step) -> Plan:
    """Every wire has a dot, from which it goes on to each of the copies."""

    def draw(place: Place) -> Drawn:
        drawn = Drawn()
        x = place.x0 + 6
        (source,) = step.inputs
        for i, wire in enumerate(source.wires):
            y0 = place.ins[wire.key]
            first = step.outputs[0].wires[i]
            drawn.through[wire.key] = (("L", (x, y0)), *ease(x, y0, place.x1, place.outs[first.key]))
            drawn.parts.append(dot(x, y0))
            for tensor in step.outputs[1:]:
                other = tensor.wires[i]
                drawn.starts[other.key] = (("M", (x, y0)), *ease(x, y0, place.x1, place.outs[other.key]))
        return drawn

    return Plan(44, draw, 3, 3, solid=False)


def merge(step: Step) -> Plan:
    """Two tensors come together, wire by wire, at dots; the sign of the operation stands above."""
    sign = {"add": "+", "sub": "−", "mul": "×", "div": "÷"}.get(
        str(step.params.get("what", "add")), str(step.params.get("what", ""))
    )
    spans = (Span(sign, "bold"),) if len(sign) == 1 else (regular(sign),)
    if "index" in step.params:  # the other tensor is in memory
        parts = [*spans, *memory_name(step)]
        return floating(parts if not step.params["first"] or sign in "+×" else [*parts[1:], *spans], fill=MEMORY_FACE)(
            step
        )
    width = spans_width(spans, 13)

    def draw(place: Place) -> Drawn:
        drawn, x = Drawn(), place.x1 - 8
        goal = {w.axis: place.outs[w.key] for w in step.out_wires}
        _meet(step, place, drawn, goal, x)
        y = min(goal.values(), default=min(place.ins.values(), default=0.0)) - 6
        # A word ends where the column does, before the labels of what comes out.
        drawn.parts.append(letters(min(x, place.x1 - width / 2 - 2), y, spans, 13))
        return drawn

    return Plan(max(40, width + 30), draw, above=18, below=3, solid=False)


def concatenation(step: Step) -> Plan:
    """Axes that are joined end to end meet in a thick bar; the others, which the tensors share, meet at dots."""

    def draw(place: Place) -> Drawn:
        drawn, x = Drawn(), place.x1 - 12
        goal = {w.axis: place.outs[w.key] for w in step.out_wires}
        joined = [w for w in step.ending if w.axis not in goal]
        y_bar = place.rows([], step.starting)[0] if step.starting else place.rows(step.in_wires)[0]
        gap = min(7.0, 10.0 / max(1, len(joined) - 1))
        for i, wire in enumerate(joined):
            y = y_bar + gap * i
            drawn.ends[wire.key] = tuple(ease(place.x0, place.ins[wire.key], x, y))
        if joined:
            drawn.parts.append(Path(polyline([(x, y_bar - 7), (x, y_bar + 14)]), width=3.6, sign="┃"))
        for wire in step.starting:
            y = place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (x, y)), ("L", (place.x1, y)))
        _meet(step, place, drawn, goal, x)
        return drawn

    return Plan(48, draw, 9, 9, solid=False)


def splitting(step: Step) -> Plan:
    """An axis that is cut into parts, at a thick bar; the other axes go to every part, from dots."""

    def draw(place: Place) -> Drawn:
        drawn, x = Drawn(), place.x0 + 12
        ending = {w.key for w in step.ending}
        cut = [place.ins[w.key] for w in step.ending] or [place.rows(step.in_wires)[0]]
        going = {after: before for before, after in step.through}
        for tensor in step.outputs:
            whole = len(tensor.wires) == len(step.in_wires)
            sources = [w for w in step.in_wires if whole or w.key not in ending]
            for source, wire in zip(sources, tensor.wires, strict=False):
                y0 = place.ins[source.key]
                path = tuple(ease(x, y0, place.x1, place.outs[wire.key]))
                if wire.key in going:
                    drawn.through[going[wire.key]] = (("L", (x, y0)), *path)
                    drawn.parts.append(dot(x, y0))
                else:
                    drawn.starts[wire.key] = (("M", (x, y0)), *path)
        drawn.ends |= {w.key: (("L", (x, place.ins[w.key])),) for w in step.ending}
        drawn.parts.append(Path(polyline([(x, cut[0] - 8), (x, cut[-1] + 8)]), width=3.6, sign="┃"))
        return drawn

    return Plan(60, draw, 8, 8, solid=False)


def _meet(step: Step, place: Place, drawn: Drawn, goal: dict[str, float], x: float, start: float | None = None) -> None:
    """Lead every wire whose axis goes on to its height at x, from a start on; a dot where several come together."""
    start = place.x0 if start is None else start
    going, meeting = dict(step.through), dict.fromkeys(goal, 0)
    for wire in (w for w in step.in_wires if w.axis in goal):
        y = goal[wire.axis]
        meeting[wire.axis] += 1
        path = (("L", (start, place.ins[wire.key])), *ease(start, place.ins[wire.key], x, y))
        if wire.key in going:
            drawn.through[wire.key] = (*path, ("L", (place.x1, y)))
        else:
            drawn.ends[wire.key] = path
    drawn.parts += [dot(x, goal[axis]) for axis, count in meeting.items() if count > 1]


def contraction(step: Step) -> Plan:
    """Wires that are summed over join in a half circle; those that several tensors share and keep meet at a dot."""

    def draw(place: Place) -> Drawn:
        drawn = Drawn()
        goal = {w.axis: place.outs[w.key] for w in step.out_wires}
        _meet(step, place, drawn, goal, place.x1 - 10, place.x0 + 0.42 * (place.x1 - place.x0))
        summed: dict[str, list[Wire]] = {}
        for wire in (w for w in step.in_wires if w.axis not in goal):
            summed.setdefault(wire.axis, []).append(wire)
        for wires in summed.values():
            if len(wires) > 1:
                _join(place, wires, drawn)
                continue
            y = place.ins[wires[0].key]
            drawn.ends[wires[0].key] = (("L", (place.centre, y)),)
            drawn.parts.append(letters(place.centre + 7, y + 4.5, [regular("Σ")], 13))
        return drawn

    return Plan(72, draw, 3, 3, solid=False)


def _join(place: Place, wires: Sequence[Wire], drawn: Drawn) -> None:
    """Bring the wires close together and join them in a half circle that opens to the left."""
    heights = [place.ins[w.key] for w in wires]
    middle, radius = (min(heights) + max(heights)) / 2, 8.0
    x = place.x0 + 0.32 * (place.x1 - place.x0)
    upper = min(wires, key=lambda w: place.ins[w.key])
    for wire in wires:
        y = middle - radius if wire is upper else middle + radius
        # Half of a circle each, the two halves touch at the right.
        sign = 1 if wire is upper else -1
        k = 0.5523 * radius
        arc: Command = ("C", (x + k, y, x + radius, middle - sign * k, x + radius, middle))
        drawn.ends[wire.key] = (*ease(place.x0, place.ins[wire.key], x, y), arc)


def spread(step: Step) -> Plan:
    """An axis along which all entries are the same begins at a dot."""

    def draw(place: Place) -> Drawn:
        drawn = Drawn()
        for wire in step.starting:
            y = place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (place.centre, y)), ("L", (place.x1, y)))
            drawn.parts.append(dot(place.centre, y))
        return drawn

    return Plan(36, draw, 3, 3, solid=False)


def crossing(step: Step) -> Plan:
    """Wires change their order."""
    return Plan(36, lambda place: Drawn(), 0, 0, solid=False)


def save(step: Step) -> Plan:
    """→ C: over a tensor that is kept in memory until it is loaded, and goes on."""
    return floating((regular("→ "), *memory_name(step)), arrows=False, fill=MEMORY_FACE)(step)


def load(step: Step) -> Plan:
    """C →: a tensor comes back from memory."""
    return boxed((*memory_name(step), regular(" →")), size=13, fill=MEMORY_FACE, half=9)(step)
