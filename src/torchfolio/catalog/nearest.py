"""Papers nearest to some words."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from torchfolio.catalog.record import FAMILIES, CatalogError, Paper, papers

_STOP = set(
    "a an and are as at be by for from how i in is it of on or that the this to what which with".split()  # noqa: SIM905
)


def search(words: str, limit: int = 10) -> list[tuple[Paper, float]]:
    """Papers nearest to some words, best first, with a score in (0, 1].

    TF-IDF over title, summary, tags and claims, on stems and on runs of letters within words, so that inflection
    and typos do not matter much.

    Args:
        words: a few words or a sentence.
        limit: maximum number of results.

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
    share = [len(asked & set(_stems(_document(paper)))) / max(len(asked), 1) for paper in known]
    scores = scores * (0.3 + 0.7 * np.asarray(share))
    ranked = sorted(zip(known, scores, strict=True), key=lambda pair: -pair[1])
    return [(paper, round(float(score), 4)) for paper, score in ranked[:limit] if score > 0.01]


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
    words = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", text.lower())
    parts = [part for word in words for part in ([*word.split("-"), word.replace("-", "")] if "-" in word else [word])]
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
