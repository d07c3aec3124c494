"""Writes the table of methods in the README from the catalogue. Run it after adding a paper; a test checks it."""

from __future__ import annotations

import re
from pathlib import Path

from torchfolio import catalog

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def table() -> str:
    """The table, a row for each paper, by family."""
    lines = ["| | method | family | what it does |", "| --- | --- | --- | --- |"]
    for family in catalog.FAMILIES:
        for paper in (p for p in catalog.papers().values() if p.family == family):
            first = re.split(r"(?<=[.!?])\s", paper.summary)[0]
            link = f"[{paper.slug}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.slug
            lines.append(f"| {'●' if paper.is_in else '○'} | {link} | {family} | {first} |".replace("\n", " "))
    return "\n".join(lines)


def updated(text: str) -> str:
    """A README with the table of today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
