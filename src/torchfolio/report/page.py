"""From run folders to a page: what is shown, and in which order."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from torchfolio import __version__, catalog
from torchfolio.errors import TorchfolioError
from torchfolio.report.svg import dot_plot, inline_svg
from torchfolio.runs.outcome import Outcome
from torchfolio.runs.store import atomic

FULLNESS = {"smoke": 0, "quick": 1, "full": 2}


@dataclass
class Card:
    """One paper on the page.

    Attributes:
        outcome: the run that is shown; `None` if it cannot be read.
        folder: of the run.
        paper: metadata; `None` for a slug outside the catalogue.
        earlier: other runs of the paper, as lines.
        broken: why the run cannot be read.
        figures: pictures with their captions.
    """

    slug: str
    outcome: Outcome | None
    folder: Path
    paper: catalog.Paper | None = None
    earlier: list[str] = field(default_factory=list)
    broken: str | None = None
    figures: list[dict[str, str]] = field(default_factory=list)

    @property
    def status(self) -> str:
        """`"error"`, `"fails"`, `"holds"` or `"unmeasured"`: the badge of the card."""
        if self.outcome is None or self.outcome.status != "done":
            return "error"
        verdicts = [claim["holds"] for claim in self.outcome.claims if claim["holds"] is not None]
        if not verdicts:
            return "unmeasured"
        return "holds" if all(verdicts) else "fails"

    @property
    def title(self) -> str:
        """Title of the paper, or the slug."""
        return self.paper.title if self.paper else self.slug

    @property
    def text(self) -> str:
        """What the search looks through."""
        parts = [self.slug, self.title]
        if self.paper:
            parts += [*self.paper.authors, self.paper.venue, self.paper.summary, *self.paper.tags]
        if self.outcome:
            parts += [str(claim["sentence"]) for claim in self.outcome.claims]
        return " ".join(parts).lower()


def write_report(runs: Path | Sequence[Path], out: Path) -> Path:
    """Write one page that needs nothing else: no network, no files beside it.

    Of every paper the newest run at the fullest scale is shown, the others as a line.

    Args:
        runs: run folders, or folders that hold them at any depth.
        out: the HTML file.

    Returns:
        The file.

    Raises:
        TorchfolioError: if there is no run.
    """
    roots = [runs] if isinstance(runs, Path) else list(runs)
    missing = [str(root) for root in roots if not Path(root).exists()]
    if missing:
        raise TorchfolioError(
            f"{missing[0]} does not exist; run something first: torchfolio run auglocal --scale smoke"
        )
    folders = sorted({path.parent for root in roots for path in Path(root).rglob("outcome.json")})
    if not folders:
        raise TorchfolioError(
            f"no runs in {', '.join(map(str, roots))}; run something first: torchfolio run auglocal --scale smoke"
        )
    page = render(collect(folders))
    with atomic(Path(out)) as file:
        file.write(page.encode("utf-8"))
    return Path(out)


def collect(folders: Sequence[Path]) -> list[Card]:
    """A card for each paper, by slug."""
    by_slug: dict[str, list[Card]] = {}
    for folder in folders:
        card = _read(folder)
        by_slug.setdefault(card.slug, []).append(card)
    chosen = []
    for slug in sorted(by_slug):
        cards = sorted(by_slug[slug], key=_rank, reverse=True)
        best = cards[0]
        best.earlier = [_line(card) for card in cards[1:]]
        best.figures = _figures(best)
        chosen.append(best)
    return chosen


def _read(folder: Path) -> Card:
    known = catalog.papers()
    try:
        outcome = Outcome.load(folder)
        _check(outcome)
        return Card(outcome.slug, outcome, folder, known.get(outcome.slug))
    except (OSError, ValueError, KeyError, TypeError) as error:
        slug = folder.parent.name
        return Card(slug, None, folder, known.get(slug), broken=f"This run cannot be read: {error}")


def _check(outcome: Outcome) -> None:
    """What the page takes for granted."""
    if not isinstance(outcome.slug, str) or outcome.status not in ("done", "failed", "interrupted"):
        raise ValueError(f"expected a slug and a status, got {outcome.slug!r} and {outcome.status!r}")
    for claim in outcome.claims:
        missing = {"id", "sentence", "values", "holds", "expression", "held_on", "of"} - set(claim)
        if missing:
            raise ValueError(f"a claim lacks {', '.join(sorted(missing))}")
        for value in claim["values"].values():
            if not {"mean", "seeds"} <= set(value):
                raise ValueError(f"a value of the claim {claim['id']} lacks its mean or seeds")


def _rank(card: Card) -> tuple[bool, int, str]:
    if card.outcome is None:
        return False, -1, card.folder.name
    return True, FULLNESS.get(card.outcome.scale, -1), card.outcome.started


def _line(card: Card) -> str:
    if card.outcome is None:
        return f"{card.folder.name}: cannot be read"
    held = sum(claim["holds"] is True for claim in card.outcome.claims)
    measured = sum(claim["holds"] is not None for claim in card.outcome.claims)
    return f"{card.outcome.scale}, {card.outcome.started}, {len(card.outcome.seeds)} seed(s): {held} of {measured} claims hold"


def _figures(card: Card) -> list[dict[str, str]]:
    figures = []
    for k, figure in enumerate(card.outcome.figures if card.outcome else []):
        path = (card.folder / figure["svg"]).resolve()
        # A run folder may come from anywhere: no picture from outside it.
        if card.folder.resolve() in path.parents and path.is_file():
            svg = inline_svg(path.read_text(encoding="utf-8"), f"{card.slug}-{k}", figure["name"])
            figures.append({"name": figure["name"], "caption": figure["caption"], "svg": svg})
    return figures


def render(cards: Sequence[Card]) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("torchfolio.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": _number,
        "readable": _readable,
        "json": lambda v: json.dumps(v, indent=2, default=str),
    }
    environment.globals |= {"dot_plot": lambda values, condition: Markup(dot_plot(values, condition)), "safe": Markup}
    claims = [claim for card in cards if card.outcome for claim in card.outcome.claims]
    return environment.get_template("page.html").render(
        cards=cards,
        families={c.paper.family for c in cards if c.paper},
        descriptions=catalog.FAMILIES,
        counts={
            "papers": len(cards),
            "holds": sum(c["holds"] is True for c in claims),
            "fails": sum(c["holds"] is False for c in claims),
            "unmeasured": sum(c["holds"] is None for c in claims),
        },
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _number(value: Any) -> str:
    """Four significant digits; what is not a number says so."""
    if value is None:
        return "not a number"
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _readable(expression: str) -> str:
    """A condition with the signs that people write."""
    for code, sign in ((">=", "≥"), ("<=", "≤"), ("!=", "≠"), ("==", "="), (" * ", " · ")):
        expression = expression.replace(code, sign)
    return re.sub(r"\s-\s", " − ", expression)
