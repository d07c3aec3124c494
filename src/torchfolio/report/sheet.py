"""A page about one network: cards with sentences, tables and pictures, in one file that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfolio import __version__
from torchfolio.report.svg import bar_plot, picture, policy, squares
from torchfolio.runs.store import atomic

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Bars", "Code", "Glance", "Picture", "Sheet", "Squares", "Table", "write_sheet"]


@dataclass(frozen=True)
class Table:
    """A table: names of columns, and rows of values, numbers or text; `fold` is a line that it opens under."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    fold: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of each column: `text`, which is read from its left edge, or `number`."""
        return tuple("text" if any(isinstance(row[k], str) for row in self.rows) else "number"
                     for k in range(len(self.columns)))  # fmt: skip

    @classmethod
    def of(cls, frame: pd.DataFrame) -> Table:
        """A table from a frame, its index first."""
        named = frame.reset_index() if frame.index.name else frame
        rows = tuple(tuple(row) for row in named.to_numpy(dtype=object))
        return cls(tuple(str(c).replace("_", " ") for c in named.columns), rows)


@dataclass(frozen=True)
class Bars:
    """Values by name, drawn as bars in the colours of the page; the last one is what the card is about."""

    values: Mapping[str, float]
    unit: str


@dataclass(frozen=True)
class Squares:
    """A square for each thing that holds, does not (`False`) or is not known (`None`), with what it says."""

    verdicts: Sequence[tuple[str, bool | None]]


@dataclass(frozen=True)
class Picture:
    """A figure, or the text of an SVG document, and what it shows."""

    figure: Figure | Bars | Squares | str
    caption: str


@dataclass(frozen=True)
class Code:
    """A script: what it needs, the few lines that it is about, and a command that does the same."""

    setup: str
    lines: str
    command: str


@dataclass(frozen=True)
class Glance:
    """What stands of a card at the top of the page: a figure to remember, words to it, a picture."""

    figure: str
    words: str
    picture: Picture


@dataclass(frozen=True)
class Sheet:
    """One card.

    Attributes:
        title: title of the card.
        eyebrow: small text above it.
        badge: a word at its side, and its kind: `holds`, `fails` or `unmeasured`.
        sentences: sentences to say.
        notes: sentences on what to be careful about.
        tables: figures in rows.
        pictures: pictures with their captions.
        code: lines that do the same.
        glance: part that stands at the top of the page and leads to the card.
    """

    title: str
    eyebrow: str = ""
    badge: tuple[str, str] | None = None
    sentences: Sequence[str] = ()
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = field(default_factory=tuple)
    code: Code | None = None
    glance: Glance | None = None


def write_sheet(path: str | Path, title: str, cards: Sequence[Sheet]) -> Path:
    """Write a page of cards; figures are closed.

    Args:
        path: path of the HTML file.
        title: title of the page.
        cards: cards from top to bottom.
    """
    import matplotlib.pyplot as plt
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("torchfolio.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["cell"] = _cell
    environment.filters["drawn"] = lambda p: Markup(_svg(p.figure, p.caption))
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    page = environment.get_template("sheet.html").render(
        title=title,
        cards=cards,
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(style),
        policy=policy(style),
    )
    for card in cards:
        for p in (*card.pictures, *([card.glance.picture] if card.glance else [])):
            if not isinstance(p.figure, Bars | Squares | str):
                plt.close(p.figure)
    with atomic(Path(path)) as file:
        file.write(page.encode("utf-8", "replace"))
    return Path(path)


def _svg(figure: Figure | Bars | Squares | str, label: str) -> str:
    if isinstance(figure, str):
        return picture(figure, label)
    if isinstance(figure, Bars):
        return bar_plot(figure.values, figure.unit, label)
    if isinstance(figure, Squares):
        return squares(figure.verdicts, label)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return picture(buffer.getvalue(), label)


def _cell(value: Any) -> str:
    """A value as it stands in a table."""
    if isinstance(value, bool) or str(type(value).__name__) == "bool_":
        return "yes" if value else ""
    if isinstance(value, float):
        return "–" if value != value else f"{value:.4g}"
    if isinstance(value, int) or hasattr(value, "__index__"):
        return f"{int(value):,}"
    if isinstance(value, tuple):
        return " × ".join(map(str, value))
    return "–" if value is None else str(value)
