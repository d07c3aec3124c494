"""Options that several commands have, checked while the command line is read: before any work starts."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from torchfolio.checks import writable
from torchfolio.errors import TorchfolioError

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true")


def named(value: Any) -> Any:
    """Refuse an empty name of a data set, which would stand for every folder."""
    for name in value if isinstance(value, list | tuple) else [value]:
        if name is not None and not name.strip():
            raise typer.BadParameter("expected the name of a data set, got an empty one")
    return value


def device_here(value: str | None) -> str | None:
    """Refuse a device that there is not."""
    if value is None or value in ("auto", "cpu"):
        return value
    if not re.fullmatch(r"(cuda|xpu)(:\d+)?|mps", value):
        raise typer.BadParameter(f"expected auto, cpu, cuda, cuda:0 or mps, got {value!r}")
    import torch

    kind, _, index = value.partition(":")
    part = getattr(torch, kind)
    if not part.is_available() or int(index or 0) >= part.device_count():
        raise typer.BadParameter(f"there is no device {value} here; expected auto or cpu")
    return value


def known_precision(value: str) -> str:
    """Refuse a precision that Fabric does not have."""
    if value not in PRECISIONS:
        raise typer.BadParameter(f"expected one of {', '.join(PRECISIONS)}, got {value!r}")
    return value


def at_least_zero(value: float | None) -> float | None:
    """Refuse a negative number, NaN and infinity."""
    if value is not None and not 0 <= value < math.inf:
        raise typer.BadParameter(f"expected a finite number of at least 0, got {value}")
    return value


ALLOW_HELP = "Import path (package.module:name) outside torchfolio that the bundle may use; may be repeated."
MOST = 10**6  # of what is counted: batches larger than this are a slip of the keyboard
MOST_SEED = 2**32 - 1  # of NumPy's generators

Allow = Annotated[list[str] | None, typer.Option(help=ALLOW_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
BatchSize = Annotated[int, typer.Option(min=1, max=MOST, help="Examples in a batch.")]
Data = Annotated[str, typer.Option(help="Named data set, hf:owner/name, or an image folder.", callback=named)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps.", callback=device_here)]
Force = Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")]
ImageSize = Annotated[
    int | None,
    typer.Option(min=1, max=8192, help="Side that images are resized to; of a bundle as in training."),
]
ModelSet = Annotated[list[str] | None, typer.Option(help="Argument of the network, key=value.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle.")]
Precision = Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed.", callback=known_precision)]
TestSize = Annotated[int | None, typer.Option(min=1, max=10**9, help="Evaluate on so many test examples.")]
TrainSize = Annotated[int | None, typer.Option(min=1, max=10**9, help="Train on so many examples.")]


def check_output(folder: Path, force: bool) -> None:
    """Refuse a place where no bundle can be written, or that has one already.

    Raises:
        TorchfolioError: naming it.
    """
    from torchfolio.bundle import MANIFEST, check_folder

    check_folder(folder)
    if (folder / MANIFEST).is_file() and not force:
        raise TorchfolioError(f"{folder} holds a bundle; pass --force to replace it, or name another folder")


def check_outputs(folders: Iterable[Path], force: bool) -> None:
    """As `check_output`, for several."""
    for folder in folders:
        check_output(folder, force)


def check_file(path: Path) -> None:
    """Refuse a place where no file can be written.

    Raises:
        TorchfolioError: naming it.
        OSError: likewise.
    """
    if path.is_dir():
        raise TorchfolioError(f"{path} is a folder, expected a file to write")
    if not path.absolute().parent.is_dir():
        raise TorchfolioError(f"there is no folder {path.parent}")
    writable(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise TorchfolioError(f"{path} cannot be written")


def check_place(folder: Path) -> None:
    """Refuse a place where no folder of results can be, or be written.

    Raises:
        TorchfolioError: naming it.
        OSError: likewise.
    """
    if folder.exists() and not folder.is_dir():
        raise TorchfolioError(f"{folder} is a file, expected a folder")
    writable(folder)


def working_folder(output: Path) -> Path:
    """The folder beside an output that its writer holds, and that keeps the checkpoints of a training."""
    return output.parent / f"{output.name}.training"


@contextmanager
def alone(output: Path, check: Callable[[], object]) -> Iterator[None]:
    """Hold an output against other commands that would write it.

    Args:
        output: folder that will be written.
        check: check that refuses it where it cannot be. It is made before the output is held, and once more then:
            another process may have written there in the meantime.

    Raises:
        FolderInUse: naming the process that holds it.
    """
    from torchfolio.engine.lock import exclusive

    check()
    with exclusive(working_folder(output)):
        check()
        yield
