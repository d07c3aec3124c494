"""A paper as a file, `papers/SLUG.toml`: what it holds, read and checked.

Whether its method is in is read off the tree, never written down.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torchfolio.errors import TorchfolioError

FAMILIES = {
    "local": "learning without end-to-end backpropagation",
    "training": "what is added to ordinary training",
    "layers": "layers that replace a standard one",
    "spiking": "spiking networks",
    "efficiency": "smaller, growing and switchable networks",
    "adaptation": "adapting trained networks",
    "backdoor": "backdoor attacks, detectors and defences",
    "robustness": "attacks, bounds and verifiers",
    "theory": "models with exact answers",
    "insight": "what was learned",
    "dynamics": "differential equations and diffusion",
    "applications": "methods for one task",
}


KINDS = {
    "rule": "a learning rule",
    "objective": "an objective added to a learning rule",
    "layer": "a layer",
    "convert": "a conversion of networks to its layer",
    "loss": "a loss",
    "estimator": "an estimator",
    "compression": "a method that compresses networks",
    "merge": "a method that merges networks",
    "adapter": "a method that adapts networks",
    "input_detector": "a detector of triggered inputs",
    "model_detector": "a detector of backdoored networks",
    "defence": "a defence in training",
    "attack": "an attack",
    "analysis": "an analysis of networks",
    "theory": "a model with exact answers",
    "sampler": "a sampler or solver",
    "builders": "a function that builds a network on disk",
}


_HERE = Path(__file__).parent.parent


class CatalogError(TorchfolioError):
    """A file of the catalogue does not follow the schema, or a slug is unknown."""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what is measured of it here.

    Attributes:
        id: name in experiments.
        sentence: claim in plain words.
        measured: quantity that is measured here.
        holds: condition on the measured values under which it holds, such as `"ours >= baseline - 2"`.
        every_seed: whether the condition must hold on every seed; on the means over seeds otherwise.
        paper: the paper's own figure, or `None`.
    """

    id: str
    sentence: str
    measured: str
    holds: str | None = None
    every_seed: bool = False
    paper: str | None = None


@dataclass(frozen=True)
class Code:
    """The official code: where, and under which licence (`"none"` for none, `None` if unknown)."""

    url: str
    license: str | None = None


@dataclass(frozen=True)
class Paper:
    """One paper of the catalogue.

    Attributes:
        offers: public names of its module by what they are: `names` is what the family exports, the other keys are
            of `KINDS`.
    """

    slug: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    family: str
    summary: str
    tags: tuple[str, ...]
    claims: tuple[Claim, ...]
    arxiv: str | None = None
    code: Code | None = None
    offers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def module(self) -> str:
        """Import path of the method."""
        return f"torchfolio.{self.family}.{self.slug}"

    @property
    def first_sentence(self) -> str:
        """The first sentence of the summary, on one line."""
        return re.split(r"(?<=[.!?])\s", self.summary)[0].replace("\n", " ")

    @property
    def is_in(self) -> bool:
        """Whether method and experiment are there."""
        method = _HERE / self.family / self.slug
        there = method.with_suffix(".py").is_file() or (method / "__init__.py").is_file()
        return there and (_HERE / "experiments" / f"{self.slug}.py").is_file()

    def claim(self, id: str) -> Claim:
        """A claim by its id.

        Raises:
            CatalogError: if the paper has none of this id.
        """
        for claim in self.claims:
            if claim.id == id:
                return claim
        known = ", ".join(claim.id for claim in self.claims)
        raise CatalogError(f"{self.slug} has no claim {id!r}; its claims are {known}")


@cache
def papers(folder: Path | None = None) -> dict[str, Paper]:
    """All papers by slug, in order.

    Args:
        folder: folder of the files; the package's own by default.

    Raises:
        CatalogError: naming file and field that do not follow the schema.
    """
    records = (read(path) for path in sorted((folder or _HERE / "papers").glob("*.toml")))
    return {paper.slug: paper for paper in records}


