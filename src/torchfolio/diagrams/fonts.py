"""Widths of text, from the fonts that matplotlib brings: a drawing must not depend on those of the machine that makes it.

Two faces are used, a roman one for formulas and a sans-serif one for titles. The widths are the advance widths of STIX and
DejaVu Sans, which Times and Verdana share to within a few per cent.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.ft2font import FT2Font

FAMILIES = {
    "italic": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "regular": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "bold": "STIXGeneral, 'STIX Two Text', 'Times New Roman', Times, serif",
    "sans": "'DejaVu Sans', Verdana, sans-serif",
}
"""Font families of each style, as CSS writes them."""

FILES = {"italic": "STIXGeneralItalic", "regular": "STIXGeneral", "bold": "STIXGeneralBol", "sans": "DejaVuSans"}
ASCENT, DESCENT = 0.70, 0.22
"""Height of capitals and depth of descenders, in units of the font size."""


@dataclass(frozen=True)
class Span:
    """A piece of a line of text in one style.

    Attributes:
        text: characters that stand there.
        style: `"italic"`, `"regular"`, `"bold"` or `"sans"`.
        scale: factor of the font size.
        shift: rise of the baseline, in units of the font size.
        over: whether a line is drawn above it, as the notation marks a group of axes.
    """

    text: str
    style: str = "italic"
    scale: float = 1.0
    shift: float = 0.0
    over: bool = False


@functools.cache
def _font(style: str) -> FT2Font:
    import matplotlib
    from matplotlib.ft2font import FT2Font

    return FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FILES[style]}.ttf"))


@functools.cache
def _width(character: str, style: str) -> float:
    """Width of a character in units of the font size; one that the font lacks counts as one."""
    from matplotlib.ft2font import LoadFlags

    font, code = _font(style), ord(character)
    return (
        font.load_char(code, LoadFlags.NO_SCALE).horiAdvance / font.units_per_EM if font.get_char_index(code) else 1.0
    )


def text_width(text: str, size: float, style: str = "italic") -> float:
    """Width of a line of text in px."""
    return sum(_width(character, style) for character in text) * size


def spans_width(spans: Sequence[Span], size: float) -> float:
    """Width of spans set one after another, in px."""
    return sum(text_width(s.text, size * s.scale, s.style) for s in spans)


_INDEXED = re.compile(r"(?P<base>[^\W\d_]+)(_(?=\w)|(?=\d+'*$))(?P<index>\w+)(?P<prime>'*)")


def name_spans(name: str, *, style: str = "italic", over: bool = False) -> tuple[Span, ...]:
    """The name of an axis as a formula sets it: `x1` and `x_1` as x with a subscript, numbers upright.

    Args:
        name: name of the axis.
        style: style of its letters.
        over: whether the letter is overlined, for a group of axes.
    """
    match = _INDEXED.fullmatch(name)
    if match is None:
        return (Span(name, "regular" if not any(c.isalpha() for c in name) else style, over=over),)
    index = Span(match["index"], "regular" if match["index"].isdigit() else "italic", 0.7, -0.18)
    return Span(match["base"] + match["prime"], style, over=over), index
