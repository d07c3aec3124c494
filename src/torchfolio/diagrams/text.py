"""Geometry in a terminal: the drawing on a grid of characters, wires as box-drawing characters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from torchfolio.diagrams.shapes import Area, Box, Geometry, Part, Path, Text, flattened

CELL_WIDTH, CELL_HEIGHT = 7.0, 10.0
"""Size of a character in the px of a drawing: two rows for a wire, one of them for its label."""

LEFT, RIGHT, UP, DOWN = 1, 2, 4, 8
_JOINTS = {
    LEFT: "─", RIGHT: "─", LEFT | RIGHT: "─", UP: "│", DOWN: "│", UP | DOWN: "│", LEFT | UP: "╯", LEFT | DOWN: "╮",
    RIGHT | UP: "╰", RIGHT | DOWN: "╭", LEFT | RIGHT | UP: "┴", LEFT | RIGHT | DOWN: "┬", LEFT | UP | DOWN: "┤",
    RIGHT | UP | DOWN: "├", LEFT | RIGHT | UP | DOWN: "┼",
}  # fmt: skip


class _Canvas:
    """A grid of characters; lines are kept as the directions that leave each cell."""

    def __init__(self, width: float, height: float) -> None:
        self.columns, self.rows = int(width / CELL_WIDTH) + 2, int(height / CELL_HEIGHT) + 2
        self.lines: dict[tuple[int, int], int] = {}
        self.double: set[tuple[int, int]] = set()
        self.signs: dict[tuple[int, int], str] = {}

    def cell(self, x: float, y: float) -> tuple[int, int]:
        row, column = round(y / CELL_HEIGHT), round(x / CELL_WIDTH)
        return min(max(row, 0), self.rows - 1), min(max(column, 0), self.columns - 1)

    def line(self, path: Path) -> None:
        """A wire: level pieces, and an upright one in the middle of every curve."""
        here: tuple[float, float] | None = None
        for command, v in path.commands:
            there = v[-2:] if v else here
            if command == "M" or here is None:
                here = there  # type: ignore[assignment]
                continue
            (r0, c0), (r1, c1) = self.cell(*here), self.cell(*there)  # type: ignore[misc]
            middle = (c0 + c1) // 2
            twin = "twin" in path.data
            self._level(r0, c0, middle, twin)
            self._upright(middle, r0, r1)
            self._level(r1, middle, c1, twin)
            here = there  # type: ignore[assignment]

    def dash(self, path: Path) -> None:
        points = flattened(path.commands)
        for (x0, y0), (x1, y1) in pairwise(points):
            (r, c0), (r1, c1) = self.cell(x0, y0), self.cell(x1, y1)
            for c in range(c0, c1 + 1):
                self.signs.setdefault((r if c < (c0 + c1) / 2 else r1, c), "╌")

    def _level(self, row: int, start: int, end: int, twin: bool) -> None:
        for c in range(min(start, end), max(start, end)):
            if twin and self.lines.get((row, c), 0) & RIGHT:  # two lines of a group of axes fall into one row
                self.double.add((row, c))
            self.lines[row, c] = self.lines.get((row, c), 0) | RIGHT
            self.lines[row, c + 1] = self.lines.get((row, c + 1), 0) | LEFT

    def _upright(self, column: int, start: int, end: int) -> None:
        for r in range(min(start, end), max(start, end)):
            self.lines[r, column] = self.lines.get((r, column), 0) | DOWN
            self.lines[r + 1, column] = self.lines.get((r + 1, column), 0) | UP

    def frame(self, box: Box) -> None:
        """The face of an operation: what is behind it is covered."""
        (top, left), (bottom, right) = self.cell(box.left, box.top), self.cell(box.right, box.bottom)
        right = max(right, left + 2)
        for r in range(top, bottom + 1):
            for c in range(left, right + 1):
                edge = {(top, left): "┌", (top, right): "┐", (bottom, left): "└", (bottom, right): "┘"}.get((r, c))
                side = "│" if c in (left, right) else "─" if r in (top, bottom) else " "
                touched = self.lines.get((r, c), 0)
                if side == "│" and edge is None and touched & (LEFT | RIGHT):
                    side = "┤" if c == left else "├"
                self.signs[r, c] = edge or side

    def write(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        row, column = self.cell(x, y)
        column -= {"start": 0, "middle": len(text) // 2, "end": len(text)}[anchor]
        for i, character in enumerate(text):
            if 0 <= column + i < self.columns:
                self.signs[row, column + i] = character

    def text(self) -> str:
        lines = []
        for r in range(self.rows):
            lines.append("".join(self._character(r, c) for c in range(self.columns)).rstrip())
        while lines and not lines[0]:
            lines.pop(0)
        while lines and not lines[-1]:
            lines.pop()
        return "\n".join(lines)

    def _character(self, row: int, column: int) -> str:
        joint = self.lines.get((row, column), 0)
        double = joint == LEFT | RIGHT and (row, column) in self.double
        return self.signs.get((row, column)) or ("═" if double else _JOINTS.get(joint, " "))


def render_text(geometry: Geometry) -> str:
    """The drawing as lines of characters.

    Args:
        geometry: the drawing.
    """
    canvas = _Canvas(geometry.width, geometry.height)
    for path in geometry.wires:
        if path.role == "wire":
            canvas.line(path)
    for path in geometry.wires:
        if path.role == "dash":
            canvas.dash(path)
    parts = [p for glyph in geometry.glyphs for p in glyph.parts] + list(geometry.decor)
    _draw(canvas, (p for p in parts if isinstance(p, Area)))
    _draw(canvas, (p for p in parts if isinstance(p, Path)))
    _draw(canvas, (p for p in parts if isinstance(p, Text)))
    _draw(canvas, geometry.texts)
    return canvas.text()


def _draw(canvas: _Canvas, parts: Iterable[Part]) -> None:
    for part in parts:
        if isinstance(part, Area):
            if part.role == "face":
                canvas.frame(part.box)
        elif isinstance(part, Text):
            # A label keeps to the row over its wire; of other text the middle of a letter decides.
            y = part.y + 3.2 - CELL_HEIGHT if part.role == "label" else part.y - 0.32 * part.size
            canvas.write(part.x, y, _plain(part), part.anchor)
        elif part.sign:
            points = flattened(part.commands)
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            x = (min(xs) + max(xs)) / 2
            if part.sign == "┃":
                (top, column), (bottom, _) = canvas.cell(x, min(ys)), canvas.cell(x, max(ys))
                for row in range(top, bottom + 1):
                    canvas.signs[row, column] = "┃"
            else:
                canvas.write(x, (min(ys) + max(ys)) / 2, part.sign)


_RAISED = str.maketrans("0123456789+-QKVO", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻QKVO")
_LOWERED = str.maketrans("0123456789+-", "₀₁₂₃₄₅₆₇₈₉₊₋")


def _plain(text: Text) -> str:
    return "".join(s.text.translate(_LOWERED if s.shift < 0 else _RAISED if s.shift > 0 else {}) for s in text.spans)
