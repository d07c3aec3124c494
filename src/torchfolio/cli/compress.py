"""The command that makes a trained network smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio import catalog
from torchfolio.cli._options import (
    MOST,
    MOST_SEED,
    Allow,
    AsJson,
    BatchSize,
    Data,
    Device,
    Force,
    ImageSize,
    ModelSet,
    Output,
    Precision,
    TestSize,
    TrainSize,
    at_least_zero,
    check_output,
)
from torchfolio.cli.networks import (
    augmentation,
    call_with,
    importable,
    normalized_splits,
    open_network,
    parse_settings,
    predictor_of,
    show_result,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.bundle import Bundle, Manifest
    from torchfolio.data import DataSplits
    from torchfolio.efficiency.compression import Compression


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(compress)


def compress(
    data: Data,
    output: Output,
    bundle: Annotated[Path | None, typer.Argument(help="Folder of the bundle; or name --model and --weights.")] = None,
    method: Annotated[str, typer.Option(help="Slug of a method that compresses networks.")] = "biper",
    setting: Annotated[list[str] | None, typer.Option("--set", help="Setting of the method, key=value.")] = None,
    model: Annotated[str | None, typer.Option(help="Reference network or package.module:factory.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its weights, a safetensors file.")] = None,
    model_set: ModelSet = None,
    allow: Allow = None,
    epochs: Annotated[
        int, typer.Option(min=1, max=MOST, help="Passes over the training data, of all phases together.")
    ] = 9,
    batch_size: BatchSize = 128,
    lr: Annotated[float, typer.Option(help="Learning rate of the first phase.", callback=at_least_zero)] = 0.02,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", callback=at_least_zero)] = 5e-4,
    augment: Annotated[bool, typer.Option(help="Random crops and flips of colour images.")] = True,
    image_size: ImageSize = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of subsets and order.")] = 0,
    device: Device = "auto",
    precision: Precision = "32-true",
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a trained network smaller, fine-tune it, and write it as a bundle that eval reads.

    Shows bytes of all tensors, operations for one example and scores on the test split, before and after; those
    after are of the bundle as it is read back.

    Example: torchfolio compress net/ --method biper --data cifar10 --epochs 9 -o small/
    """
    from torchfolio.bundle import load_bundle, save_bundle
    from torchfolio.efficiency.compression import compress as compress_network

    check_output(output, force)
    factory = catalog.offered(method, "compression")
    settings = parse_settings(setting)
    compression = call_with(factory, settings, f"the method {method}")
    allow = importable([*(allow or []), *([model] if model and ":" in model else [])])
    sizes = {"seed": seed, "train_size": train_size, "test_size": test_size}
    source, splits = open_network(bundle, model, weights, model_set, allow, data, image_size, sizes)
    splits = normalized_splits(splits, source.manifest.mean, source.manifest.std)
    example = splits.train.tensors[0][:2].clone()
    before = {**_measure(source, splits, device, allow), **_flops(source.model, example)}
    made = compress_network(
        source.model,
        compression,
        splits.train,
        val=splits.val,
        example=example,
        epochs=epochs,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        augment=augmentation(splits) if augment else None,
        seed=seed,
        device=device,
        precision=precision,
        say=lambda text: typer.echo(text, err=True),
    )
    record = {"method": method, "settings": settings, "data": data, "epochs": made.epochs, "lr": lr,
              "weight_decay": weight_decay, "batch_size": batch_size, "seed": seed, "before": before}  # fmt: skip
    save_bundle(made.model, output, _manifest(source.manifest, compression, record))
    written = load_bundle(output, allow=allow)
    after = {
        **_measure(written, splits, device, allow),
        **compression.operations(written.model.cpu(), example[:1]),
    }
    _show(str(output), method, before, after, as_json)


def _manifest(source: Manifest, compression: Compression, record: dict[str, Any]) -> Manifest:
    from dataclasses import replace

    recipe = compression.recipe({"build": source.build, "arguments": source.arguments})
    return replace(source, **recipe, training={**source.training, "compressed": record}, tied={})


def _measure(bundle: Bundle, splits: DataSplits, device: str, allow: list[str]) -> dict[str, float]:
    from torchfolio import engine
    from torchfolio.efficiency.compression import tensor_bytes

    scores = engine.evaluate(predictor_of(bundle, allow), splits.test, device=device)
    return {"bytes": tensor_bytes(bundle.model), **scores}


def _flops(model: nn.Module, example: Tensor) -> dict[str, int]:
    from torchfolio.measure import count_flops

    return {"flops": count_flops(model.cpu(), example[:1])}


def _show(bundle: str, method: str, before: dict[str, Any], after: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_result({"bundle": bundle, "method": method, "before": before, "after": after}, True)
        return
    typer.echo(f"{'bundle':>18}  {bundle}")
    for key in dict.fromkeys([*before, *after]):
        values = [f"{v:.4f}" if isinstance(v, float) else f"{v:,}" for v in (before.get(key, 0), after.get(key, 0))]
        typer.echo(f"{key.replace('_', ' '):>18}  {values[0]} -> {values[1]}")
