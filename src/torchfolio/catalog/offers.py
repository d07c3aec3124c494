"""What papers offer, found and imported by kind, by slug, or at a family's door."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

from torchfolio.catalog.record import KINDS, CatalogError, Paper, paper, papers


def offering(kind: str) -> dict[str, str]:
    """Import paths (`package.module:name`) of what papers offer of a kind, by slug, of those that are in.

    Args:
        kind: kind of `KINDS`.

    Raises:
        CatalogError: if there is no such kind.
    """
    if kind not in KINDS:
        raise CatalogError(f"there is no kind {kind!r}; there are {', '.join(KINDS)}")
    ready = (paper for paper in papers().values() if paper.is_in and kind in paper.offers)
    return {paper.slug: _path(paper, paper.offers[kind][0]) for paper in ready}


def offered(slug: str, kind: str) -> Any:
    """The class or function that a paper offers of a kind, imported.

    Raises:
        CatalogError: if there is no such paper, its method is not in, or it offers nothing of the kind; with those
            that do.
    """
    record = paper(slug)
    if not record.is_in:
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
    ready = (paper for paper in papers().values() if paper.is_in and paper.family == family)
    return {name: _path(paper, name) for paper in ready for name in paper.offers.get("names", ())}


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
