"""The command line: every module in this package adds its commands; errors are one sentence, exit codes 0 to 3.

A module here exposes `register(app)`, which adds its commands to the application. Modules are found by a scan of
the package, in alphabetical order, and import nothing heavy at their top, so that `list` or `--help` answer at
once. Results go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import dis
import gc
import importlib
import pkgutil
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchfolio import __version__
from torchfolio.errors import TorchfolioError

DONE, CHECK_FAILED, BAD_USAGE, UNFORESEEN, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; a claim or check failed; bad usage or bad input; an error nobody foresaw; Ctrl-C."""

REPORT = "this is a fault of torchfolio; please report it with the traceback that --debug shows"


class _OneSentence(TyperGroup):
    """A group that shows an error as one sentence, and its traceback only where `--debug` asks for it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # `torchfolio run x --debug` means the same as `torchfolio --debug run x`.
        own = args[: args.index("--")] if "--" in args else args
        if "--debug" in own:
            args = ["--debug", *(a for a in own if a != "--debug"), *args[len(own) :]]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted", debug=bool(ctx.params.get("debug")))
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if _belongs_to_typer(error):
                raise
            debug, foreseen = bool(ctx.params.get("debug")), _foreseen(error)
            # An error that nobody foresaw is named by its type, or its message may not be understood.
            message = str(error) if foreseen and str(error) else f"{type(error).__name__}: {error}"
            message = " ".join(message.split())  # one line, whatever a library put into it
            _say(message if foreseen else f"{message}\n{REPORT}", debug=debug)
            raise typer.Exit(BAD_USAGE if foreseen else UNFORESEEN) from None


def _foreseen(error: Exception) -> bool:
    """Whether an error is about what the user asked for or gave: its message says what was expected."""
    if isinstance(error, TorchfolioError | ValueError | OSError | MemoryError):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported for its sake
        return True
    return isinstance(error, TypeError) and _raised_on_purpose(error)


def _raised_on_purpose(error: Exception) -> bool:
    """Whether a `raise` in this package gave an error, not an operation that went wrong."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not last.tb_frame.f_globals.get("__name__", "").startswith("torchfolio."):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def _belongs_to_typer(error: Exception) -> bool:
    """Usage errors, exits and closed pipes, which Typer itself handles."""
    usage_error = typer.BadParameter.__mro__[2]
    return isinstance(error, typer.Exit | typer.Abort | usage_error | BrokenPipeError)


def _say(message: str, *, debug: bool) -> None:
    if debug:
        traceback.print_exc(file=sys.stderr)
    typer.echo(f"torchfolio: {message}", err=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchfolio {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="torchfolio",
    cls=_OneSentence,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Published methods for training, shrinking, adapting, auditing and understanding networks, with evidence."""


def _register_commands() -> None:
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if not module.startswith("_"):
            importlib.import_module(f"{__name__}.{module}").register(app)


_register_commands()


def main() -> None:
    """Entry point of the `torchfolio` command."""
    # Of the two seconds that it takes to import torch and to leave again, collections of garbage are one.
    gc.set_threshold(10_000)
    try:
        app(prog_name="torchfolio")
    finally:
        gc.freeze()
