"""Pictures inside the page: foreign SVG as images, small plots of our own, and what the page may do at all."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from xml.etree import ElementTree as ET

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
ELEMENTS = frozenset(
    [
        "svg",
        "g",
        "defs",
        "style",
        "use",
        "symbol",
        "path",
        "rect",
        "circle",
        "ellipse",
        "line",
        "polyline",
        "polygon",
        "text",
        "tspan",
        "image",
        "clipPath",
        "mask",
        "pattern",
        "marker",
        "linearGradient",
        "radialGradient",
        "stop",
        "title",
        "desc",
    ]
)
"""Elements of a picture that are kept, all of SVG's own namespace."""
ATTRIBUTES = frozenset(
    [
        "id",
        "class",
        "style",
        "transform",
        "d",
        "x",
        "y",
        "x1",
        "y1",
        "x2",
        "y2",
        "cx",
        "cy",
        "r",
        "rx",
        "ry",
        "fx",
        "fy",
        "dx",
        "dy",
        "points",
        "width",
        "height",
        "viewBox",
        "preserveAspectRatio",
        "version",
        "type",
        "offset",
        "rotate",
        "textLength",
        "lengthAdjust",
        "gradientUnits",
        "gradientTransform",
        "spreadMethod",
        "clipPathUnits",
        "maskUnits",
        "maskContentUnits",
        "patternUnits",
        "patternContentUnits",
        "patternTransform",
        "markerUnits",
        "markerWidth",
        "markerHeight",
        "orient",
        "refX",
        "refY",
        "fill",
        "fill-opacity",
        "fill-rule",
        "stroke",
        "stroke-width",
        "stroke-opacity",
        "stroke-dasharray",
        "stroke-dashoffset",
        "stroke-linecap",
        "stroke-linejoin",
        "stroke-miterlimit",
        "opacity",
        "color",
        "display",
        "visibility",
        "clip-path",
        "clip-rule",
        "mask",
        "marker-start",
        "marker-mid",
        "marker-end",
        "stop-color",
        "stop-opacity",
        "font-family",
        "font-size",
        "font-style",
        "font-weight",
        "font-variant",
        "font-stretch",
        "text-anchor",
        "dominant-baseline",
        "alignment-baseline",
        "letter-spacing",
        "word-spacing",
        "paint-order",
        "shape-rendering",
        "image-rendering",
        "role",
        "aria-label",
        "aria-hidden",
    ]
)
"""Attributes that are kept, besides links within the picture and to pictures that it holds itself."""
LINKS = ("href", f"{{{XLINK}}}href")
LOCAL = re.compile(r"url\(\s*['\"]?#([^()\s'\"\\]*)['\"]?\s*\)")
"""A link within the picture, in a value."""
FUNCTIONS = frozenset(
    ["rgb", "rgba", "hsl", "hsla", "matrix", "translate", "scale", "rotate", "skewX", "skewY", "calc", ""]
)
"""What values may call."""
MOST_DRAWN = 1_000_000
"""Elements that a picture may draw, each copy counted."""
LARGEST = 2**24
"""Characters of a picture, at most."""


