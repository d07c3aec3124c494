"""What exists: the papers, their metadata, claims and offers, readable without torch."""

from torchfolio.catalog.citation import bibtex, citations
from torchfolio.catalog.nearest import search, stem
from torchfolio.catalog.offers import doors, exports, load_name, offered, offering
from torchfolio.catalog.record import FAMILIES, KINDS, CatalogError, Claim, Code, Paper, paper, papers, read

__all__ = [
    "FAMILIES", "KINDS", "CatalogError", "Claim", "Code", "Paper", "bibtex", "citations", "doors", "exports", "load_name",
    "offered", "offering", "paper", "papers", "read", "search", "stem",
]  # fmt: skip
