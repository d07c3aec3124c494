"""The pictograms: how each kind of operation is drawn between two columns of data.

A pictogram first says how much room it needs (`Plan`), before heights are known; then it is drawn at its place, between
`x0` and `x1`, with the heights of the wires that go in and come out. It draws its own wires between the two columns:
those that end in it, those that start, and those that it is woven over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.shapes import (
    Area,
    Box,
    Command,
    Path,
    Text,
    circle,
    ease,
    polyline,
)
from torchfolio.diagrams.sheet import Step, Wire

FACE, STAR_FACE, SOFT_FACE, NORM_FACE = "#e9eeeb", "#e3f2f9", "#d5ecd9", "#fde3e6"
STRIDE_FACE, BLOCK_FACE, BLOCK_TOP, BLOCK_SIDE = "#aee0fb", "#c8e9a4", "#dff3c8", "#a5cf7c"
MEMORY_FACE = "#fdf4b0"
INK, GREY, PAPER = "#1c1c22", "#8a8a92", "#ffffff"
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
        box: what no other wire should enter.
        ends: of wires that end here, the path from the left end of the column on.
        starts: of wires that start here, the path to the right end of the column.
        through: of wires that go on, the path from the left end to the right end; by the key that goes in.
    """

    parts: list[Path | Text | Area] = field(default_factory=list)
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


def plan(step: Step) -> Plan:
    """The pictogram of an operation; a labelled box where the language has none for it."""
    return PICTOGRAMS.get(step.kind, unknown)(step)


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


# ---------------------------------------------------------------------------------------------------------- helpers


def regular(text: str, scale: float = 1.0, shift: float = 0.0) -> Span:
    return Span(text, "regular", scale, shift)


def italic(text: str, scale: float = 1.0, shift: float = 0.0) -> Span:
    return Span(text, "italic", scale, shift)


def _core_rows(step: Step, place: Place) -> tuple[float, float]:
    """Rows of the wires that the operation is about: those that end, start, or go through its core."""
    ins = [w for w in step.in_wires if w.axis in step.core or w in step.ending]
    return place.rows(ins, step.starting)


def _runs(step: Step) -> list[list[Wire]]:
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


def _face(box: Box, fill: str, *, stroke: str | None = None, radius: float = 2.0) -> Area:
    return Area(box, fill, stroke, radius, role="face")


def _letters(x: float, y: float, spans: Sequence[Span], size: float, colour: str | None = None) -> Text:
    return Text(x, y, tuple(spans), size, "middle", "glyph", colour)


def _dot(x: float, y: float) -> Path:
    return Path(circle(x, y, 2.6), fill=INK, stroke="none", sign="•")


def _arrow_head(x: float, y: float, colour: str = INK) -> Path:
    """A filled arrow head pointing right whose tip is at (x, y), notched as in the notation."""
    points = [(x - 7.5, y - 3.4), (x, y), (x - 7.5, y + 3.4), (x - 5.4, y)]
    return Path(polyline(points, close=True), fill=colour, stroke="none", sign="➤")


def _star(x: float, y: float, radius: float) -> Path:
    import math

    points = [
        (x + r * math.sin(math.pi * i / 5), y - r * math.cos(math.pi * i / 5))
        for i in range(10)
        for r in [radius if i % 2 == 0 else radius * 0.42]
    ]
    return Path(polyline(points, close=True), fill=INK, stroke="none", sign="★")


# ----------------------------------------------------------------------------------------------------- boxes of text


def boxed(spans: Sequence[Span], *, size: float, fill: str, half: float = HALF, stroke: str | None = None):
    """A pictogram that is a box with a line of text, over its core wires."""

    def make(step: Step) -> Plan:
        width = spans_width(spans, size) + 10

        def draw(place: Place) -> Drawn:
            top, bottom = _core_rows(step, place)
            box = Box(place.centre - width / 2, top - half, place.centre + width / 2, bottom + half)
            text = _letters(place.centre, (top + bottom) / 2 + size * 0.32, spans, size)
            return Drawn([_face(box, fill, stroke=stroke), text], box)

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


def linear(step: Step) -> Plan:
    """**L**, with a plus where it has a bias and its name as a superscript; in italics where it is not learned."""
    spans = learned_spans("L", bias=bool(step.params.get("bias")), name=str(step.params.get("name") or ""))
    spans[0] = spans[0] if step.learned else italic("L")
    return boxed(spans, size=17, fill=FACE, half=10.5)(step)


