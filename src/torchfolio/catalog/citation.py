"""BibTeX entries of papers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torchfolio.catalog.record import Paper, paper

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
        slugs: slugs of the papers.
    """
    return "\n\n".join(bibtex(paper(slug)) for slug in slugs)


def _tex(text: str) -> str:
    return "".join(_SPECIAL.get(letter, letter) for letter in text)
