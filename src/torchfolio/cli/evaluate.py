"""Measure a bundle on a data set."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from torchfolio.cli._network import (
    fitting_splits,
    normalized,
    predictor_of,
    say,
    show_result,
)
from torchfolio.cli._options import (
    MOST_SEED,
    Allow,
    AsJson,
    Data,
    Device,
    ImageSize,
    TestSize,
)
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(name="eval")(evaluate)


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    data: Data,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    allow: Allow = None,
    image_size: ImageSize = None,
    test_size: TestSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the order of the training part.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Read a bundle back and measure it on a data set.

    Example: torchfolio eval net/ --data cifar10
    """
    from torchfolio import engine
    from torchfolio.bundle import load_bundle

    allow = importable(allow or [])
    if split not in ("train", "val", "test"):
        raise typer.BadParameter(f"expected train, val or test, got {split!r}", param_hint="--split")
    loaded = load_bundle(bundle, allow=allow)
    splits = fitting_splits(loaded.manifest, str(bundle), data, seed=seed, image_size=image_size, test_size=test_size)
    examples = normalized(getattr(splits, split), loaded.manifest.mean, loaded.manifest.std)
    if (rule := loaded.manifest.training.get("rule")) and loaded.manifest.training.get("test") == {}:
        say(f"{bundle} was trained by {rule}, which sees no labels: its outputs are features, scored here as answers")
    scores = engine.evaluate(predictor_of(loaded, allow), examples, device=device)
    if not math.isfinite(scores["loss"]):  # the weights are finite; it is too large for numbers of their precision
        raise TorchfolioError(f"the answers of {bundle} on {data} are not finite: its loss is {scores['loss']}")
    show_result({"bundle": str(bundle), "data": data, "split": split, "examples": len(examples), **scores}, as_json)