def embedding(step: Step) -> Plan:
    """**E**: the tag of an index and the axis that comes out."""
    return boxed(learned_spans("E"), size=17, fill=FACE, half=10.5)(step)


def unknown(step: Step) -> Plan:
    """A box with the name of an operation that the language has no sign for."""
    return boxed([Span(step.kind, "sans")], size=9, fill=PAPER, stroke=INK)(step)


# ------------------------------------------------------------------------------------------------------- elementwise


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
            parts: list[Path | Text | Area] = [_letters(place.centre, y, spans, size, colour)]
            if fill:
                parts.insert(
                    0, _face(Box(place.centre - width / 2 - 3, y - 10, place.centre + width / 2 + 3, y + 4), fill)
                )
            if arrows:
                parts.append(_arrow_head(place.centre - width / 2 - 1.5, y - 4, colour))
                parts.append(_arrow_head(place.centre + width / 2 + 9, y - 4, colour))
            return Drawn(parts)

        return Plan(room + 8, draw, above=18, below=0, solid=False)

    return make


SIGNS: dict[str, tuple[Span, ...]] = {
    "relu": (italic("R"),),
    "sigmoid": (italic("σ"),),
    "exp": (regular("exp"),),
    "square": (italic("x"), regular("2", 0.7, 0.35)),
    "neg": (regular("−"),),
    "∗k^−½": (regular("∗"), italic("k"), regular("−½", 0.7, 0.35)),
}
"""Signs of scalar functions that are not written out."""


def elementwise(step: Step) -> Plan:
    """➤ f ➤, with the sign or the name of the function."""
    name = str(step.params.get("sign") or step.params.get("function") or step.kind)
    return floating(SIGNS.get(name, (regular(name),)))(step)


def quiet(step: Step) -> Plan:
    """What changes no value when the network is used, in grey: dropout, casts, detach."""
    return floating((Span(str(step.params.get("sign") or step.kind), "sans"),), grey=True, arrows=False)(step)


# ------------------------------------------------------------------------------------------------ softmax and norms


def softmax(step: Step) -> Plan:
    """A triangle over the wire that is normalised, its tip towards the data that comes in."""

    def draw(place: Place) -> Drawn:
        top, bottom = _core_rows(step, place)
        middle, half = (top + bottom) / 2, (bottom - top) / 2 + 9.5
        left, right = place.centre - 8, place.centre + 8
        points = [(left, middle), (right, middle - half), (right, middle + half)]
        return Drawn(
            [Path(polyline(points, close=True), fill=SOFT_FACE, sign="◁")],
            Box(left, middle - half, right, middle + half),
        )

    return Plan(32, draw, 9.5, 9.5)


def norm(step: Step) -> Plan:
    """A circle on the wires that are normalised; one that is apart from the others is drawn into the circle."""

    def draw(place: Place) -> Drawn:
        runs = _runs(step)
        body = max(runs, key=len) if runs else step.in_wires
        top, bottom = place.rows(body)
        middle, half = (top + bottom) / 2, (bottom - top) / 2 + 8.5
        x, box = place.centre, Box(place.centre - 8.5, middle - half, place.centre + 8.5, middle + half)
        drawn = Drawn([Area(box, NORM_FACE, INK, 8.5, role="face")], box)
        if step.learned:
            drawn.parts.append(Path(circle(x, middle, 2.0), fill=INK, stroke="none"))
        after = dict(step.through)
        for wire in (w for run in runs if run is not body for w in run):
            y0, y1 = place.ins[wire.key], place.outs[after[wire.key]]
            edge = box.top + 1.5 if y0 < middle else box.bottom - 1.5
            drawn.through[wire.key] = (
                *_into(place.x0, y0, x - 4, edge),
                ("L", (x + 4, edge)),
                *_out_of(x + 4, edge, place.x1, y1),
            )
        return drawn

    return Plan(44, draw, 8.5, 8.5)


def _into(x0: float, y0: float, x1: float, y1: float) -> list[Command]:
    return [("C", (x0 + 0.7 * (x1 - x0), y0, x1, y0 + 0.3 * (y1 - y0), x1, y1))]


def _out_of(x0: float, y0: float, x1: float, y1: float) -> list[Command]:
    return [("C", (x0, y0 + 0.7 * (y1 - y0), x0 + 0.3 * (x1 - x0), y1, x1, y1))]


# ---------------------------------------------------------------------------------------------------- convolutions


