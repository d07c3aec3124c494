"""What exists: the papers, their metadata and claims, readable without torch.

Each paper is one file, `papers/SLUG.toml`. Whether its method is in is read off the tree, never written down.
"""

from __future__ import annotations

import difflib
import importlib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
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

_HERE = Path(__file__).parent


class CatalogError(TorchfolioError):
    """A file of the catalogue does not follow the schema, or a slug is unknown."""


@dataclass(frozen=True)
class Claim:
    """One claim of a paper, and what is measured of it here.

    Attributes:
        id: what experiments call it.
        sentence: the claim in plain words.
        measured: what is measured here.
        holds: the condition on the measured values under which it holds, such as `"ours >= baseline - 2"`.
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
        folder: where the files are; the package's own by default.

    Raises:
        CatalogError: naming file and field that do not follow the schema.
    """
    found = (read(path) for path in sorted((folder or _HERE / "papers").glob("*.toml")))
    return {paper.slug: paper for paper in found}


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


# What papers offer


def offering(kind: str) -> dict[str, str]:
    """Import paths (`package.module:name`) of what papers offer of a kind, by slug, of those that are in.

    Args:
        kind: of `KINDS`.

    Raises:
        CatalogError: if there is no such kind.
    """
    if kind not in KINDS:
        raise CatalogError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    ready = (found for found in papers().values() if found.is_in and kind in found.offers)
    return {found.slug: _path(found, found.offers[kind][0]) for found in ready}


def offered(slug: str, kind: str) -> Any:
    """The class or function that a paper offers of a kind, imported.

    Raises:
        CatalogError: if there is no such paper, its method is not in, or it offers nothing of the kind; with those
            that do.
    """
    found = paper(slug)
    if not found.is_in:
        raise CatalogError(f"{slug} is in the catalogue but its method is not in yet; see: torchfolio list --in")
    known = offering(kind)
    if slug not in known:
        others = f"; these are: {', '.join(known)}" if known else ""
        raise CatalogError(f"{slug} is not {KINDS[kind]}{others}; see: torchfolio show {slug}")
    return load_name(known[slug])


def load_name(path: str) -> Any:
    """What an import path (`package.module:name`) of the catalogue names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def exports(family: str) -> dict[str, str]:
    """Import paths of the public names that the papers of a family offer, by name."""
    ready = (found for found in papers().values() if found.is_in and found.family == family)
    return {name: _path(found, name) for found in ready for name in found.offers.get("names", ())}


def doors(package: str, own: Iterable[str] = ()) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__` and `__dir__` of a family's package, and the names that papers offer there.

    A name that a paper offers is imported when it is first used, so that the family's door opens at once.

    Args:
        package: `__name__` of the package.
        own: names that the package holds itself.
    """
    family = package.rpartition(".")[2]
    known = exports(family)
    names = sorted({*own, *known})

    def get(name: str) -> Any:
        if name in known:
            return load_name(known[name])
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: [*names, "__all__", "__doc__", "__name__", "__path__"], sorted(set(known) - set(own))


def _path(found: Paper, name: str) -> str:
    return name if ":" in name else f"{found.module}:{name}"


# The schema

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
    given = ("authors", "tags", "claims", "code", "summary", "offers")
    rest = {k: v for k, v in table.items() if k not in given}
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


# Search

_STOP = set(
    "a an and are as at be by for from how i in is it of on or that the this to what which with".split()  # noqa: SIM905
)


def search(words: str, limit: int = 10) -> list[tuple[Paper, float]]:
    """Papers nearest to some words, best first, with a score in (0, 1].

    TF-IDF over title, summary, tags and claims, on stems and on runs of letters within words, so that inflection
    and typos do not matter much.

    Args:
        words: a few words or a sentence.
        limit: most results.

    Raises:
        CatalogError: if there are no words.
    """
    if not words.strip():
        raise CatalogError("expected words to search for, got none")
    known = list(papers().values())
    vectorizers, matrix = _index()
    import numpy as np
    from scipy.sparse import hstack

    query = hstack([weight * v.transform([words]) for v, weight in vectorizers])
    norm = max(float(query.multiply(query).sum()) ** 0.5, 1e-12)
    scores = (matrix @ query.T).toarray().ravel() / norm
    # A paper that speaks of all that was asked for goes before one that repeats a part of it.
    asked = set(_stems(words))
    share = [len(asked & set(_stems(_document(found)))) / max(len(asked), 1) for found in known]
    scores = scores * (0.3 + 0.7 * np.asarray(share))
    ranked = sorted(zip(known, scores, strict=True), key=lambda pair: -pair[1])
    return [(found, round(float(score), 4)) for found, score in ranked[:limit] if score > 0.01]


