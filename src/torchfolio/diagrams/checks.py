"""Checks of a drawing, read from the SVG document alone.

What is alive between two operations is counted twice: as the metadata say, and as lines that really cross the middle
of that column, from the coordinates of their paths. Text is checked for overlaps by the table of widths, wires for
running through boxes of operations they have no part in.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any
from xml.etree import ElementTree

from torchfolio.diagrams.fonts import Span
from torchfolio.diagrams.shapes import Box, Command, Text, flattened

_SVG = "{http://www.w3.org/2000/svg}"
_ARGUMENTS = {"M": 2, "L": 2, "C": 6, "Z": 0}


@dataclass(frozen=True)
class ColumnCount:
    """Lines in one column of data.

    Attributes:
        index: place of the column.
        wires, dashes: lines whose paths cross its middle.
        wires_stated, dashes_stated: lines that the metadata state.
    """

    index: int
    wires: int
    dashes: int
    wires_stated: int
    dashes_stated: int

    @property
    def agrees(self) -> bool:
        return (self.wires, self.dashes) == (self.wires_stated, self.dashes_stated)


@dataclass(frozen=True)
class Check:
    """What was found in a drawing.

    Attributes:
        columns: counts of every column of data.
        overlaps: pairs of texts that overlap.
        wires: number of wires.
        through: axes of wires that run through a box of an operation they have no part in, with its kind.
        width, height: sides of the drawing, px.
        crossings: places where a wire crosses another.
        smallest: size of the smallest text, px.
    """

    columns: tuple[ColumnCount, ...]
    overlaps: tuple[tuple[str, str], ...]
    wires: int
    through: tuple[tuple[str, str], ...]
    width: float
    height: float
    crossings: int
    smallest: float

    @property
    def clear(self) -> float:
        """Share of wires that run through no box of another operation."""
        return 1.0 - len({axis for axis, _ in self.through}) / self.wires if self.wires else 1.0

    @property
    def counts_agree(self) -> bool:
        return all(c.agrees for c in self.columns)


def check_svg(svg: str) -> Check:
    """Read an SVG document made here and check it.

    Args:
        svg: the document.

    Raises:
        ValueError: if it is not XML, or was not made by `Diagram.svg`.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"expected an SVG document, got something that is not XML: {error}") from error
    stated = svg_metadata(root)["columns"]
    wires, dashes = _lines(root, "wire"), _lines(root, "dash")
    columns = tuple(
        ColumnCount(c["index"], _crossings(wires, c), _crossings(dashes, c), c["wires"], c["dashes"]) for c in stated
    )
    size = float(root.get("width", 0)), float(root.get("height", 0))
    texts = list(_texts(root))
    smallest = min((t.size * s.scale for t in texts for s in t.spans), default=0.0)
    return Check(
        columns, tuple(_overlaps(texts)), len(wires), tuple(_through(root)), *size, _crossed(wires), round(smallest, 2)
    )


def svg_metadata(root: ElementTree.Element | str) -> dict[str, Any]:
    """The JSON in `<metadata>`: `columns`, places of the columns of data, and `diagram`, the diagram itself.

    Raises:
        ValueError: if there is none.
    """
    element = (ElementTree.fromstring(root) if isinstance(root, str) else root).find(f"{_SVG}metadata")
    if element is None or not element.text:
        raise ValueError("expected an SVG document of a circuit diagram, got one without metadata")
    return json.loads(element.text)


def parse_path(data: str) -> list[Command]:
    """The commands in a `d` attribute."""
    commands: list[Command] = []
    for letter, rest in re.findall(r"([MLCZ])([^MLCZ]*)", data):
        values = tuple(float(v) for v in rest.split())
        if len(values) != _ARGUMENTS[letter]:
            raise ValueError(f"expected {_ARGUMENTS[letter]} numbers after {letter}, got {len(values)}")
        commands.append((letter, values))
    return commands


def _lines(root: ElementTree.Element, role: str) -> list[list[tuple[float, float]]]:
    return [flattened(parse_path(p.get("d", ""))) for p in root.iter(f"{_SVG}path") if p.get("class") == role]


def _crossings(lines: Sequence[Sequence[tuple[float, float]]], column: dict[str, Any]) -> int:
    """How many lines cross the middle of a column within its line of the drawing."""
    x, count = column["x"], 0
    for points in lines:
        for (x0, y0), (x1, y1) in pairwise(points):
            if min(x0, x1) <= x < max(x0, x1):
                y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
                count += column["top"] <= y <= column["bottom"]
    return count


