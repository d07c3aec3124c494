"""Commands on experiments: measure claims, show what was measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli._options import MOST_SEED, Device, check_file, check_place
from torchfolio.processes import import_ahead

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchfolio.runs import Outcome

Record = Annotated[
    Path | None, typer.Option(help="Folder to which the short form of the result is written, as SLUG.json.")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(run)
    app.command()(bench)
    app.command()(report)


def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Papers to measure.")] = None,
    family: Annotated[str | None, typer.Option(help="All papers of a family.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All papers whose method is in.")] = False,
    scale: Annotated[str, typer.Option(help="smoke (seconds, toy data), quick (minutes) or full.")] = "quick",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="First seed.")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; claims are decided on their mean.")] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Seeds at a time, each in a process.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Spread seeds over a Ray cluster.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of run folders.")] = Path("runs"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest unfinished run of the same settings.")
    ] = False,
    device: Device = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Setting of the experiment, key=value; model=package.module:factory and data=folder/ are yours.",
        ),
    ] = None,
    record: Record = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print outcomes as JSON.")] = False,
) -> None:
    """Measure the claims of papers on this machine.

    Example: torchfolio run auglocal --scale quick --seeds 3
    """
    from torchfolio.json_text import to_json

    chosen = _choose(slugs or [], family, everything)
    for place in (out, record):
        if place is not None:
            check_place(place)
    if jobs > 1 and not ray and device in ("auto", "cpu"):
        import_ahead(["torchfolio.cli", *(f"torchfolio.experiments.{slug}" for slug in chosen)])
    from torchfolio.fitting import importable
    from torchfolio.runs import plan, run_all
    from torchfolio.runs.settings import parse

    changes = parse(set_ or [])
    importable([changes["model"]] if ":" in changes.get("model", "") else [])
    span = range(seed, seed + seeds)
    plans = [plan(slug, scale, span, changes, device=device, out=out, resume=resume) for slug in chosen]
    with _Status() as status:
        outcomes = run_all(plans, jobs=jobs, ray=ray, say=status.say)
    if record is not None:
        _record(outcomes, record)
    if as_json:
        from dataclasses import asdict

        typer.echo(to_json([asdict(o) | {"folder": str(p.folder)} for o, p in zip(outcomes, plans, strict=True)]))
    else:
        for outcome, planned in zip(outcomes, plans, strict=True):
            _show(outcome, planned.folder)
    if not all(outcome.ok for outcome in outcomes):
        raise typer.Exit(1)


def bench(
    slug: Annotated[str, typer.Argument(help="Paper whose method is timed.")],
    num_threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of ours and of the peers.")] = 1,
    record: Record = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ratios as JSON.")] = False,
) -> None:
    """Time a method against what a user would take in its place, in alternation.

    Example: torchfolio bench naive_bayes_probe
    """
    from torchfolio.json_text import to_json
    from torchfolio.runs import bench as benches
    from torchfolio.runs.record import record_peers

    if record is not None:
        check_place(record)
    with _Status() as status:
        timed = benches.bench(slug, num_threads=num_threads, say=status.say)
    ratios = timed.ratios()
    if record is not None:
        record_peers(slug, ratios, record)
    if as_json:
        typer.echo(to_json(ratios))
        return
    for work, times in timed.times.items():
        typer.secho(work, bold=True)
        typer.echo(f"  {times.reference}: {times.to_frame().loc[times.reference, 'seconds']:.4g} s")
        for name, ratio in ratios[work].items():
            typer.echo(f"  {name}: {ratio:.2f} of our time" + (" (ours is slower)" if ratio < 1 else ""))


def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="Run folders, or folders that hold them.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the path as JSON.")] = False,
) -> None:
    """Turn runs into one self-contained HTML page.

    Example: torchfolio report runs/ -o report.html
    """
    from torchfolio.json_text import to_json
    from torchfolio.report import write_report

    check_file(output)
    path = write_report(runs or [Path("runs")], output).resolve()
    typer.echo(to_json({"report": str(path)}) if as_json else f"report: {path}")


def _record(outcomes: list[Outcome], folder: Path) -> None:
    from torchfolio.runs.record import record

    for outcome in outcomes:
        if outcome.status == "done":
            record(outcome, catalog.paper(outcome.slug).claims, folder)
        else:
            typer.echo(f"{outcome.slug}: {outcome.status}, not recorded", err=True)


def _choose(slugs: list[str], family: str | None, everything: bool) -> list[str]:
    if sum([bool(slugs), family is not None, everything]) != 1:
        raise typer.BadParameter("name papers, or give --family or --all")
    if slugs:  # without a look at the catalogue: the workers' imports have begun the sooner
        return list(dict.fromkeys(slugs))
    if family is not None and family not in catalog.FAMILIES:
        raise typer.BadParameter(f"there is no family {family!r}; there are {', '.join(catalog.FAMILIES)}")
    chosen = [paper.slug for paper in catalog.papers().values() if paper.is_in and family in (None, paper.family)]
    if not chosen:
        raise typer.BadParameter(f"no method of the family {family!r} is in yet")
    return chosen


class _Status:
    """Lines on standard error; where somebody looks, with a spinner and the time."""

    def __init__(self) -> None:
        self._progress: Any = None

    def __enter__(self) -> _Status:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.start()
            self._task = self._progress.add_task("starting", total=None)
        return self

    @property
    def say(self) -> Callable[[str], None]:
        """Show what is going on."""

        def show(text: str) -> None:
            if self._progress is not None:
                self._progress.update(self._task, description=text)
                self._progress.console.print(f"[dim]{text}[/dim]", highlight=False)
            else:
                typer.echo(text, err=True)

        return show

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            self._progress.stop()


def _show(outcome: Outcome, folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    seeds = f"{len(outcome.seeds)} seed{'s' if len(outcome.seeds) > 1 else ''}"
    title = f"{outcome.slug} · {outcome.scale} · {seeds} · {outcome.seconds:.0f} s"
    table = Table(title=title, title_justify="left", show_lines=True)
    for column in ("claim", "the paper", "measured", "condition", "holds"):
        table.add_column(column)
    for claim in outcome.claims:
        verdict = {True: "yes", False: "NO", None: "–"}[claim["holds"]]
        style = {True: "green", False: "bold red", None: "dim"}[claim["holds"]]
        count = f" ({claim['held_on']}/{claim['of']})" if claim["of"] > 1 else ""
        measured = "\n".join(f"{k} {_number(v)}" for k, v in claim["values"].items())
        table.add_row(
            Text(claim["sentence"]),
            Text(claim["paper"] or "–"),
            Text(measured or claim["note"] or ""),
            Text(claim["expression"] or ""),
            Text(verdict + count, style=style),
        )
    # A pipe has no width of its own; wrapping at 80 would tear the figures apart.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    if outcome.error is not None:
        console.print(Text(f"failed: {outcome.error['type']}: {outcome.error['message']}", style="bold red"))
    if outcome.scale == "smoke":
        console.print(Text("smoke runs on toy data: it shows that everything runs, and is no evidence", style="dim"))
    typer.echo(f"run: {folder}")


def _number(value: dict[str, Any]) -> str:
    if value["mean"] is None:
        return "not a number"
    return f"{value['mean']:.4g}" + (f" ± {value['sem']:.2g}" if value["sem"] is not None else "")
