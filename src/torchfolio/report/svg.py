"""Pictures inside the page: foreign SVG made safe, small plots of our own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from typing import Any
from xml.etree import ElementTree as ET

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
_FORBIDDEN = {"script", "foreignObject", "iframe", "object", "embed", "animate", "set", "handler", "metadata"}


def inline_svg(text: str, prefix: str, label: str) -> str:
    """An SVG document as an element of the page.

    Scripts, event handlers, foreign content and links that leave the document are removed; ids get a prefix, so that
    those of several pictures do not meet; the picture scales with its column.

    Args:
        text: the document.
        prefix: of all ids.
        label: what a screen reader says.

    Returns:
        Markup; a sentence if the document cannot be read.
    """
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    if re.search(r"<!ENTITY", text, re.I):
        return "<p>This picture declares entities and is not shown.</p>"
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        return f"<p>This picture cannot be read: {escape(str(error))}</p>"
    if root.tag != f"{{{SVG}}}svg":
        return "<p>This picture is no SVG.</p>"
    _clean(root, prefix)
    for name in ("width", "height"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return ET.tostring(root, encoding="unicode")


def _clean(element: ET.Element, prefix: str) -> None:
    for child in list(element):
        if not isinstance(child.tag, str) or child.tag.rpartition("}")[2] in _FORBIDDEN:
            element.remove(child)
        else:
            _clean(child, prefix)
    if element.tag == f"{{{SVG}}}style":
        # Rules of one picture would reach all others; matplotlib's only sets line joins.
        element.text = ""
    for name, value in list(element.attrib.items()):
        local = name.rpartition("}")[2].lower()
        if local.startswith("on") or "javascript:" in value.lower():
            del element.attrib[name]
        elif local == "id":
            element.set(name, f"{prefix}-{value}")
        elif local in ("href", "src"):
            if value.startswith("#"):
                element.set(name, f"#{prefix}-{value[1:]}")
            elif not value.startswith("data:image/png;base64,"):
                del element.attrib[name]
        elif "url(" in value:
            inner = re.sub(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)", rf"url(#{prefix}-\1)", value)
            element.set(name, inner if "url(#" in inner else "")


def dot_plot(values: Mapping[str, Mapping[str, Any]], condition: str | None) -> str:
    """Every seed's values as dots on a common axis, with the mean as a bar: one row a name.

    Values whose sizes differ by more than fifty times would share an axis badly and are not drawn.
    """
    rows = {name: [s for s in v["seeds"] if s is not None] for name, v in values.items() if v["mean"] is not None}
    rows = {name: seeds for name, seeds in rows.items() if seeds}
    flat = [s for seeds in rows.values() for s in seeds]
    if len(rows) < 2 or len({round(s, 12) for s in flat}) < 2:
        return ""
    sizes = [abs(values[name]["mean"]) for name in rows if values[name]["mean"]]
    if sizes and max(sizes) > 50 * min(sizes):
        return ""
    low, high = min(flat), max(flat)
    left, width, height = 112, 168, 18

    def x(value: float) -> float:
        return round(left + (value - low) / (high - low) * width, 1)

    parts = []
    for k, (name, seeds) in enumerate(rows.items()):
        y = 12 + k * height
        shown = name if len(name) <= 16 else name[:15] + "…"
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end">{escape(shown)}</text>')
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" class="axis"/>')
        parts += [f'<circle cx="{x(s)}" cy="{y}" r="3.2"/>' for s in seeds]
        mean = x(values[name]["mean"])
        parts.append(f'<line x1="{mean}" x2="{mean}" y1="{y - 6}" y2="{y + 6}" class="mean"/>')
    total = 12 + len(rows) * height
    parts.append(f'<text x="{left}" y="{total + 4}" class="tick">{low:.3g}</text>')
    parts.append(f'<text x="{left + width}" y="{total + 4}" text-anchor="end" class="tick">{high:.3g}</text>')
    view = f"0 0 {left + width + 10} {total + 8}"
    label = f"values of {', '.join(rows)} on each seed"
    return f'<svg class="dots" viewBox="{view}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
