"""Widths of text, from a table: a drawing must not depend on the fonts of the machine that makes it.

Two faces are used, a roman one for formulas and a sans-serif one for titles. The widths are the advance widths of
STIX and DejaVu Sans, in thousandths of the font size, which Times and Verdana share to within a few per cent.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FAMILIES = {
    "italic": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "regular": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "bold": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "sans": "'DejaVu Sans', Verdana, sans-serif",
}
"""Font families of each style, as CSS writes them."""

_ITALIC = {
    214: "'", 250: " ,.·", 275: "|", 278: "/\\fijltι", 300: "²³", 333: "!()-:;I`", 389: "[]rsz", 400: "{}", 410: "γτ",
    420: '"', 422: "^", 444: "Jcekvxyεκ", 457: "ζξχλδ", 475: "νηθ", 500: "$*0123456789?S_bdghnoquσ#apπρβ", 530: "μ",
    553: "~αLTYZ", 584: "ψ", 620: "ABEFPRVXΛΣφ", 667: "CKNw", 686: "+<=>×−ω", 722: "DGHOQUmΠ", 755: "½%", 778: "&",
    833: "MW", 889: "…", 920: "@",
}  # fmt: skip
_REGULAR = {
    180: "'", 200: "|", 250: " ,.·", 278: "/:;\\ijltι", 300: "²³", 333: "!()-I[]`fr", 373: "J", 408: 's"', 441: "?acezεζξ",
    469: "^νγ", 480: "{}τ", 500: "#$*0123456789_bdghknopquvxyδκχβθρλπη", 528: "∗μ", 550: "~ασFSP", 611: "ELTZφΣωψ",
    640: "×", 685: "BCR+<=>−≥≤", 722: "ADGHKNOQUVXYwΠΛ", 750: "%½", 778: "&m⊙", 889: "M", 928: "@→←√", 944: "W", 1000: "…∏",
}  # fmt: skip
_BOLD = {
    220: "|", 250: " ,.·", 278: "'/\\il", 300: "²³", 333: "!()-:;[]`fjtι", 394: "Is{}", 444: "cerzεζξ", 500: "#$*0123456789?J_agovxyτθδ",
    550: '~Sbdhknpquβ"γνλρ', 581: "^κ∗ησ", 611: "FPμχ", 650: "παφ", 671: "BELTZΣ", 722: "×ΛACDNRUVXYwω", 755: "%+<=>−≥≤½ψ",
    784: "GHKOQΠ⊙", 833: "&m", 944: "@M", 1000: "√→←W…∏",
}  # fmt: skip
_SANS = {
    278: "'ijl", 318: "IJ ,.·", 338: "/:;\\|ι", 361: "f-", 390: "()[]t", 411: "!²³r", 460: '"', 521: "*_`sz", 545: "?εζ",
    557: "cLξν", 592: "Fχkκvxyλγ", 613: "πτPTYoδθa", 636: "eEΣhnuησSbdgpqρ$0123456789{}μβ", 660: "Kαφψ", 697: "AVΛXZBRC",
    752: "UNHΠ", 787: "DG&OQ", 838: "wω#+<=>^~×−∗→←≥≤⊙", 863: "M", 950: "%½", 1000: "mW@…",
}  # fmt: skip


def _widths(table: dict[int, str]) -> dict[str, int]:
    return {character: width for width, characters in table.items() for character in characters}


_WIDTHS = {"italic": _widths(_ITALIC), "regular": _widths(_REGULAR), "bold": _widths(_BOLD), "sans": _widths(_SANS)}
ASCENT, DESCENT = 0.70, 0.22
"""Height of capitals and depth of descenders, in units of the font size."""


@dataclass(frozen=True)
class Span:
    """A piece of a line of text in one style.

    Attributes:
        text: what stands there.
        style: `"italic"`, `"regular"`, `"bold"` or `"sans"`.
        scale: of the font size.
        shift: of the baseline, upwards, in units of the font size.
        over: whether a line is drawn above it, as the notation marks a group of axes.
    """

    text: str
    style: str = "italic"
    scale: float = 1.0
    shift: float = 0.0
    over: bool = False


def text_width(text: str, size: float, style: str = "italic") -> float:
    """Width of a line of text in px; a character that the table lacks counts as one em."""
    table = _WIDTHS[style]
    return sum(table.get(character, 1000) for character in text) * size / 1000


def spans_width(spans: Sequence[Span], size: float) -> float:
    """Width of spans set one after another, in px."""
    return sum(text_width(s.text, size * s.scale, s.style) for s in spans)


_NUMBERED = re.compile(r"^(?P<base>[^\W\d_]+)(?P<index>\d+)(?P<prime>'*)$")
_UNDERSCORED = re.compile(r"^(?P<base>[^\W\d_]+)_(?P<index>\w+)(?P<prime>'*)$")


def name_spans(name: str, *, style: str = "italic", over: bool = False) -> tuple[Span, ...]:
    """The name of an axis as a formula sets it: `x1` and `x_1` as x with a subscript, numbers upright.

    Args:
        name: of the axis.
        style: of its letters.
        over: whether the letter is overlined, for a group of axes.
    """
    match = _NUMBERED.match(name) or _UNDERSCORED.match(name)
    if match is None:
        return (Span(name, "regular" if not any(c.isalpha() for c in name) else style, over=over),)
    spans = [Span(match["base"] + match["prime"], style, over=over)]
    if match["index"]:
        spans.append(Span(match["index"], "regular" if match["index"].isdigit() else "italic", 0.7, -0.18))
    return tuple(spans)