@cache
def _index() -> tuple[list[tuple[Any, float]], Any]:
    """Vectorizers with their weights, and the documents as rows of unit length."""
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    documents = [_document(p) for p in papers().values()]
    kinds: list[tuple[Any, float]] = [(_stems, 1.0), (_letters, 0.6)]
    vectorizers = [(TfidfVectorizer(analyzer=analyzer, sublinear_tf=True), weight) for analyzer, weight in kinds]
    return vectorizers, normalize(hstack([weight * v.fit_transform(documents) for v, weight in vectorizers]))


def _document(found: Paper) -> str:
    # Title and tags say in few words what claims say in many: they count more.
    claims = " ".join(f"{claim.sentence} {claim.measured}" for claim in found.claims)
    head = f"{found.title} {' '.join(found.tags)} {found.slug.replace('_', ' ')} {FAMILIES[found.family]} "
    return head * 3 + (found.summary + " ") * 2 + claims


def _words(text: str) -> list[str]:
    """Words in lower case; a hyphenated one is also its parts joined, since both spellings are common."""
    found = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())
    parts = [part for word in found for part in ([*word.split("-"), word.replace("-", "")] if "-" in word else [word])]
    return [word for word in parts if word not in _STOP]


def _stems(text: str) -> list[str]:
    """Words without the endings of inflection."""
    return [stem(word) for word in _words(text)]


def stem(word: str) -> str:
    """A word cut to what its inflections share; light, for English."""
    for ending in ("ization", "isation", "ational", "ations", "ation", "ments", "ment", "ness", "ingly", "ings", "ing"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word[: -len(ending)]
    for ending in ("ied", "ies", "ers", "ors", "ed", "er", "or", "es", "ly", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _letters(text: str) -> list[str]:
    """Runs of four letters within padded words: what survives a typo."""
    padded = [f" {word} " for word in _words(text)]
    return [word[k : k + 4] for word in padded for k in range(max(1, len(word) - 3))]


# Citation

_JOURNALS = re.compile(
    r"journal|transactions|\baccess\b|\btpami\b|\btnnls\b|\btmlr\b|\bjmlr\b|\bpnas\b|letters|nature|science|review",
    re.I,
)
_SPECIAL = {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_"}


def bibtex(found: Paper) -> str:
    """The BibTeX entry of a paper."""
    preprint = found.venue.lower().startswith(("arxiv", "preprint"))
    kind = "misc" if preprint else "article" if _JOURNALS.search(found.venue) else "inproceedings"
    if "thesis" in found.venue.lower():
        kind = "phdthesis"
    venue = re.sub(r"\s*\b(19|20)\d\d\b\s*", " ", found.venue).strip(" ,")
    fields = {
        "title": "{" + _tex(found.title) + "}",
        "author": _tex(" and ".join(found.authors)),
        "year": str(found.year),
    }
    if not preprint:
        fields[{"article": "journal", "phdthesis": "school"}.get(kind, "booktitle")] = _tex(venue)
    if found.arxiv:
        fields |= {"eprint": found.arxiv, "archiveprefix": "arXiv", "url": f"https://arxiv.org/abs/{found.arxiv}"}
    body = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@{kind}{{{found.slug},\n{body}\n}}"


def citations(slugs: Iterable[str]) -> str:
    """BibTeX entries of the methods that were used.

    Args:
        slugs: of the papers.
    """
    return "\n\n".join(bibtex(paper(slug)) for slug in slugs)


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
