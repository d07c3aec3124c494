"""The pictograms: how each kind of operation is drawn between two columns of data.

A pictogram first says how much room it needs (`Plan`), before heights are known; then it is drawn at its place, between
`x0` and `x1`, with the heights of the wires that go in and come out. It draws its own wires between the two columns:
those that end in it, those that start, and those that it is woven over.

Longer than most because it holds a pictogram for each kind of operation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torchfolio.diagrams.fonts import Span, spans_width
from torchfolio.diagrams.joins import concatenation, contraction, copy, crossing, load, merge, save, splitting, spread
from torchfolio.diagrams.shapes import GREY, INK, PAPER, Area, Box, Command, Part, Path, Text, circle, ease, polyline
from torchfolio.diagrams.sheet import Step
from torchfolio.diagrams.strokes import (
    BLOCK_FACE,
    BLOCK_SIDE,
    BLOCK_TOP,
    FACE,
    NORM_FACE,
    SOFT_FACE,
    STAR_FACE,
    STRIDE_FACE,
    Drawn,
    Place,
    Plan,
    arrow_head,
    boxed,
    core_rows,
    face,
    floating,
    italic,
    learned_spans,
    letters,
    regular,
    runs,
    star,
)

__all__ = ["plan"]


def plan(step: Step) -> Plan:
    """The pictogram of an operation; a labelled box where the language has none for it."""
    return PICTOGRAMS.get(step.kind, unknown)(step)


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


def softmax(step: Step) -> Plan:
    """A triangle over the wire that is normalised, its tip towards the data that comes in."""

    def draw(place: Place) -> Drawn:
        top, bottom = core_rows(step, place)
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
        groups = runs(step)
        body = max(groups, key=len) if groups else step.in_wires
        top, bottom = place.rows(body)
        middle, half = (top + bottom) / 2, (bottom - top) / 2 + 8.5
        x, box = place.centre, Box(place.centre - 8.5, middle - half, place.centre + 8.5, middle + half)
        drawn = Drawn([Area(box, NORM_FACE, INK, 8.5, role="face")], box)
        if step.learned:
            drawn.parts.append(Path(circle(x, middle, 2.0), fill=INK, stroke="none"))
        after = dict(step.through)
        for wire in (w for run in groups if run is not body for w in run):
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
        parts: list[Part] = [
            Area(box, STAR_FACE, INK, 0, role="face"),
            star(x + 5, y_star, 5),
            Text(x + 12, y_star + 4.5, tuple(label), 13, "start", "glyph"),
            letters(place.centre, y_letter + 5.3, letter, 16),
        ]
        if note:
            parts.append(letters(place.centre, bottom + 9, [Span(note, "sans")], 9, GREY))
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


def _trapezium(box: Box, slash: str, *, mirrored: bool = False) -> list[Part]:
    """A star over a slash with the stride, in a shape whose lower edge slopes to the window that it cuts."""
    drop = 8.0
    left, right = (box.bottom, box.bottom - drop) if mirrored else (box.bottom - drop, box.bottom)
    shape = [(box.left, box.top), (box.right, box.top), (box.right, right), (box.left, left)]
    y = (box.top + box.bottom - drop / 2) / 2
    parts: list[Part] = [
        Path(polyline(shape, close=True), fill=STRIDE_FACE),
        star(box.left + 8, y - 4, 4.2),
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
        plate = Box(left + wide + 12, c_top - 10, left + wide + 12 + room, c_bottom + 10)
        parts = _trapezium(body, stride, mirrored=transposed)
        if transposed:
            parts.append(Text(body.right + 1.5, body.top + 9, (italic("T"),), 10, "start", "glyph"))
        # The window leaves the trapezium as a wire of its own, which the learned map contracts with the channel.
        x, y = plate.left + room / 2, plate.bottom
        from_y = top + 2 if y_letter < top else bottom
        parts.append(Path((("M", (body.right, from_y)), ("C", (x, from_y, x, from_y, x, y))), stroke=GREY))
        parts.append(face(plate, FACE))
        parts.append(letters(x, y_letter + 5.3, letter, 16))
        parts.append(letters(x + 9, plate.bottom + 8.5, [regular(kernel)], 9, GREY))
        box = body.union(plate)
        drawn = Drawn(parts, box)
        spatial = set(step.params.get("spatial", ()))
        for wire in step.ending:
            stop = body.left if wire.axis in spatial else plate.left
            drawn.ends[wire.key] = (("L", (stop, place.ins[wire.key])),)
        for wire in step.starting:
            start, y = (body.right if wire.axis in spatial else plate.right), place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (start, y)), ("L", (place.x1, y)))
        return drawn

    return Plan(width + 16, draw, 10, 24)


def pooling(step: Step) -> Plan:
    """The trapezium of a stride, whose window goes to Max or to the mean."""
    what = str(step.params.get("what", "Max"))
    stride, kernel = str(step.params.get("stride_text") or ""), str(step.params.get("kernel_text") or "")
    wide = 24 + spans_width([regular(stride)], 11)
    text = spans_width([regular(what)], 12)
    under = 11 if spans_width([regular(kernel)], 9) < 16 else 14  # a long one stands below the word
    width = wide + text + 30

    def draw(place: Place) -> Drawn:
        top, bottom = core_rows(step, place)
        left = place.centre - width / 2
        body = Box(left, top - 10, left + wide, bottom + 22)
        parts = _trapezium(body, stride)
        y = body.bottom - 5
        parts.append(Path(polyline([(body.right, y - 1.6), (body.right + 14, y - 1.6)]), stroke=GREY))
        parts.append(Path(polyline([(body.right, y + 1.6), (body.right + 14, y + 1.6)]), stroke=GREY))
        parts.append(letters(body.right + 8, y + under, [regular(kernel)], 9, GREY))
        parts.append(Text(body.right + 16, y + 4, (regular(what),), 12, "start", "glyph"))
        parts.append(arrow_head(body.right + 16 + text + 9, y))
        drawn = Drawn(parts, Box(body.left, body.top, body.right, body.bottom))
        return drawn

    return Plan(width + 16, draw, 10, 30)


def bar(step: Step) -> Plan:
    """A thick bar that joins or splits axes: flatten, unflatten, concatenation, padding."""
    note = str(step.params.get("note") or "")

    def draw(place: Place) -> Drawn:
        top, bottom = core_rows(step, place)
        x = place.centre
        drawn = Drawn(
            [Path(polyline([(x, top - 6), (x, bottom + 6)]), width=3.6, sign="┃")],
            Box(x - 2, top - 6, x + 2, bottom + 6),
        )
        if note:
            drawn.parts.append(letters(x, bottom + 15, [Span(note, "sans")], 9, GREY))
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
        parts: list[Part] = [Path(polyline(points, close=True), fill=INK)]
        parts.append(letters(place.centre + 2.5, y + 3.8, spans, 11, PAPER))
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
        for run in runs(step):
            top, bottom = place.rows(run)
            y = (top + bottom) / 2
            # Wires of one run come together at the sign.
            for wire in run:
                start = place.ins[wire.key]
                near = abs(start - y) < 6
                drawn.ends[wire.key] = (("L", (x - 2, start)),) if near else tuple(ease(place.x0, start, x - 1, y))
            drawn.parts.append(letters(place.centre, y + 4.8, spans, 14))
            drawn.parts.append(arrow_head(place.centre + width / 2 + 9, y))
            boxes.append(Box(x, y - 6, place.centre + width / 2 + 9, y + 6))
        drawn.box = functools.reduce(Box.union, boxes) if boxes else None
        return drawn

    return Plan(width + 36, draw, 7, 7)


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
        parts: list[Part] = [
            Path(polyline(lid, close=True), fill=BLOCK_TOP),
            Path(polyline(side, close=True), fill=BLOCK_SIDE),
            Area(box, BLOCK_FACE, INK, 0, role="face"),
        ]
        for i, line in enumerate(lines):
            y = middle + 13 * (i - (len(lines) - 1) / 2) + 3.5
            parts.append(letters((l + r) / 2, y, [Span(line, "sans")], 10))
        drawn = Drawn(parts, Box(l, t, r, b))
        for wire in step.starting:
            y = place.outs[wire.key]
            drawn.starts[wire.key] = (("M", (r + (edge if y < b - edge else 0), y)), ("L", (place.x1, y)))
        return drawn

    need = max(11.0, tall / 2 + 4)
    return Plan(width + edge + 18, draw, need + edge, need)


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
    **{
        k: boxed([Span(k[:4].rstrip("_").upper(), "bold")], size=14, fill=FACE)
        for k in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    },
}