def convolution(step: Step) -> Plan:
    """★k on the spatial wires with **L** on the channel; with a stride a trapezium that hands its window to **L**."""
    stride = str(step.params.get("stride_text") or "")
    if stride or step.params.get("transposed"):
        return _strided(step, stride)
    label = [regular(str(step.params.get("kernel_text", "")))]
    letter = learned_spans("L", bias=bool(step.params.get("bias")))
    note = str(step.params.get("note") or "")
    width = max(20 + spans_width(label, 13), spans_width(letter, 16) + 8, len(note) * 5.6 + 6, 30)

    def draw(place: Place) -> Drawn:
        spatial, channel = _spatial(step, place)
        top, bottom = min(spatial[0], channel[0]) - 10, max(spatial[1], channel[1]) + 10
        box = Box(place.centre - width / 2, top, place.centre + width / 2, bottom)
        y_star, y_letter = (spatial[0] + spatial[1]) / 2, (channel[0] + channel[1]) / 2
        x = place.centre - (12 + spans_width(label, 13)) / 2
        parts: list[Path | Text | Area] = [
            Area(box, STAR_FACE, INK, 0, role="face"),
            _star(x + 5, y_star, 5),
            Text(x + 12, y_star + 4.5, tuple(label), 13, "start", "glyph"),
            _letters(place.centre, y_letter + 5.3, letter, 16),
        ]
        if note:
            parts.append(_letters(place.centre, bottom + 9, [Span(note, "sans")], 9, GREY))
        return Drawn(parts, box)

    return Plan(width + 16, draw, 10, 20 if note else 10)


