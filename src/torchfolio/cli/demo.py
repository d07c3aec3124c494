"""The command that shows what the library is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchfolio.cli._options import AsJson, check_place


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(demo)


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the page.")] = Path("demo"),
    as_json: AsJson = False,
) -> None:
    """A tour in about a minute on embedded data: train, shrink, audit, compare and draw a network, on one page.

    Example: torchfolio demo -o demo/
    """
    import warnings

    from torchfolio.json_text import to_json
    from torchfolio.report.demo import write_demo

    check_place(output)
    output.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = write_demo(output, say=lambda text: typer.echo(f"{text} …", err=True))
    typer.echo(to_json({"page": str(page)}) if as_json else f"open {page.resolve()}")