def policy(style: str, script: str | None = None) -> str:
    """The Content-Security-Policy of a page: its own style and script, pictures that it holds, and nothing else."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode()}'"

    scripts = f"script-src {digest(script)}; " if script is not None else ""
    return f"default-src 'none'; {scripts}style-src {digest(style)}; img-src data:; base-uri 'none'; form-action 'none'"


def picture(text: str, label: str) -> str:
    """An SVG document as an image that the page holds.

    Scripts do not run in an image, and it loads nothing. Besides, only `ELEMENTS` and `ATTRIBUTES` are kept, so that it is
    as harmless when it is opened alone.

    Args:
        text: document.
        label: text for screen readers.

    Returns:
        Markup; a sentence if the document cannot be read.
    """
    if len(text) > LARGEST:
        return f"<p>This picture has more than {LARGEST:,} characters and is not shown.</p>"
    if re.search(r"<!ENTITY", text, re.I):
        return "<p>This picture declares entities and is not shown.</p>"
    try:
        root = ET.fromstring(text)
        if root.tag != f"{{{SVG}}}svg":
            return "<p>This picture is no SVG.</p>"
        _clean(root)
        _check_size(root)
        # Namespaces that elements and attributes no longer use are not declared again.
        ET.register_namespace("", SVG)
        ET.register_namespace("xlink", XLINK)
        data = base64.b64encode(ET.tostring(root, encoding="utf-8", xml_declaration=True)).decode("ascii")
    except (ET.ParseError, ValueError, RecursionError) as error:
        return f"<p>This picture cannot be read: {escape(str(error))}</p>"
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(label)}">'


def _clean(root: ET.Element) -> None:
    """Remove what is not known, from the whole tree."""
    pending = [root]
    while pending:
        element = pending.pop()
        for child in list(element):
            namespace, _, name = child.tag[1:].rpartition("}") if isinstance(child.tag, str) else ("", "", "")
            if namespace != SVG or name not in ELEMENTS:
                element.remove(child)
            else:
                pending.append(child)
        if element.tag == f"{{{SVG}}}style":
            text = "".join([element.text or "", *(child.tail or "" for child in element)])
            element[:], element.text = [], text if _plain(text) else ""
        for name, value in list(element.attrib.items()):
            if name in LINKS:
                known = value.startswith("#") or re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=\s]*$", value)
            else:
                known = name == "aria-label" or (name in ATTRIBUTES and _plain(value))
            if not known:
                del element.attrib[name]


def _plain(style: str) -> bool:
    """Whether a style or value names nothing outside the picture: it calls functions of numbers alone."""
    inner = LOCAL.sub("", style)
    called = re.findall(r"([\w-]*)\s*\(", inner)
    return not (set(called) - FUNCTIONS) and not re.search(r"expression|javascript|\\|@", inner, re.I)


def _check_size(root: ET.Element) -> None:
    """Refuse a picture that would be drawn for ever: copies of copies of copies.

    Raises:
        ValueError: if it draws more than `MOST_DRAWN` elements, or a part of itself.
    """
    by_name = {element.get("id"): element for element in root.iter() if element.get("id")}
    drawn: dict[ET.Element, int] = {}  # 0 where it is being counted

    def count(element: ET.Element) -> int:
        if drawn.setdefault(element, 0):
            return drawn[element]
        total = 1
        for part in [*element, *(by_name[name] for name in _named(element) if name in by_name)]:
            if drawn.get(part) == 0:
                raise ValueError("it is drawn within itself")
            total += count(part)
            if total > MOST_DRAWN:
                raise ValueError(f"it draws more than {MOST_DRAWN:,} elements")
        drawn[element] = total
        return total

    count(root)


def _named(element: ET.Element) -> Iterator[str]:
    """Names of other elements that an element draws."""
    for name, value in element.attrib.items():
        if name in LINKS and value.startswith("#"):
            yield value[1:]
        yield from LOCAL.findall(value)


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


def bar_plot(values: Mapping[str, float], unit: str, label: str) -> str:
    """Bars from the left, each below its name, with its value behind it: the last is the one to look at."""
    most = max([abs(v) for v in values.values() if v == v], default=0.0) or 1.0
    parts = []
    for k, (name, value) in enumerate(values.items()):
        y, length = 46 * k, round(220 * max(value, 0.0) / most, 1)
        kind = "this" if k == len(values) - 1 else "other"
        parts.append(f'<text x="0" y="{y + 13}">{escape(name)}</text>')
        parts.append(f'<rect x="0" y="{y + 19}" width="{length}" height="17" rx="3" class="{kind}"/>')
        parts.append(f'<text x="{length + 8}" y="{y + 32}" class="value">{value:.4g} {escape(unit)}</text>')
    view = f"0 0 320 {46 * len(values)}"
    return f'<svg class="bars" viewBox="{view}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def squares(verdicts: Sequence[tuple[str, bool | None]], label: str) -> str:
    """A square for each verdict, in rows, in the order they come."""
    across = 27
    kinds = {True: "holds", False: "fails", None: "unmeasured"}
    parts = [
        f'<rect x="{12 * (k % across)}" y="{12 * (k // across)}" width="9" height="9" rx="2" class="{kinds[verdict]}">'
        f"<title>{escape(text)}</title></rect>"
        for k, (text, verdict) in enumerate(verdicts)
    ]
    view = f"0 0 {12 * across - 3} {12 * -(-len(verdicts) // across) - 3}"
    return f'<svg class="squares" viewBox="{view}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
