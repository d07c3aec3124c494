"""Generates the method pages from the catalogue, the methods' docstrings and their latest recorded outcomes."""

from __future__ import annotations

import ast
import importlib
import json
import logging
import re
import zlib
from dataclasses import fields, is_dataclass
from html import unescape
from pathlib import Path
from statistics import mean, stdev

from mkdocs.structure.files import File, Files

from torchfolio import catalog
from torchfolio.runs.record import claims_held
from torchfolio.runs.settings import described
from torchfolio.runs.tasks import OwnNetwork

RECORDED = Path(__file__).parent / "outcomes"
EXAMPLES = Path(__file__).parent / "examples"
SCRIPTS = Path(__file__).parent / "scripts"
SOURCE = Path(catalog.__file__).parent.parent
MODULES = (*catalog.FAMILIES, "engine", "measure", "models", "data", "diagrams", "runs", "report", "catalog")


def on_files(files: Files, config) -> Files:
    """Add a page for every paper and one that lists them."""
    pages = {"methods/index.md": _index()} | {f"methods/{p.slug}.md": _page(p) for p in catalog.papers().values()}
    named = _named()
    pages |= {f"reference/modules/{package}.md": _reference(package, named) for package in MODULES}
    pages |= {
        f"notebooks/{path.stem}.ipynb": notebook(path.read_text(encoding="utf-8")) for path in EXAMPLES.glob("*.py")
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


INSTALL = """# Once, in a clone of torchfolio:
# %pip install -q -c constraints.txt ".[all]\""""


def notebook(script: str) -> str:
    """An example as a Jupyter notebook: its sentence, a cell that installs the package, and a cell for each paragraph."""
    title, _, code = script.partition("\n")
    code = code.replace("  # fmt: skip", "").strip()
    cells = [_cell("markdown", title.strip('"'), 0), _cell("code", INSTALL, 1)]
    paragraphs: list[str] = []
    for part in re.split(r"\n\n+(?=\S)", code):
        try:
            ast.parse(part)
            paragraphs.append(part)
        except SyntaxError:  # a blank line within a block
            paragraphs[-1:] = [f"{paragraphs[-1]}\n\n{part}" if paragraphs else part]
    cells += [_cell("code", part, k) for k, part in enumerate(paragraphs, start=2)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}, indent=1
    )


def _cell(kind: str, text: str, number: int) -> dict[str, object]:
    code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True), **code}


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


def on_page_content(html: str, page, config, files) -> str:
    """Formulas as MathML, which browsers draw without a script from anywhere."""
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', _formula, html, flags=re.S)


def _formula(found: re.Match[str]) -> str:
    try:
        from latex2mathml.converter import convert
    except ModuleNotFoundError:
        log.info("latex2mathml is not installed: formulas stay as LaTeX")
        return found[0]
    tag, body = found.groups()
    latex = unescape(body).strip()[2:-2].replace(r"\arg\max", r"\operatorname{arg max}")
    return f'<{tag} class="arithmatex">{convert(latex, display="block" if tag == "div" else "inline")}</{tag}>'


OWN = "<!-- own: the table -->"


def on_post_build(config) -> None:
    """Warn, which ends a strict build, of every public name that the reference does not show."""
    for name in missing_names(documented(Path(config["site_dir"]) / "objects.inv")):
        log.warning("the reference does not show %s; give it a docstring, or its module a page", name)
    for address in sorted(_fetched(Path(config["site_dir"]))):
        log.warning("a page loads %s from the network", address)


def _fetched(site: Path) -> set[str]:
    """What pages would load from elsewhere."""
    pattern = re.compile(
        r"""<(?:script|img|iframe)[^>]*\ssrc="?(https?:[^"\s>]+)|<link[^>]*stylesheet[^>]*href="?(https?:[^"\s>]+)"""
    )
    return {a or b for page in site.rglob("*.html") for a, b in pattern.findall(page.read_text(encoding="utf-8"))}


log = logging.getLogger("mkdocs.hooks.torchfolio")
INTERNAL = ("cli", "experiments", "peers")  # commands show themselves by --help; the others are run, not called


def documented(inventory: Path) -> set[str]:
    """Full names of all that a built site shows."""
    head, _, body = inventory.read_bytes().partition(b"zlib.\n")
    if not head.startswith(b"# Sphinx inventory version 2"):
        raise ValueError(f"{inventory} is no inventory of version 2")
    return {line.split(" ")[0] for line in zlib.decompress(body).decode().splitlines()}


