"""Generates the method pages from the catalogue, the methods' docstrings and their latest recorded outcomes."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from statistics import mean, stdev

from mkdocs.structure.files import File, Files

from torchfolio import catalog
from torchfolio.runs.tasks import OwnNetwork

RECORDED = Path(__file__).parent / "outcomes"
EXAMPLES = Path(__file__).parent / "examples"
SCRIPTS = Path(__file__).parent / "scripts"
SOURCE = Path(catalog.__file__).parent
MODULES = (*catalog.FAMILIES, "engine", "measure", "models", "data", "runs", "report")


def on_files(files: Files, config) -> Files:
    """Add a page for every paper and one that lists them."""
    pages = {"methods/index.md": _index()} | {f"methods/{p.slug}.md": _page(p) for p in catalog.papers().values()}
    named = _named()
    pages |= {f"reference/modules/{package}.md": _reference(package, named) for package in MODULES}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Fill in the tables that pages leave to the build."""
    if OWN in markdown:
        rows = [f"| [{slug}](methods/{slug}.md) | {_claimed(slug)} |" for slug in _with_own_network()]
        markdown = markdown.replace(OWN, "\n".join(rows))
    markdown = re.sub(r"<!-- script: (\w+) -->", lambda found: _script(found[1]), markdown)
    return re.sub(r"<!-- measured: (\w+) -->", lambda found: _measured(found[1]), markdown)


def _script(name: str) -> str:
    """A script that the tests run, as it stands."""
    title, _, code = (SCRIPTS / f"{name}.py").read_text(encoding="utf-8").partition("\n")
    code = code.replace("  # fmt: skip", "").strip()
    return "\n".join([title.strip('"'), "", "```python", code, "```"])


def _measured(name: str) -> str:
    """The picture and the table that a script of `benchmarks/` wrote, with the command."""
    found = json.loads((RECORDED.parent / "measured" / f"{name}.json").read_text(encoding="utf-8"))
    columns = list(found["rows"][0])
    lines = [f"![Measured by {found['command']}](assets/{name}.svg)", ""]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(str(row[c]) for c in columns)} |" for row in found["rows"]]
    return "\n".join([*lines, "", f"Made by `{found['command']}` with torch {found['torch']}; run it on your machine."])


OWN = "<!-- own: the table -->"


def _with_own_network() -> list[str]:
    """Methods whose experiment takes a network of the user's."""
    found = []
    for slug, paper in catalog.papers().items():
        if paper.is_in:
            module = importlib.import_module(f"torchfolio.experiments.{slug}")
            if isinstance(module.SCALES["quick"], OwnNetwork):
                found.append(slug)
    return found


def _claimed(slug: str) -> str:
    return catalog.paper(slug).claims[0].sentence.replace("\n", " ")


def _reference(package: str, named: set[str]) -> str:
    """Every module of a package that says what is public in it, but those that other pages show."""
    lines = [f"# {package}", "", "What stands beside the methods' own pages and the overview of each floor.", ""]
    if package in ("runs", "report"):  # which have no overview of their own
        lines += [f"::: torchfolio.{package}", "    options: { show_root_heading: false }", ""]
    for path in sorted((SOURCE / package).glob("*.py")):
        module = f"torchfolio.{package}.{path.stem}"
        if path.stem.startswith("_") or module in named or "__all__" not in path.read_text(encoding="utf-8"):
            continue
        lines += [f"## {path.stem}", "", f"::: {module}", "    options: { show_root_heading: false }", ""]
    return "\n".join(lines)


def _named() -> set[str]:
    """Modules that a page shows: those of methods, and those that pages written by hand name."""
    pages = (Path(__file__).parent / "reference").glob("*.md")
    by_hand = {name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M)}
    return by_hand | {paper.module for paper in catalog.papers().values()}


def _index() -> str:
    lines = ["# Methods", ""]
    for family, description in catalog.FAMILIES.items():
        members = [p for p in catalog.papers().values() if p.family == family]
        if members:
            lines += [f"## {family}", "", f"{description[0].upper()}{description[1:]}.", ""]
            lines += [f"- [{p.slug}]({p.slug}.md): {p.title}{'' if p.is_in else ' *(not in yet)*'}" for p in members]
            lines.append("")
    return "\n".join(lines)


def _page(paper: catalog.Paper) -> str:
    lines = [f"# {paper.slug}", "", f"**{paper.title}**. {', '.join(paper.authors)}. {paper.venue}."]
    links = [f"[arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})"] if paper.arxiv else []
    links += [f"[official code]({paper.code.url})"] if paper.code else []
    lines += ["", " · ".join(links), "", paper.summary, ""]
    if paper.is_in:
        lines += _example(paper)
        lines += ["Its claims, measured on your machine:", "", "```bash", f"torchfolio run {paper.slug}", "```", ""]
    lines += ["## Claims", "", *_claims(paper)]
    if paper.is_in:
        lines += ["", "## Reference", "", f"::: {paper.module}", ""]
    return "\n".join(lines)


def _example(paper: catalog.Paper) -> list[str]:
    """A script that runs as it stands, on data and a network of its own."""
    path = EXAMPLES / f"{paper.slug}.py"
    if not path.is_file():
        return []
    title, _, code = path.read_text(encoding="utf-8").partition("\n")
    code = code.replace("  # fmt: skip", "").strip()
    return ["## Start here", "", title.strip('"'), "", "```python", code, "```", ""]


def _claims(paper: catalog.Paper) -> list[str]:
    """A table of claims, with what was measured last where an outcome is recorded."""
    path = RECORDED / f"{paper.slug}.json"
    measured = {}
    if path.is_file():
        outcome = json.loads(path.read_text())
        measured = {claim["id"]: claim for claim in outcome["claims"]}
    lines = ["| claim | the paper | measured here | holds |", "| --- | --- | --- | --- |"]
    for claim in paper.claims:
        found = measured.get(claim.id)
        values = "" if not found else "; ".join(_value(n, v) for n, v in found["values"].items())
        verdict = "" if not found else {True: "yes", False: "**no**", None: "–"}[found["holds"]]
        if found and found["values"] and len(outcome["seeds"]) > 1:
            verdict += f" ({found['held_on']} of {len(outcome['seeds'])} seeds)"
        what = claim.measured + (f" **{values}**" if values else "")
        lines.append(f"| {claim.sentence} | {claim.paper or ''} | {what} | {verdict} |".replace("\n", " "))
    if measured:
        lines += ["", f"Recorded by `{outcome['command']}` with torch {outcome['torch']}."]
    for work, ratios in (outcome.get("peers", {}) if path.is_file() else {}).items():
        times = ", ".join(f"{name} {ratio:.2g}" for name, ratio in ratios.items())
        lines += ["", f"Time of others over ours, {work}: {times}."]
    return lines


def _value(name: str, seeds: list[float | None]) -> str:
    if None in seeds:
        return f"{name} not a number"
    spread = f" ± {stdev(seeds) / len(seeds) ** 0.5:.1g}" if len(seeds) > 1 else ""
    return f"{name} {mean(seeds):.3g}{spread}"