def _crossed(lines: Sequence[Sequence[tuple[float, float]]], cell: float = 16.0) -> int:
    """How often two lines cross. Where they meet at an end, as at a dot, they do not."""
    cells: dict[int, list[tuple[int, tuple[float, float], tuple[float, float]]]] = defaultdict(list)
    for i, points in enumerate(lines):
        for a, b in pairwise(points):
            for c in range(int(min(a[0], b[0]) // cell), int(max(a[0], b[0]) // cell) + 1):
                cells[c].append((i, a, b))
    found = set[tuple[int, int, int, int]]()
    for pieces in cells.values():
        for (i, a, b), (j, c, d) in combinations(pieces, 2):
            if i != j and min(a[1], b[1]) <= max(c[1], d[1]) and min(c[1], d[1]) <= max(a[1], b[1]):
                sides = [(q[0] - p[0]) * (s[1] - p[1]) - (q[1] - p[1]) * (s[0] - p[0])
                         for p, q, s in ((a, b, c), (a, b, d), (c, d, a), (c, d, b))]  # fmt: skip
                if (sides[0] > 0) != (sides[1] > 0) and (sides[2] > 0) != (sides[3] > 0):
                    t = sides[2] / (sides[2] - sides[3])
                    place = a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
                    ends = [lines[k][e] for k in (i, j) for e in (0, -1)]
                    if all(abs(place[0] - x) + abs(place[1] - y) > 1 for x, y in ends):
                        found.add((min(i, j), max(i, j), round(place[0] / 2), round(place[1] / 2)))
    return len(found)


def _texts(root: ElementTree.Element) -> Iterator[Text]:
    """Every line of text, put together from its elements as the renderer set it."""
    for element in root.iter(f"{_SVG}text"):
        size = float(element.get("font-size", 12))
        spans = [Span(element.text, _style(element))] if element.text else []
        baseline = 0.0
        for part in element.iter(f"{_SVG}tspan"):
            baseline -= float(part.get("dy", 0)) / size
            scale = float(part.get("font-size", size)) / size
            spans.append(Span(part.text or "", _style(part), scale, baseline))
        place = float(element.get("x", 0)), float(element.get("y", 0))
        if spans:
            yield Text(*place, tuple(spans), size, element.get("text-anchor", "start"), element.get("class", ""))


def _style(element: ElementTree.Element) -> str:
    if "Sans" in element.get("font-family", ""):
        return "sans"
    if element.get("font-weight") == "bold":
        return "bold"
    return "italic" if element.get("font-style") == "italic" else "regular"


def _overlaps(texts: Sequence[Text], slack: float = 1.0) -> Iterator[tuple[str, str]]:
    """Pairs whose boxes share more than a hair; boxes are sorted, so that only neighbours are compared."""
    boxes = sorted(((t.box, t.text) for t in texts), key=lambda pair: (pair[0].left, pair[0].top, pair[1]))
    open_boxes: list[tuple[Box, str]] = []
    for box, text in boxes:
        open_boxes = [(b, t) for b, t in open_boxes if b.right > box.left]
        yield from ((other, text) for b, other in open_boxes if box.overlaps(b, slack))
        open_boxes.append((box, text))


def _through(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Wires that enter the box of an operation that has no part in them."""
    boxes = []
    for group in root.iter(f"{_SVG}g"):
        if group.get("data-box"):
            box = Box(*(float(v) for v in group.get("data-box", "").split()))
            boxes.append((box, frozenset(group.get("data-wires", "").split()), group.get("data-kind", "")))
    for path in root.iter(f"{_SVG}path"):
        if path.get("class") != "wire":
            continue
        keys = set(path.get("data-keys", "").split())
        points = [p for a, b in pairwise(flattened(parse_path(path.get("d", "")))) for p in _between(a, b)]
        left, right = min(p[0] for p in points), max(p[0] for p in points)
        for box, related, kind in boxes:
            if box.right < left or box.left > right or keys & related:
                continue
            if any(box.contains(*p, 0.6) for p in points):
                yield path.get("data-axis", ""), kind


def _between(a: tuple[float, float], b: tuple[float, float], step: float = 3.0) -> Iterator[tuple[float, float]]:
    """Points on a straight piece, a few px apart."""
    count = max(1, int(max(abs(b[0] - a[0]), abs(b[1] - a[1])) / step))
    for i in range(count + 1):
        t = i / count
        yield a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1])