def public_names() -> dict[str, str]:
    """The full name of everything public, by the package or module where its name must be found.

    What stands in the `__all__` of a module, and what a paper offers at its family's door: functions and classes. Constants and
    aliases of types are shown where they have a docstring.
    """
    names = {f"{path.replace(':', '.')}": path.partition(":")[0]
             for family in catalog.FAMILIES for path in catalog.exports(family).values()}  # fmt: skip
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCE.rglob("*.py")}
    made = {
        node.name for tree in trees.values() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for path, tree in trees.items():
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if parts[0] in INTERNAL or any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join(("torchfolio", *(part for part in parts if part != "__init__")))
        foreign = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom)
                   and not (node.module or "").startswith("torchfolio") for alias in node.names}  # fmt: skip
        foreign |= {getattr(node.targets[0], "id", "") for node in tree.body if isinstance(node, ast.Assign)}
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                listed = [e.value for e in getattr(node.value, "elts", []) if isinstance(e, ast.Constant)]
                names |= {f"{module}.{name}": module for name in listed if name in made and name not in foreign}
    return names


def missing_names(shown: set[str]) -> list[str]:
    """Public names that are shown neither where they are public nor in a module below."""
    by_name: dict[str, list[str]] = {}
    for full in shown:
        by_name.setdefault(full.rpartition(".")[2], []).append(full)
    return sorted(
        full
        for full, place in public_names().items()
        if full not in shown
        and not any(other.startswith(f"{place}.") for other in by_name.get(full.rpartition(".")[2], []) if "." in other)
    )


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
    if package in ("runs", "report", "catalog"):  # which have no overview of their own
        lines += [f"::: torchfolio.{package}", "    options: { show_root_heading: false }", ""]
    for path in sorted((SOURCE / package).rglob("*.py")):
        module = ".".join(("torchfolio", *path.relative_to(SOURCE).with_suffix("").parts))
        if path.stem.startswith("_") or module in named or "__all__" not in path.read_text(encoding="utf-8"):
            continue
        lines += [
            f"## {module.removeprefix(f'torchfolio.{package}.')}",
            "",
            f"::: {module}",
            "    options: { show_root_heading: false }",
            "",
        ]
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
            lines += [
                f"- **[{p.slug}]({p.slug}.md)**: {p.first_sentence} *{p.title}*, {p.venue}{_held(p.slug)}"
                for p in members
            ]
            lines.append("")
    return "\n".join(lines)


def _held(slug: str) -> str:
    """How many of a paper's claims hold in its record."""
    held = claims_held(RECORDED / f"{slug}.json")
    return f"; {held} claims hold." if held else "."


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
        lines += ["## Settings of its experiment", "", *_settings(paper.slug), ""]
    return "\n".join(lines)


def _example(paper: catalog.Paper) -> list[str]:
    """A script that runs as it stands, on data and a network of its own."""
    path = EXAMPLES / f"{paper.slug}.py"
    if not path.is_file():
        return []
    title, _, code = path.read_text(encoding="utf-8").partition("\n")
    code = code.replace("  # fmt: skip", "").strip()
    taken = f"[The same as a notebook](../notebooks/{paper.slug}.ipynb)"
    return ["## Start here", "", title.strip('"'), "", "```python", code, "```", "", taken, ""]


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


def _settings(slug: str) -> list[str]:
    """A table of the experiment's settings."""
    scales = importlib.import_module(f"torchfolio.experiments.{slug}").SCALES
    lines = [
        f"What `torchfolio run {slug} --set NAME=VALUE` changes.",
        "",
        f"| setting | what it is | {' | '.join(scales)} |",
        f"| --- | --- |{' --- |' * len(scales)}",
    ]
    for name, (_, words) in described(scales["quick"]).items():
        values = " | ".join(f"`{_short(getattr(of, name))}`" for of in scales.values())
        lines.append(f"| `{name}` | {words} | {values} |")
    return lines


def _short(value: object) -> str:
    """A value as it is written in Python; of settings within settings, what differs from their defaults."""
    if not is_dataclass(value):
        return repr(value)
    changed = (f for f in fields(value) if getattr(value, f.name) != f.default)
    return f"{type(value).__name__}({', '.join(f'{f.name}={getattr(value, f.name)!r}' for f in changed)})"


def _value(name: str, seeds: list[float | None]) -> str:
    if None in seeds:
        return f"{name} not a number"
    spread = f" ± {stdev(seeds) / len(seeds) ** 0.5:.1g}" if len(seeds) > 1 else ""
    return f"{name} {mean(seeds):.3g}{spread}"