def paper(slug: str) -> Paper:
    """One paper.

    Raises:
        CatalogError: if there is none of this slug, with the nearest ones.
    """
    known = papers()
    if slug in known:
        return known[slug]
    close = difflib.get_close_matches(slug, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "see: torchfolio list"
    raise CatalogError(f"there is no paper {slug!r}; {hint}")


_FIELDS: dict[str, tuple[type, bool]] = {
    "title": (str, True),
    "authors": (list, True),
    "year": (int, True),
    "venue": (str, True),
    "family": (str, True),
    "summary": (str, True),
    "tags": (list, True),
    "claims": (list, True),
    "arxiv": (str, False),
    "code": (dict, False),
    "offers": (dict, False),
}


_CLAIM = {
    "id": (str, True),
    "sentence": (str, True),
    "measured": (str, True),
    "holds": (str, False),
    "every_seed": (bool, False),
    "paper": (str, False),
}


_OFFERS: dict[str, tuple[Any, bool]] = {"names": (list, True), **dict.fromkeys(KINDS, (str | list, False))}


_CODE = {"url": (str, True), "license": (str, False)}


def read(path: Path) -> Paper:
    """Read and check one file.

    Raises:
        CatalogError: naming file and field.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CatalogError(f"{path.name}: not valid TOML: {error}") from error
    _check(path.name, "", table, _FIELDS)
    _check_values(path, table)
    claims = []
    for k, entry in enumerate(table["claims"]):
        if not isinstance(entry, dict):
            raise CatalogError(f"{path.name}: claims[{k}] is a {type(entry).__name__}, expected a table")
        _check(path.name, f"claims[{k}].", entry, _CLAIM)
        claims.append(Claim(**entry))
    ids = [claim.id for claim in claims]
    for k, id in enumerate(ids):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", id) or id in ids[:k]:
            raise CatalogError(
                f"{path.name}: claims[{k}].id is {id!r}, expected a name in snake_case that no other claim has"
            )
    code = None
    if "code" in table:
        _check(path.name, "code.", table["code"], _CODE)
        if not table["code"]["url"].startswith("https://"):
            raise CatalogError(f"{path.name}: code.url is {table['code']['url']!r}, expected an https address")
        code = Code(**table["code"])
    treated = ("authors", "tags", "claims", "code", "summary", "offers")
    rest = {k: v for k, v in table.items() if k not in treated}
    return Paper(
        slug=path.stem,
        authors=tuple(table["authors"]),
        tags=tuple(table["tags"]),
        summary=" ".join(table["summary"].split()),
        claims=tuple(claims),
        code=code,
        offers=_offers(path.name, table["offers"]) if "offers" in table else {},
        **rest,
    )


def _offers(file: str, table: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    _check(file, "offers.", table, _OFFERS)
    offers = {kind: (value,) if isinstance(value, str) else tuple(value) for kind, value in table.items()}
    for kind, names in offers.items():
        for name in names:
            last = name.rpartition(":")[2] if isinstance(name, str) else ""
            if not last.isidentifier():
                raise CatalogError(f"{file}: offers.{kind} holds {name!r}, expected the name of a class or function")
    return offers


def _check(file: str, prefix: str, table: dict[str, Any], schema: Mapping[str, tuple[Any, bool]]) -> None:
    for name in table:
        if name not in schema:
            close = difflib.get_close_matches(name, schema, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CatalogError(f"{file}: {prefix}{name} is not a field of the schema{hint}")
    for name, (kind, required) in schema.items():
        if name not in table:
            if required:
                raise CatalogError(f"{file}: {prefix}{name} is missing")
        elif not isinstance(table[name], kind) or (isinstance(table[name], bool) and kind is not bool):
            expected = getattr(kind, "__name__", str(kind))
            raise CatalogError(f"{file}: {prefix}{name} is a {type(table[name]).__name__}, expected {expected}")
        elif isinstance(table[name], str | list) and not table[name]:
            raise CatalogError(f"{file}: {prefix}{name} is empty")


def _check_values(path: Path, table: dict[str, Any]) -> None:
    if not path.stem.isidentifier():
        raise CatalogError(f"{path.name}: the file's name is no identifier, expected a slug such as auglocal.toml")
    if table["family"] not in FAMILIES:
        raise CatalogError(f"{path.name}: family is {table['family']!r}, expected one of {', '.join(FAMILIES)}")
    if not 1980 <= table["year"] <= 2100:
        raise CatalogError(f"{path.name}: year is {table['year']}, expected a year of publication")
    if "arxiv" in table and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}", table["arxiv"]):
        raise CatalogError(f"{path.name}: arxiv is {table['arxiv']!r}, expected an identifier such as 2402.17318")
    for name in ("authors", "tags"):
        if not all(isinstance(value, str) and value for value in table[name]):
            raise CatalogError(f"{path.name}: {name} holds something else than names")
