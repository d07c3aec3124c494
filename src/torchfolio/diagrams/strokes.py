"""What pictograms are made of: the room that they ask for, the place that they get, boxes, letters and marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.shapes import GREY, INK, Area, Box, Command, Part, Path, Text, circle, ease, polyline
from torchfolio.diagrams.sheet import Step, Wire

FACE, STAR_FACE, SOFT_FACE, NORM_FACE = "#e9eeeb", "#e3f2f9", "#d5ecd9", "#fde3e6"
STRIDE_FACE, BLOCK_FACE, BLOCK_TOP, BLOCK_SIDE = "#aee0fb", "#c8e9a4", "#dff3c8", "#a5cf7c"
MEMORY_FACE = "#fdf4b0"

HALF = 9.0
"""Half the height of a pictogram on a single wire, px."""


@dataclass(frozen=True)
class Place:
    """Where a pictogram is drawn.

    Attributes:
        x0, x1: left and right end of the column of operations.
        ins, outs: heights of the wires that go in and come out, by their keys.
    """

    x0: float
    x1: float
    ins: dict[str, float]
    outs: dict[str, float]

    @property
    def centre(self) -> float:
        return (self.x0 + self.x1) / 2

    def rows(self, ins: Sequence[Wire], outs: Sequence[Wire] = ()) -> tuple[float, float]:
        """Highest and lowest of some wires."""
        heights = [self.ins[w.key] for w in ins] + [self.outs[w.key] for w in outs]
        heights = heights or [*self.ins.values(), *self.outs.values()] or [0.0]
        return min(heights), max(heights)


@dataclass
class Drawn:
    """What a pictogram draws.

    Attributes:
        parts: lines, areas and text.
        box: place that no other wire should enter.
        ends: paths from the left end of the column on, of wires that end here.
        starts: paths to the right end of the column, of wires that start here.
        through: paths from the left end to the right end, of wires that go on; by the key that goes in.
    """

    parts: list[Part] = field(default_factory=list)
    box: Box | None = None
    ends: dict[str, tuple[Command, ...]] = field(default_factory=dict)
    starts: dict[str, tuple[Command, ...]] = field(default_factory=dict)
    through: dict[str, tuple[Command, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The room that a pictogram needs, and how it is drawn.

    Attributes:
        width: px.
        draw: draws it at a place.
        above, below: room over its highest and under its lowest wire, px.
        solid: whether it has a box that other wires keep away from; otherwise only its text does.
    """

    width: float
    draw: Callable[[Place], Drawn]
    above: float = HALF
    below: float = HALF
    solid: bool = True


def finish(step: Step, place: Place, drawn: Drawn) -> Drawn:
    """Add the paths of wires that the pictogram has not drawn itself: level to its box, or across the column."""
    left = drawn.box.left if drawn.box else place.centre
    right = drawn.box.right if drawn.box else place.centre
    for wire in step.ending:
        drawn.ends.setdefault(wire.key, (("L", (left, place.ins[wire.key])),))
    for wire in step.starting:
        y = place.outs[wire.key]
        drawn.starts.setdefault(wire.key, (("M", (right, y)), ("L", (place.x1, y))))
    for before, after in step.through:
        drawn.through.setdefault(before, tuple(ease(place.x0, place.ins[before], place.x1, place.outs[after])))
    return drawn


def regular(text: str, scale: float = 1.0, shift: float = 0.0) -> Span:
    """Upright text."""
    return Span(text, "regular", scale, shift)


def italic(text: str, scale: float = 1.0, shift: float = 0.0) -> Span:
    """Text in italics."""
    return Span(text, "italic", scale, shift)


def core_rows(step: Step, place: Place) -> tuple[float, float]:
    """Rows of the wires that the operation is about: those that end, start, or go through its core."""
    ins = [w for w in step.in_wires if w.axis in step.core or w in step.ending]
    return place.rows(ins, step.starting)


