"""Commands on the catalogue: list, show, search, cite. They answer at once, without torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.json_text import to_json

if TYPE_CHECKING:
    from torchfolio.catalog import Paper

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(name="list")(list_papers)
    app.command()(show)
    app.command()(search)
    app.command()(cite)


def list_papers(
    family: Annotated[str | None, typer.Option(help="Only this family.")] = None,
    ready: Annotated[bool, typer.Option("--in", help="Only papers whose method is in.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the papers.

    Example: torchfolio list --family local
    """
    if family is not None and family not in catalog.FAMILIES:
        raise typer.BadParameter(f"there is no family {family!r}; there are {', '.join(catalog.FAMILIES)}")
    papers = [p for p in catalog.papers().values() if family in (None, p.family) and (p.is_in or not ready)]
    if as_json:
        typer.echo(to_json([_table(paper) for paper in papers], ensure_ascii=False))
        return
    width = max((len(p.slug) for p in papers), default=0)
    for name in catalog.FAMILIES:
        members = [p for p in papers if p.family == name]
        if members:
            typer.secho(f"{name}: {catalog.FAMILIES[name]}", bold=True)
            for p in members:
                typer.echo(f"  {'●' if p.is_in else '○'} {p.slug:<{width}}  {p.title} ({p.venue})")
    typer.echo(f"\n● in ({sum(p.is_in for p in papers)}), ○ not in yet ({sum(not p.is_in for p in papers)})")


def show(
    slug: Annotated[str, typer.Argument(help="Slug of the paper.")],
    settings: Annotated[bool, typer.Option("--settings", help="The settings of its experiment, by scale.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show one paper: what it does, its claims, how to run it; or what `run --set` can change.

    Example: torchfolio show auglocal --settings
    """
    paper = catalog.paper(slug)
    if settings:
        _show_settings(slug, as_json)
        return
    if as_json:
        typer.echo(to_json(_table(paper), ensure_ascii=False))
        return
    typer.secho(paper.title, bold=True)
    typer.echo(f"{', '.join(paper.authors)}. {paper.venue}.")
    if paper.arxiv:
        typer.echo(f"https://arxiv.org/abs/{paper.arxiv}")
    if paper.code:
        licence = {None: "", "none": " (no licence)"}.get(paper.code.license, f" ({paper.code.license})")
        typer.echo(f"official code: {paper.code.url}{licence}")
    typer.echo(f"family: {paper.family} · tags: {', '.join(paper.tags)}\n")
    typer.echo(_wrapped(paper.summary) + "\n")
    for claim in paper.claims:
        typer.secho(f"{claim.id}", bold=True)
        typer.echo(_wrapped(claim.sentence, "  "))
        if claim.paper:
            typer.echo(_wrapped(f"the paper: {claim.paper}", "  "))
        typer.echo(_wrapped(f"measured here: {claim.measured}", "  "))
    command = f"torchfolio run {slug}" if paper.is_in else "the method is not in yet"
    typer.echo(f"\n{paper.module}\n{command}")


def _show_settings(slug: str, as_json: bool) -> None:
    """Every setting of an experiment: what it is, and its value at each scale."""
    from dataclasses import asdict

    from torchfolio.runs import experiment
    from torchfolio.runs.settings import described

    scales = experiment(slug).SCALES
    values = {scale: asdict(settings) for scale, settings in scales.items()}
    rows = {
        key: {"meaning": words, **{scale: of[key] for scale, of in values.items()}}
        for key, (_, words) in described(scales["quick"]).items()
    }
    if as_json:
        typer.echo(to_json(rows, ensure_ascii=False))
        return
    for key, row in rows.items():
        typer.secho(key, bold=True, nl=False)
        typer.echo(f"  {row['quick']!r}" + "".join(f"; {k}: {row[k]!r}" for k in scales if row[k] != row["quick"]))
        typer.echo(_wrapped(row["meaning"], "    "))
    typer.echo(f"\ntorchfolio run {slug} --set KEY=VALUE")


def search(
    words: Annotated[list[str], typer.Argument(help="What you look for, in your own words.")],
    limit: Annotated[int, typer.Option(min=1, help="Most results.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Find papers by what they do.

    Example: torchfolio search detect a poisoned model without clean data
    """
    results = catalog.search(" ".join(words), limit)
    if as_json:
        typer.echo(
            to_json([{"slug": p.slug, "title": p.title, "score": score} for p, score in results], ensure_ascii=False)
        )
        return
    for paper, _ in results:
        typer.secho(f"{'●' if paper.is_in else '○'} {paper.slug}", bold=True, nl=False)
        typer.echo(f"  {paper.title}")
        typer.echo(_wrapped(paper.summary.split(". ")[0].rstrip(".") + ".", "    "))
    if not results:
        typer.echo("nothing found; try other words", err=True)
        raise typer.Exit(1)


def cite(slugs: Annotated[list[str], typer.Argument(help="Slugs of the papers.")]) -> None:
    """Print BibTeX entries.

    Example: torchfolio cite auglocal man
    """
    typer.echo(catalog.citations(slugs))


def _table(paper: Paper) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(paper) | {"in": paper.is_in, "module": paper.module}


def _wrapped(text: str, indent: str = "") -> str:
    import shutil
    import textwrap

    width = min(shutil.get_terminal_size((100, 24)).columns, 110) if sys.stdout.isatty() else 100
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
