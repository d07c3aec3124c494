"""Geometry as SVG, and SVG as a raster.

Plain elements, text as text, tooltips in `<title>`, the diagram itself as JSON in `<metadata>`; the same diagram gives
the same bytes. Lines that stand for data carry a class: `wire` for an axis, `dash` for the boundary of two tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path as FilePath
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from torchfolio.diagrams.fonts import FAMILIES
from torchfolio.diagrams.shapes import INK, PAPER, Area, Command, Geometry, Glyph, Part, Path, Text
from torchfolio.errors import require

WIRE_WIDTH, DASH_WIDTH = 1.2, 2.0


def render_svg(geometry: Geometry, metadata: Mapping[str, Any] | None = None, *, title: str = "") -> str:
    """An SVG document.

    Args:
        geometry: the drawing.
        metadata: JSON values that are put into `<metadata>` beside the places of the columns.
        title: title of the document.
    """
    size = f'width="{_number(geometry.width)}" height="{_number(geometry.height)}"'
    box = f'viewBox="0 0 {_number(geometry.width)} {_number(geometry.height)}"'
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} font-family={quoteattr(FAMILIES["regular"])}>']
    if title:
        lines.append(f"<title>{escape(title)}</title>")
    lines.append(f"<metadata>{escape(json.dumps(_metadata(geometry, metadata), sort_keys=True))}</metadata>")
    lines.append(f'<rect class="paper" width="100%" height="100%" fill="{PAPER}"/>')
    lines += _group("fences", (_area(f) for f in geometry.fences))
    dashes = (p for p in geometry.wires if p.role == "dash")
    wires = (p for p in geometry.wires if p.role == "wire")
    lines += _group("dashes", map(_path, dashes), f'fill="none" stroke="{INK}" stroke-width="{DASH_WIDTH}"')
    lines += _group("wires", map(_path, wires), f'fill="none" stroke="{INK}" stroke-width="{WIRE_WIDTH}"')
    ink = f'fill="none" stroke="{INK}" stroke-width="{WIRE_WIDTH}" stroke-linejoin="round"'
    lines += _group("decor", map(_part, geometry.decor), ink)
    for glyph in geometry.glyphs:
        lines += _glyph(glyph, ink)
    for role, texts in groupby(geometry.texts, key=lambda t: t.role):
        lines += _group(role + "s", map(_text, texts))
    return "\n".join([*lines, "</svg>"]) + "\n"


def render_png(svg: str, *, width: int | None = None, zoom: float | None = 2.0) -> bytes:
    """A raster of an SVG document.

    Args:
        svg: the document.
        width: width of the raster in px; by default the document's, times `zoom`.
        zoom: px of the raster for each of the document.

    Raises:
        MissingDependency: if resvg-py is not installed; with the sentence that says how to install it.
    """
    resvg_py = require("resvg_py", "draw")
    import matplotlib

    # The fonts that the widths are of come with matplotlib, so that the raster looks the same on every machine.
    fonts = str(FilePath(matplotlib.get_data_path()) / "fonts" / "ttf")
    scale: dict[str, Any] = {"width": width} if width is not None else {"zoom": zoom}
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, font_dirs=[fonts], skip_system_fonts=True, **scale))


def _metadata(geometry: Geometry, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    columns = [
        {"index": c.index, "x": round(c.x, 2), "top": round(c.top, 2), "bottom": round(c.bottom, 2), "wires": c.wires,
         "dashes": c.dashes}
        for c in geometry.columns
    ]  # fmt: skip
    return {"columns": columns, "diagram": dict(metadata or {})}


def _group(name: str, items: Iterable[str], attributes: str = "") -> list[str]:
    inside = list(items)
    return [f'<g class="{name}"{" " + attributes if attributes else ""}>', *inside, "</g>"] if inside else []


def _glyph(glyph: Glyph, attributes: str) -> list[str]:
    about = f"<title>{escape(glyph.title)}</title>" if glyph.title else ""
    data = f' data-op="{glyph.op}" data-kind={quoteattr(glyph.kind)}'
    if glyph.box is not None:
        box = " ".join(_number(v) for v in (glyph.box.left, glyph.box.top, glyph.box.right, glyph.box.bottom))
        data += f' data-box="{box}" data-wires={quoteattr(" ".join(sorted(glyph.wires)))}'
    return [f'<g class="op" {attributes}{data}>{about}', *map(_part, glyph.parts), "</g>"]


def _part(part: Part) -> str:
    if isinstance(part, Path):
        return _path(part)
    return _text(part) if isinstance(part, Text) else _area(part)


def _path(path: Path) -> str:
    attributes = [f'd="{_commands(path.commands)}"']
    if path.role != "glyph":
        attributes.insert(0, f'class="{path.role}"')
    if path.role == "dash":
        attributes.append('stroke-dasharray="6 4"')
    if path.width is not None:
        attributes.append(f'stroke-width="{_number(path.width)}"')
    attributes += [f'{key}="{value}"' for key, value in (("fill", path.fill), ("stroke", path.stroke)) if value]
    attributes += [f"data-{key}={quoteattr(value)}" for key, value in sorted(path.data.items())]
    about = f"><title>{escape(path.title)}</title></path>" if path.title else "/>"
    return f"<path {' '.join(attributes)}{about}"


def _commands(commands: Iterable[Command]) -> str:
    """The `d` attribute of a path."""
    return "".join(command + " ".join(map(_number, values)) for command, values in commands)


def _text(text: Text) -> str:
    place = f'x="{_number(text.x)}" y="{_number(text.y)}" font-size="{_number(text.size)}" text-anchor="{text.anchor}"'
    paint = f'class="{text.role}" stroke="none" fill="{text.colour or INK}"'
    whole = len(text.spans) == 1 and text.spans[0].scale == 1 and not text.spans[0].shift
    if whole:
        body, face = escape(text.text), f" {_face(text.spans[0].style)}"
    else:
        body, face = _tspans(text), ""
    over = f'fill="none" stroke="{text.colour or INK}" stroke-width="0.9"'
    lines = "".join(f'<path d="{_commands(line)}" {over}/>' for line in text.overlines())
    return f"<text {place} {paint}{face}>{body}</text>{lines}"


def _tspans(text: Text) -> str:
    """Spans with their baselines moved; SVG's `dy` is relative to the span before."""
    parts, now = [], 0.0
    for span in text.spans:
        dy = (now - span.shift) * text.size
        now = span.shift
        attributes = _face(span.style)
        if abs(dy) > 1e-6:
            attributes += f' dy="{_number(dy)}"'
        if span.scale != 1:
            attributes += f' font-size="{_number(text.size * span.scale)}"'
        parts.append(f"<tspan {attributes}>{escape(span.text)}</tspan>")
    return "".join(parts)


def _face(style: str) -> str:
    if style == "sans":
        return f"font-family={quoteattr(FAMILIES['sans'])}"
    return {"italic": 'font-style="italic"', "bold": 'font-weight="bold"', "regular": ""}[style]


def _area(area: Area) -> str:
    box = area.box
    place = f'x="{_number(box.left)}" y="{_number(box.top)}"'
    size = f'width="{_number(box.right - box.left)}" height="{_number(box.bottom - box.top)}"'
    stroke = area.stroke or "none"
    radius = f' rx="{_number(area.radius)}"' if area.radius else ""
    about = f"><title>{escape(area.title)}</title></rect>" if area.title else "/>"
    return f'<rect class="{area.role}" {place} {size}{radius} fill="{area.fill}" stroke="{stroke}"{about}'


def _number(value: float) -> str:
    """Two decimals at most, none where they are zeros, and no minus before a zero."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
