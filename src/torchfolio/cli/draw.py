"""The command that draws a network as a circuit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli._network import parse_settings, show_result
from torchfolio.cli._options import Allow, AsJson, ModelSet, check_file
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import fitting_recipe, importable

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".svg", ".pdf", ".png", ".txt", ".py")
LEVELS = ("auto", "full", "blocks")


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(draw)


def draw(
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle; or name --model.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="File: .svg, .pdf, .png, .txt, or .py for Python that computes the same; text on stdout without it.",
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    model_set: ModelSet = None,
    allow: Allow = None,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape of one input without the batch, 3,32,32; of ids 12:int; once for each input."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Examples in the batch that the network is traced with.")
    ] = 2,
    names: Annotated[
        list[str] | None, typer.Option(help='Names of an input\'s axes, "b c h w"; once for each input.')
    ] = None,
    level: Annotated[str, typer.Option(help="auto, full (every operation) or blocks (modules as boxes).")] = "auto",
    vary: Annotated[
        str | None, typer.Option(help='Axes whose length may vary, "b x"; what is written as .py runs for them.')
    ] = None,
    backward: Annotated[bool, typer.Option("--backward", help="Draw the backward pass.")] = False,
    hide_batch: Annotated[bool, typer.Option("--hide-batch", help="Leave the batch axis out of the drawing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Draw a network as a circuit: every axis of every tensor is a wire.

    Example: torchfolio draw net/ -o net.svg
    """
    if level not in LEVELS:
        raise typer.BadParameter(f"expected {', '.join(LEVELS)}, got {level!r}", param_hint="--level")
    if output is not None and output.suffix not in SUFFIXES:
        raise TorchfolioError(f"{output} has the suffix {output.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if output is not None:
        check_file(output)
    if (bundle is None) == (model is None):
        got = "neither" if bundle is None else "both"
        raise TorchfolioError(f"expected either the folder of a bundle or --model, got {got}")
    from torchfolio.insight import circuit_diagrams

    if bundle is not None:
        net, shapes = _from_bundle(bundle, allow, input_shape)
    else:
        net, shapes = _from_factory(str(model), parse_settings(model_set), input_shape)
    if names is not None and len(names) != len(shapes):
        raise TorchfolioError(f"expected --names once for each of {len(shapes)} inputs, got {len(names)}")
    examples = tuple(_example(shape, batch_size) for shape in shapes)
    diagram = circuit_diagrams.draw(
        net.eval(),
        examples,
        names=_named(names, examples),
        level=level,
        dynamic=(vary or "").split(),
        hide_batch=hide_batch,
    )
    if backward:
        diagram = diagram.backward()
    result = {"signature": diagram.signature(), "columns": len(diagram.sheet.columns)}
    if output is not None:
        _write(diagram, output)
        show_result({"file": str(output), **result}, as_json)
    elif as_json:
        show_result({**result, "diagram": diagram.json()}, True)
    else:
        typer.echo(diagram.text())


def _from_bundle(folder: Path, allow: Sequence[str] | None, given: Sequence[str] | None) -> tuple[nn.Module, list[Any]]:
    """A network of a bundle and the shapes of its inputs, those of its training unless others are given."""
    from torchfolio.bundle import load_bundle

    source = load_bundle(folder, allow=importable(list(allow or [])))
    shapes = [_shape(text) for text in given or []]
    if not shapes and not source.manifest.input_shape:
        raise TorchfolioError(f"{folder} does not say what its inputs are; name them: --input-shape 3,32,32")
    return source.model, shapes or [(source.manifest.input_shape, False)]


def _from_factory(model: str, settings: dict[str, Any], given: Sequence[str] | None) -> tuple[nn.Module, list[Any]]:
    """A new network of a factory, which is told the sizes of its first input where it asks for them."""
    from torchfolio.bundle import build

    if not given:
        raise TorchfolioError("--model needs the shape of one input without the batch: --input-shape 3,32,32")
    shapes = [_shape(text) for text in given]
    path, arguments = fitting_recipe(model, settings, shapes[0][0], outputs=10)
    return build(path, arguments, allow=[path]), shapes


def _shape(text: str) -> tuple[tuple[int, ...], bool]:
    """`"3,32,32"` as a shape; and whether it is marked as one of whole numbers, `"12:int"`."""
    sides, _, kind = text.partition(":")
    try:
        shape = tuple(int(side) for side in sides.split(",") if side.strip())
    except ValueError:
        shape = (0,)
    if kind not in ("", "int", "float") or any(side < 1 for side in shape):
        raise TorchfolioError(f"expected a shape such as 3,32,32 or 12:int, got {text!r}")
    return shape, kind == "int"


def _example(shape: tuple[tuple[int, ...], bool], batch: int) -> Tensor:
    import torch

    sides, whole = (batch, *shape[0]), shape[1]
    return torch.zeros(sides, dtype=torch.long) if whole else torch.zeros(sides)


def _named(names: Sequence[str] | None, examples: Sequence[Tensor]) -> list[str] | None:
    """Names of axes for each input, checked against its rank."""
    for text, example in zip(names or [], examples, strict=False):
        count = len(text.split())
        if count != example.dim():
            raise TorchfolioError(f"--names {text!r} names {count} axes, the input has {example.dim()} with the batch")
    return list(names) if names is not None else None


def _write(diagram: Any, output: Path) -> None:
    if output.suffix == ".txt":
        output.write_text(diagram.text() + "\n", encoding="utf-8")
    elif output.suffix == ".py":
        output.write_text(diagram.to_source(), encoding="utf-8")
    elif output.suffix == ".pdf":
        diagram.pdf(output)
    elif output.suffix == ".png":
        output.write_bytes(diagram.png())
    else:
        diagram.svg(output)
