"""Writes what follows from the catalogue and the records: the README's table of methods and the families' stubs for editors.

The pre-commit hook runs it, nobody edits what it writes, and a test says where it is out of date.
"""

from __future__ import annotations

import ast
from pathlib import Path

from torchfolio import catalog
from torchfolio.runs.record import claims_held

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OUTCOMES = ROOT / "docs/outcomes"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"


def table() -> str:
    """The table, a row for each paper, by family, with how many of its claims hold as recorded."""
    lines = ["| method | family | what it does | claims |", "| --- | --- | --- | --- |"]
    for family in catalog.FAMILIES:
        for paper in (p for p in catalog.papers().values() if p.family == family):
            link = f"[{paper.slug}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.slug
            held = claims_held(OUTCOMES / f"{paper.slug}.json")
            lines.append(f"| {link} | {family} | {paper.first_sentence} | {held} |")
    return "\n".join(lines)


def readme(text: str) -> str:
    """A README with the table of today."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def stub(family: str) -> str:
    """What a family exports, as an editor reads it: its own names and those that its papers offer."""
    tree = ast.parse((ROOT / "src/torchfolio" / family / "__init__.py").read_text(encoding="utf-8"))
    own = [
        (node.module or "", alias.name)
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != "torchfolio.catalog"
        for alias in node.names
    ]
    offered = [(path.partition(":")[0], name) for name, path in catalog.exports(family).items()]
    lines = [f"from {module} import {name} as {name}" for module, name in sorted(set(own + offered))]
    return "\n".join(["# Written by docs/generate.py from the catalogue.", *lines]) + "\n"


def generated() -> dict[Path, str]:
    """Every generated file with its text of today."""
    files = {README: readme(README.read_text(encoding="utf-8"))}
    for family in catalog.FAMILIES:
        files[ROOT / "src/torchfolio" / family / "__init__.pyi"] = stub(family)
    return files


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
