"""Geometry as PDF: vectors and text, by matplotlib."""

from __future__ import annotations

import io
from typing import Any

from torchfolio.diagrams.shapes import INK, Area, Geometry, Part, Path, Text
from torchfolio.diagrams.svg import DASH_WIDTH, WIRE_WIDTH

POINTS = 0.75
"""Points in a px: 72 of the one and 96 of the other are an inch."""


def render_pdf(geometry: Geometry, *, title: str = "") -> bytes:
    """A PDF document of one page as large as the drawing; the same bytes for the same drawing.

    Args:
        geometry: the drawing.
        title: title of the document.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.figure import Figure

    figure = Figure(figsize=(geometry.width / 96, geometry.height / 96))
    FigureCanvasPdf(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, geometry.width), ylim=(geometry.height, 0))
    axes.axis("off")
    page = _Page(axes)
    dashes = [p for p in geometry.wires if p.role == "dash"]
    wires = [p for p in geometry.wires if p.role != "dash"]
    glyphs = [part for g in geometry.glyphs for part in g.parts]
    for part in (*geometry.fences, *dashes, *wires, *geometry.decor, *glyphs, *geometry.texts):
        page.put(part)
    file = io.BytesIO()
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(file, format="pdf", metadata={"Title": title or None, "CreationDate": None})
    return file.getvalue()


class _Page:
    """Puts parts onto axes in px, one above the other."""

    def __init__(self, axes: Any) -> None:
        self.axes, self.order = axes, 0

    def put(self, part: Part) -> None:
        self.order += 1
        if isinstance(part, Path):
            self._path(part)
        elif isinstance(part, Text):
            self._text(part)
        else:
            self._area(part)

    def _path(self, path: Path) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Line

        points: list[tuple[float, float]] = []
        codes: list[Any] = []
        for command, v in path.commands:
            pairs = list(zip(v[::2], v[1::2], strict=True)) or [(0.0, 0.0)]
            points += pairs
            codes += {"M": [Line.MOVETO], "L": [Line.LINETO], "C": [Line.CURVE4] * 3, "Z": [Line.CLOSEPOLY]}[command]
        dash = path.role == "dash"
        width = path.width if path.width is not None else DASH_WIDTH if dash else WIRE_WIDTH
        self.axes.add_patch(
            PathPatch(
                Line(points, codes),
                facecolor=path.fill or "none",
                edgecolor=path.stroke or INK,
                linewidth=width * POINTS,
                linestyle=(0, (6 / width, 4 / width)) if dash else "-",
                capstyle="butt",
                joinstyle="round",
                zorder=self.order,
            )
        )

    def _area(self, area: Area) -> None:
        from matplotlib.patches import FancyBboxPatch, Rectangle

        box, more = area.box, {"facecolor": area.fill, "edgecolor": area.stroke or "none", "linewidth": POINTS}
        place, size = (box.left, box.top), (box.right - box.left, box.bottom - box.top)
        if area.radius:
            style = f"round,pad=0,rounding_size={min(area.radius, min(size) / 2)}"
            self.axes.add_patch(
                FancyBboxPatch(place, *size, boxstyle=style, zorder=self.order, mutation_aspect=1, **more)
            )
        else:
            self.axes.add_patch(Rectangle(place, *size, zorder=self.order, **more))

    def _text(self, text: Text) -> None:
        """Every span where the table of widths has it."""
        for span, x, _ in text.placed():
            face = {"italic": {"fontstyle": "italic"}, "bold": {"fontweight": "bold"}}.get(span.style, {})
            family = ["DejaVu Sans"] if span.style == "sans" else ["STIXGeneral", "DejaVu Serif"]
            self.axes.text(
                x, text.y - text.size * span.shift, span.text.replace("$", r"\$"), fontsize=text.size * span.scale * POINTS,
                fontfamily=family, color=text.colour or INK, ha="left", va="baseline", zorder=self.order, **face,
            )  # fmt: skip
        for line in text.overlines():
            self._path(Path(line, width=0.9, stroke=text.colour))