def runs(step: Step) -> list[list[Wire]]:
    """The core wires that go in, in runs of neighbours."""
    runs: list[list[Wire]] = []
    for tensor in step.inputs:
        last = False
        for wire in tensor.wires:
            here = wire.axis in step.core
            if here and last:
                runs[-1].append(wire)
            elif here:
                runs.append([wire])
            last = here
    return runs


def face(box: Box, fill: str, *, stroke: str | None = None, radius: float = 2.0) -> Area:
    """The ground of a box."""
    return Area(box, fill, stroke, radius, role="face")


def letters(x: float, y: float, spans: Sequence[Span], size: float, colour: str | None = None) -> Text:
    """A line of text in the middle of a place."""
    return Text(x, y, tuple(spans), size, "middle", "glyph", colour)


def dot(x: float, y: float) -> Path:
    """A filled dot, where wires part or meet."""
    return Path(circle(x, y, 2.6), fill=INK, stroke="none", sign="•")


def arrow_head(x: float, y: float, colour: str = INK) -> Path:
    """A filled arrow head pointing right whose tip is at (x, y), notched as in the notation."""
    points = [(x - 7.5, y - 3.4), (x, y), (x - 7.5, y + 3.4), (x - 5.4, y)]
    return Path(polyline(points, close=True), fill=colour, stroke="none", sign="➤")


def star(x: float, y: float, radius: float) -> Path:
    """A filled star with five points."""
    points = [
        (x + r * math.sin(math.pi * i / 5), y - r * math.cos(math.pi * i / 5))
        for i in range(10)
        for r in [radius if i % 2 == 0 else radius * 0.42]
    ]
    return Path(polyline(points, close=True), fill=INK, stroke="none", sign="★")


def boxed(spans: Sequence[Span], *, size: float, fill: str, half: float = HALF, stroke: str | None = None):
    """A pictogram that is a box with a line of text, over its core wires."""

    def make(step: Step) -> Plan:
        width = spans_width(spans, size) + 10

        def draw(place: Place) -> Drawn:
            top, bottom = core_rows(step, place)
            box = Box(place.centre - width / 2, top - half, place.centre + width / 2, bottom + half)
            text = letters(place.centre, (top + bottom) / 2 + size * 0.32, spans, size)
            return Drawn([face(box, fill, stroke=stroke), text], box)

        return Plan(width + 16, draw, half, half)

    return make


def learned_spans(letter: str, *, bias: bool = False, name: str = "") -> list[Span]:
    """A bold letter, a plus below it for a bias, a name above it."""
    spans = [Span(letter, "bold")]
    if bias:
        spans.append(Span("+", "bold", 0.62, -0.16))
    if name:
        spans.append(italic(name, 0.62, 0.36))
    return spans


def floating(
    spans: Sequence[Span], *, grey: bool = False, arrows: bool = True, fill: str = ""
) -> Callable[[Step], Plan]:
    """A scalar function: ➤ f ➤ over the wires that it is applied along."""
    size = 13.0 if not grey else 9.0
    colour = GREY if grey else INK
    width = spans_width(spans, size)
    room = width + (19 if arrows else 2)

    def make(step: Step) -> Plan:
        def draw(place: Place) -> Drawn:
            y = min([*place.ins.values(), *place.outs.values()], default=0.0) - 5
            parts: list[Part] = [letters(place.centre, y, spans, size, colour)]
            if fill:
                ground = Box(place.centre - width / 2 - 3, y - 10, place.centre + width / 2 + 3, y + 4)
                parts.insert(0, face(ground, fill))
            if arrows:
                parts.append(arrow_head(place.centre - width / 2 - 1.5, y - 4, colour))
                parts.append(arrow_head(place.centre + width / 2 + 9, y - 4, colour))
            return Drawn(parts)

        return Plan(room + 8, draw, above=18, below=0, solid=False)

    return make


def memory_name(step: Step) -> tuple[Span, ...]:
    """C with the number of the tensor in memory."""
    return italic("C"), regular(str(step.params["index"]), 0.72, -0.18)
