"""What a drawing is made of: curves, rectangles and text at fixed places, before any file format.

The layout makes a `Geometry`; the renderers put it into SVG, a raster or a terminal, and decide nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torchfolio.diagrams.fonts import ASCENT, DESCENT, Span, spans_width

INK, GREY, PAPER = "#1c1c22", "#8a8a92", "#ffffff"

Command = tuple[str, tuple[float, ...]]
"""One command of a path: `("M", (x, y))`, `("L", (x, y))`, `("C", (x1, y1, x2, y2, x, y))` or `("Z", ())`."""


@dataclass(frozen=True)
class Box:
    """An upright rectangle: left, top, right, bottom, in px."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box, slack: float = 0.0) -> bool:
        """Whether the insides of two rectangles meet by more than `slack` in both directions."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across > slack and down > slack

    def contains(self, x: float, y: float, slack: float = 0.0) -> bool:
        """Whether a point is inside by more than `slack`."""
        return self.left + slack < x < self.right - slack and self.top + slack < y < self.bottom - slack

    def union(self, other: Box) -> Box:
        corner = min(self.left, other.left), min(self.top, other.top)
        return Box(*corner, max(self.right, other.right), max(self.bottom, other.bottom))


@dataclass(frozen=True)
class Path:
    """A line.

    Attributes:
        commands: course of the line.
        role: `"wire"`, `"dash"` or `"glyph"`; only the first two are data.
        width: width of the stroke, in px; None for that of the role.
        fill: colour inside, None for none.
        stroke: colour of the line; None for the ink of the style, `"none"` for no line.
        title: tooltip.
        data: facts about it that a program may read.
        sign: the character that stands for it in a terminal, none for lines that a terminal does without.
    """

    commands: tuple[Command, ...]
    role: str = "glyph"
    width: float | None = None
    fill: str | None = None
    stroke: str | None = None
    title: str = ""
    data: Mapping[str, str] = field(default_factory=dict)
    sign: str = ""


@dataclass(frozen=True)
class Text:
    """A line of text with its baseline at `y`.

    Attributes:
        x, y: the place, in px.
        spans: pieces of text that stand there.
        size: size of the font, in px.
        anchor: `"start"`, `"middle"` or `"end"`, says which point of the line is at `x`.
        role: `"label"` of a wire, `"glyph"` in a pictogram, `"title"` of a fence, or `"legend"`.
        colour: None for the ink of the style.
    """

    x: float
    y: float
    spans: tuple[Span, ...]
    size: float = 12.0
    anchor: str = "middle"
    role: str = "label"
    colour: str | None = None

    @property
    def text(self) -> str:
        return "".join(s.text for s in self.spans)

    @property
    def width(self) -> float:
        return spans_width(self.spans, self.size)

    @property
    def box(self) -> Box:
        """What the text covers, by the table of widths."""
        left = self.x - {"start": 0.0, "middle": 0.5, "end": 1.0}[self.anchor] * self.width
        top = max(s.shift * self.size + ASCENT * s.scale * self.size for s in self.spans)
        if any(s.over for s in self.spans):
            top += 0.1 * self.size
        bottom = min(s.shift * self.size - DESCENT * s.scale * self.size for s in self.spans)
        return Box(left, self.y - top, left + self.width, self.y - bottom)

    def placed(self) -> Iterator[tuple[Span, float, float]]:
        """Every span, where it begins and how wide it is, in px."""
        x = self.box.left
        for span in self.spans:
            width = spans_width([span], self.size)
            yield span, x, width
            x += width

    def overlines(self) -> Iterator[tuple[Command, ...]]:
        """Lines over the spans that have one."""
        for span, x, width in self.placed():
            if span.over:
                y = self.y - self.size * (span.shift + 0.62 * span.scale)
                yield polyline([(x + 0.1 * width, y), (x + 0.95 * width, y)])


@dataclass(frozen=True)
class Area:
    """A filled rectangle: the fence of a module, the face of an operation, the ground of the legend."""

    box: Box
    fill: str
    stroke: str | None = None
    radius: float = 0.0
    role: str = "fence"
    title: str = ""


Part = Path | Text | Area
"""What is drawn of an operation."""


@dataclass(frozen=True)
class Glyph:
    """The pictogram of one operation: everything drawn for it, and the box that no other wire should enter."""

    op: int
    kind: str
    title: str
    parts: tuple[Part, ...]
    box: Box | None = None
    wires: frozenset[str] = frozenset()


@dataclass(frozen=True)
class DataColumn:
    """Where the tensors alive between two columns of operations can be counted.

    Attributes:
        index: place of the column of data.
        x: place to look at, in px.
        top, bottom: ends of the line of the drawing that the place is in.
        wires: number of wires there.
        dashes: number of dashed lines there.
    """

    index: int
    x: float
    top: float
    bottom: float
    wires: int
    dashes: int


@dataclass(frozen=True)
class Geometry:
    """A whole drawing at fixed places, in px.

    Attributes:
        width, height: sides of the drawing.
        fences: rectangles behind everything, outermost first.
        wires: axes and, dashed, the separators of tensors.
        glyphs: operations.
        texts: labels, titles and the legend.
        decor: parentheses, arrows at the ends of lines, depth edges.
        columns: places where the tensors can be counted.
    """

    width: float
    height: float
    fences: tuple[Area, ...]
    wires: tuple[Path, ...]
    glyphs: tuple[Glyph, ...]
    texts: tuple[Text, ...]
    decor: tuple[Part, ...]
    columns: tuple[DataColumn, ...]


def polyline(points: Sequence[tuple[float, float]], *, close: bool = False) -> tuple[Command, ...]:
    """Straight lines through points."""
    commands: list[Command] = [("M", points[0]), *(("L", p) for p in points[1:])]
    return (*commands, ("Z", ())) if close else tuple(commands)


def ease(x0: float, y0: float, x1: float, y1: float) -> list[Command]:
    """From one place to another, level at both ends: a straight line where the heights agree, an S-curve otherwise."""
    if abs(y1 - y0) < 0.01:
        return [("L", (x1, y1))]
    middle = (x0 + x1) / 2
    return [("C", (middle, y0, middle, y1, x1, y1))]


def circle(x: float, y: float, radius: float) -> tuple[Command, ...]:
    """A circle as four cubic arcs."""
    k = 0.5523 * radius
    r = radius
    return (
        ("M", (x - r, y)),
        ("C", (x - r, y - k, x - k, y - r, x, y - r)),
        ("C", (x + k, y - r, x + r, y - k, x + r, y)),
        ("C", (x + r, y + k, x + k, y + r, x, y + r)),
        ("C", (x - k, y + r, x - r, y + k, x - r, y)),
        ("Z", ()),
    )


def flattened(commands: Sequence[Command], steps: int = 16) -> list[tuple[float, float]]:
    """Points along a path, its curves sampled."""
    points: list[tuple[float, float]] = []
    for command, v in commands:
        if command in "ML":
            points.append((v[0], v[1]))
        elif command == "C":
            (x0, y0), (x1, y1, x2, y2, x3, y3) = points[-1], v
            for i in range(1, steps + 1):
                t = i / steps
                a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
                points.append((a * x0 + b * x1 + c * x2 + d * x3, a * y0 + b * y1 + c * y2 + d * y3))
    return points