def _spatial(step: Step, place: Place) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rows of the spatial wires and of the channel."""
    names = set(step.params.get("spatial", ()))
    space = [w for w in step.in_wires if w.axis in names], [w for w in step.out_wires if w.axis in names]
    channel_in = [w for w in step.in_wires if w.axis in step.core and w.axis not in names]
    channel_out = [w for w in step.starting if w.axis not in names]
    rows = place.rows(*space)
    return rows, place.rows(channel_in, channel_out) if channel_in or channel_out else (rows[0] - 20, rows[0] - 20)


def _trapezium(box: Box, slash: str, *, mirrored: bool = False, deep: bool = True) -> list[Path | Text | Area]:
    """A star over a slash with the stride, in a shape whose lower edge slopes to the window that it cuts."""
    drop = 8.0 if deep else 0.0
    left, right = (box.bottom, box.bottom - drop) if mirrored else (box.bottom - drop, box.bottom)
    shape = [(box.left, box.top), (box.right, box.top), (box.right, right), (box.left, left)]
    y = (box.top + box.bottom - drop / 2) / 2
    parts: list[Path | Text | Area] = [
        Path(polyline(shape, close=True), fill=STRIDE_FACE),
        _star(box.left + 8, y - 4, 4.2),
    ]
    if slash:
        parts.append(Path(polyline([(box.left + 7, y + 9), (box.left + 16, y - 4)]), width=1.0, sign="/"))
        parts.append(Text(box.left + 14.5, y + 8, (regular(slash),), 11, "start", "glyph"))
    return parts


def _strided(step: Step, stride: str) -> Plan:
    letter = learned_spans("L", bias=bool(step.params.get("bias")))
    transposed = bool(step.params.get("transposed"))
    kernel = str(step.params.get("kernel_text", ""))
    wide = 24 + spans_width([regular(stride)], 11)
    room = spans_width(letter, 16) + 10
    width = wide + 14 + room

    def draw(place: Place) -> Drawn:
        (top, bottom), (c_top, c_bottom) = _spatial(step, place)
        y_letter = (c_top + c_bottom) / 2
        left = place.centre - width / 2
        body = Box(left, top - 10, left + wide, bottom + 14)
        face = Box(left + wide + 12, c_top - 10, left + wide + 12 + room, c_bottom + 10)
        parts = _trapezium(body, stride, mirrored=transposed)
        if transposed:
            parts.append(Text(body.right + 1.5, body.top + 9, (italic("T"),), 10, "start", "glyph"))
        # The window leaves the trapezium as a wire of its own, which the learned map contracts with the channel.
        x, y = face.left + room / 2, face.bottom
        from_y = top + 2 if y_letter < top else bottom
        parts.append(Path((("M", (body.right, from_y)), ("C", (x, from_y, x, from_y, x, y))), stroke=GREY))
        parts.append(_face(face, FACE))
        parts.append(_letters(x, y_letter + 5.3, letter, 16))
        parts.append(_letters(x + 9, face.bottom + 8.5, [regular(kernel)], 9, GREY))
        box = body.union(face)
        drawn = Drawn(parts, box)
        spatial = set(step.params.get("spatial", ()))
        for wire in step.ending:
            stop = body.left if wire.axis in spatial else face.left
            drawn.ends[wire.key] = (("L", (stop, place.ins[wire.key])),)
        for wire in step.starting:
            start, y = (body.right if wire.axis in spatial else face.right), place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (start, y)), ("L", (place.x1, y)))
        return drawn

    return Plan(width + 16, draw, 10, 24)


def pooling(step: Step) -> Plan:
    """The trapezium of a stride, whose window goes to Max or to the mean."""
    what = str(step.params.get("what", "Max"))
    stride, kernel = str(step.params.get("stride_text") or ""), str(step.params.get("kernel_text") or "")
    wide = 24 + spans_width([regular(stride)], 11)
    text = spans_width([regular(what)], 12)
    width = wide + text + 30

    def draw(place: Place) -> Drawn:
        top, bottom = _core_rows(step, place)
        left = place.centre - width / 2
        body = Box(left, top - 10, left + wide, bottom + 22)
        parts = _trapezium(body, stride)
        y = body.bottom - 5
        parts.append(Path(polyline([(body.right, y - 1.6), (body.right + 14, y - 1.6)]), stroke=GREY))
        parts.append(Path(polyline([(body.right, y + 1.6), (body.right + 14, y + 1.6)]), stroke=GREY))
        parts.append(_letters(body.right + 8, y + 11, [regular(kernel)], 9, GREY))
        parts.append(Text(body.right + 16, y + 4, (regular(what),), 12, "start", "glyph"))
        parts.append(_arrow_head(body.right + 16 + text + 9, y))
        drawn = Drawn(parts, Box(body.left, body.top, body.right, body.bottom))
        return drawn

    return Plan(width + 16, draw, 10, 30)


# ------------------------------------------------------------------------------------------------- views and indices


def bar(step: Step) -> Plan:
    """A thick bar that joins or splits axes: flatten, unflatten, concatenation, padding."""
    note = str(step.params.get("note") or "")

    def draw(place: Place) -> Drawn:
        top, bottom = _core_rows(step, place)
        x = place.centre
        drawn = Drawn(
            [Path(polyline([(x, top - 6), (x, bottom + 6)]), width=3.6, sign="┃")],
            Box(x - 2, top - 6, x + 2, bottom + 6),
        )
        if note:
            drawn.parts.append(_letters(x, bottom + 15, [Span(note, "sans")], 9, GREY))
        return drawn

    return Plan(max(24.0, len(note) * 5.8 + 6), draw, 6, 16 if note else 6)


def tag(step: Step) -> Plan:
    """A pentagon with the index that ends an axis; of a slice, the range that is left of it."""
    text = str(step.params.get("index_text") or "i")
    spans = (italic(text) if text.isalpha() else regular(text),)
    width = spans_width(spans, 11) + 12

    def draw(place: Place) -> Drawn:
        ends = step.ending or [w for w in step.in_wires if w.axis in step.core]
        y = sum(place.rows(ends)) / 2
        left, right = place.centre - width / 2, place.centre + width / 2
        points = [(left, y), (left + 6, y - 7.5), (right, y - 7.5), (right, y + 7.5), (left + 6, y + 7.5)]
        parts: list[Path | Text | Area] = [Path(polyline(points, close=True), fill=INK)]
        parts.append(_letters(place.centre + 2.5, y + 3.8, spans, 11, PAPER))
        return Drawn(parts, Box(left, y - 7.5, right, y + 7.5))

    return Plan(width + 14, draw, 7.5, 7.5)


def reduce(step: Step) -> Plan:
    """An axis that ends in its sum, its mean or its largest entry."""
    spans = {"sum": [regular("Σ")], "mean": [regular("𝔼")], "max": [regular("Max")], "min": [regular("Min")]}.get(
        str(step.params.get("what", "sum")), [regular(str(step.params.get("what", "sum")))]
    )
    width = spans_width(spans, 14)

    def draw(place: Place) -> Drawn:
        drawn, x = Drawn(), place.centre - width / 2
        boxes = []
        for run in _runs(step):
            top, bottom = place.rows(run)
            y = (top + bottom) / 2
            # Wires of one run come together at the sign.
            for wire in run:
                start = place.ins[wire.key]
                near = abs(start - y) < 6
                drawn.ends[wire.key] = (("L", (x - 2, start)),) if near else tuple(ease(place.x0, start, x - 1, y))
            drawn.parts.append(_letters(place.centre, y + 4.8, spans, 14))
            drawn.parts.append(_arrow_head(place.centre + width / 2 + 9, y))
            boxes.append(Box(x, y - 6, place.centre + width / 2 + 9, y + 6))
        drawn.box = functools.reduce(Box.union, boxes) if boxes else None
        return drawn

    return Plan(width + 36, draw, 7, 7)


# -------------------------------------------------------------------------------------------- copies, sums, products


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
            drawn.parts.append(_dot(x, y0))
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
        drawn.parts.append(_letters(min(x, place.x1 - width / 2 - 2), y, spans, 13))
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
                    drawn.parts.append(_dot(x, y0))
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
    drawn.parts += [_dot(x, goal[axis]) for axis, count in meeting.items() if count > 1]


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
            drawn.parts.append(_letters(place.centre + 7, y + 4.5, [regular("Σ")], 13))
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
            drawn.parts.append(_dot(place.centre, y))
        return drawn

    return Plan(36, draw, 3, 3, solid=False)


def crossing(step: Step) -> Plan:
    """Wires change their order."""
    return Plan(36, lambda place: Drawn(), 0, 0, solid=False)


# ------------------------------------------------------------------------------------------------- reusable blocks


def block(step: Step) -> Plan:
    """A box with depth: a module that is drawn out elsewhere or not at all."""
    lines = [line for line in str(step.params.get("text") or step.kind).split("\n") if line]
    width = max(spans_width([Span(line, "sans")], 10) for line in lines) + 14
    edge, tall = 7.0, 14.0 * len(lines)

    def draw(place: Place) -> Drawn:
        top, bottom = place.rows([], [])
        middle = (top + bottom) / 2
        half = max((bottom - top) / 2 + 11, tall / 2 + 4)
        box = Box(
            place.centre - width / 2 - edge / 2, middle - half, place.centre + width / 2 - edge / 2, middle + half
        )
        l, t, r, b = box.left, box.top, box.right, box.bottom
        lid = [(l, t), (l + edge, t - edge), (r + edge, t - edge), (r, t)]
        side = [(r, t), (r + edge, t - edge), (r + edge, b - edge), (r, b)]
        parts: list[Path | Text | Area] = [
            Path(polyline(lid, close=True), fill=BLOCK_TOP),
            Path(polyline(side, close=True), fill=BLOCK_SIDE),
            Area(box, BLOCK_FACE, INK, 0, role="face"),
        ]
        for i, line in enumerate(lines):
            y = middle + 13 * (i - (len(lines) - 1) / 2) + 3.5
            parts.append(_letters((l + r) / 2, y, [Span(line, "sans")], 10))
        drawn = Drawn(parts, Box(l, t, r, b))
        for wire in step.starting:
            y = place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (r + (edge if y < b - edge else 0), y)), ("L", (place.x1, y)))
        return drawn

    need = max(11.0, tall / 2 + 4)
    return Plan(width + edge + 18, draw, need + edge, need)


def memory_name(step: Step) -> tuple[Span, ...]:
    """C with the number of the tensor in memory."""
    return italic("C"), regular(str(step.params["index"]), 0.72, -0.18)


def save(step: Step) -> Plan:
    """→ C: over a tensor that is kept in memory until it is loaded, and goes on."""
    return floating((regular("→ "), *memory_name(step)), arrows=False, fill=MEMORY_FACE)(step)


def load(step: Step) -> Plan:
    """C →: a tensor comes back from memory."""
    return boxed((*memory_name(step), regular(" →")), size=13, fill=MEMORY_FACE, half=9)(step)


PICTOGRAMS: dict[str, Callable[[Step], Plan]] = {
    "block": block,
    "dropout": quiet,
    "elementwise": elementwise,
    "linear": linear,
    "load": load,
    "save": save,
    "embedding": embedding,
    "softmax": softmax,
    "split": splitting,
    "norm": norm,
    "conv": convolution,
    "pool": pooling,
    "reshape": bar,
    "concat": concatenation,
    "index": tag,
    "reduce": reduce,
    "copy": copy,
    "binary": merge,
    "einsum": contraction,
    "transpose": crossing,
    "view": spread,
}
