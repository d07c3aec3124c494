"""From run folders to a page: what is shown, and in which order."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any

from torchfolio import __version__, catalog
from torchfolio.errors import TorchfolioError
from torchfolio.json_text import to_json
from torchfolio.report.svg import LARGEST, dot_plot, picture, policy
from torchfolio.runs.outcome import Outcome
from torchfolio.runs.store import atomic

FULLNESS = {"smoke": 0, "quick": 1, "full": 2}


@dataclass
class Card:
    """One paper on the page.

    Attributes:
        outcome: run that is shown; `None` if it cannot be read.
        folder: folder of the run.
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
    def anchor(self) -> str:
        """Where links to the card lead; a slug of a stranger meets none of the page's own names."""
        return self.slug if self.paper else f"run-{self.slug}"

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
        file.write(page.encode("utf-8", "replace"))  # what is no text shows as "?"
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
    path = folder / "outcome.json"
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError(f"expected outcome.json to be a file of at most {LARGEST:,} bytes")
        outcome = Outcome.load(folder)
        _check(outcome)
        return Card(outcome.slug, outcome, folder, known.get(outcome.slug))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return _broken(folder, str(error))


def _broken(folder: Path, error: str) -> Card:
    slug = folder.parent.name
    return Card(slug, None, folder, catalog.papers().get(slug), broken=f"This run cannot be read: {error[:300]}")


TEXT, TEXT_OR_NONE, TABLE, COUNT = (str,), (str, NoneType), (dict,), (int,)
FIELDS: dict[str, tuple[type, ...]] = {
    "slug": TEXT, "scale": TEXT, "status": TEXT, "seeds": (list,), "settings": TABLE, "command": TEXT, "started": TEXT,
    "seconds": (int, float), "environment": TABLE, "error": (dict, NoneType), "claims": (list,), "arms": TABLE,
    "figures": (list,),
}  # fmt: skip
CLAIM: dict[str, tuple[type, ...]] = {
    "id": TEXT, "sentence": TEXT, "paper": (str, int, float, NoneType), "what": TEXT_OR_NONE, "expression": TEXT_OR_NONE,
    "values": TABLE, "holds": (bool, NoneType), "held_on": COUNT, "of": COUNT, "note": TEXT_OR_NONE,
}  # fmt: skip
VALUE: dict[str, tuple[type, ...]] = {"mean": (int, float, NoneType), "sem": (int, float, NoneType), "seeds": (list,)}
ERROR: dict[str, tuple[type, ...]] = dict.fromkeys(("type", "message", "traceback"), TEXT)
FIGURE: dict[str, tuple[type, ...]] = dict.fromkeys(("name", "caption", "svg"), TEXT)


def _check(outcome: Outcome) -> None:
    """What the page takes for granted."""
    _typed("the outcome", vars(outcome), FIELDS)
    if outcome.status not in ("done", "failed", "interrupted"):
        raise ValueError(f"expected a status of done, failed or interrupted, got {outcome.status[:80]!r}")
    if not re.fullmatch(r"[\w-]{1,100}", outcome.slug):
        raise ValueError(f"expected a slug of letters and digits, got {outcome.slug[:80]!r}")
    if not all(type(seed) is int for seed in outcome.seeds):
        raise ValueError("expected seeds to be integers")
    if outcome.error is not None:
        _typed("the error", outcome.error, ERROR)
    for claim in outcome.claims:
        _typed("a claim", claim, CLAIM)
        _values(f"the claim {claim['id'][:80]!r}", claim["values"])
    for name, values in outcome.arms.items():
        _values(f"the arm {name[:80]!r}", values)
    for figure in outcome.figures:
        _typed("a figure", figure, FIGURE)


def _typed(what: str, table: Any, fields: Mapping[str, tuple[type, ...]]) -> None:
    """That a table has fields of their types; `True` is no number."""
    if not isinstance(table, dict):
        raise ValueError(f"expected {what} to be a table, got {type(table).__name__}")
    for name, types in fields.items():
        value = table.get(name) if NoneType in types else table.get(name, Ellipsis)
        if value is Ellipsis:
            raise ValueError(f"{what} lacks {name!r}")
        if type(value) not in types or not _sound(value):
            wanted = " or ".join("null" if t is NoneType else t.__name__ for t in types)
            raise ValueError(f"expected {name!r} of {what} to be {wanted}, got {str(value)[:80]!r}")
        table[name] = value


def _sound(value: Any) -> bool:
    """Not a number without a size."""
    return not isinstance(value, int | float) or abs(value) < 1e300


def _values(what: str, values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"expected values of {what}, got {type(values).__name__}")
    for name, value in values.items():
        _typed(f"{name[:80]!r} of {what}", value, VALUE)
        if not all(s is None or (type(s) in (int, float) and _sound(s)) for s in value["seeds"]):
            raise ValueError(f"expected finite numbers for the seeds of {name[:80]!r} of {what}")


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
    room = LARGEST  # for all pictures of a card
    for figure in card.outcome.figures if card.outcome else []:
        text = _figure(card.folder, figure["svg"], room)
        if text is not None:
            room -= len(text)
            figures.append(
                {"name": figure["name"], "caption": figure["caption"], "picture": picture(text, figure["name"])}
            )
    return figures


def _figure(folder: Path, name: str, room: int) -> str | None:
    """A picture's text; `None` for one that is not there. A run folder may come from anywhere: none from outside it."""
    try:
        path = (folder / name).resolve()
        if folder.resolve() not in path.parents or not path.is_file():
            return None
        return path.read_text(encoding="utf-8") if path.stat().st_size <= room else ""
    except (OSError, ValueError, RuntimeError):
        return ""  # which is no picture, and says so


@cache
def _environment() -> Any:
    """The templates and what they may call."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("torchfolio.report", "."), autoescape=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": _number,
        "readable": _readable,
        "json": lambda v: to_json(v, indent=2, default=str),
    }
    environment.globals |= {"dot_plot": lambda values, condition: Markup(dot_plot(values, condition))}
    return environment


def render(cards: Sequence[Card]) -> str:
    """The page as text."""
    from markupsafe import Markup

    environment = _environment()
    template = environment.get_template("card.html")

    def shown(card: Card) -> tuple[Card, str]:
        pictures = [{**figure, "picture": Markup(figure["picture"])} for figure in card.figures]
        try:
            return card, template.render(card=card, figures=pictures)
        except Exception as error:  # whatever a stranger's run folder does, it costs its own card only
            card = _broken(card.folder, f"{type(error).__name__}: {error}")
            return card, template.render(card=card, figures=[])

    rendered = [shown(card) for card in cards]
    cards = [card for card, _ in rendered]
    claims = [claim for card in cards if card.outcome for claim in card.outcome.claims]
    style, script = _asset("page.css"), _asset("page.js")
    return environment.get_template("page.html").render(
        cards=[Markup(text) for _, text in rendered],
        families={c.paper.family for c in cards if c.paper},
        counts={
            "papers": len(cards),
            "holds": sum(c["holds"] is True for c in claims),
            "fails": sum(c["holds"] is False for c in claims),
            "unmeasured": sum(c["holds"] is None for c in claims),
        },
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
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
