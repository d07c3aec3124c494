"""Train a network into a bundle, or train one on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchfolio.cli._network import (
    augmentation,
    fitting_splits,
    normalized_splits,
    parse_settings,
    seen_so_far,
    show_result,
)
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
    named,
    working_folder,
)
from torchfolio.cli._rules import NamedRule
from torchfolio.cli._training import (
    HISTORY,
    RECORD,
    history_text,
    make_logger,
    make_recorder,
    say_epoch,
    validation,
    validation_set,
)
from torchfolio.errors import TorchfolioError
from torchfolio.fitting import importable, network_recipe

if TYPE_CHECKING:
    from torch import nn

    from torchfolio.bundle import Manifest
    from torchfolio.data import DataSplits

SCHEDULES = ("onecycle", "cosine", "constant")


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command()(train)


def train(
    data: Data,
    output: Output,
    model: Annotated[
        str | None, typer.Option(help="Reference network (resnet20, vgg11, mlp, …) or package.module:factory.")
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Bundle to fine-tune, in place of --model.")] = None,
    rule: Annotated[
        str, typer.Option(help="Learning rule: backprop, a method's slug, or package.module:Class.")
    ] = "backprop",
    rule_set: Annotated[list[str] | None, typer.Option(help="Setting of the rule, key=value; may be repeated.")] = None,
    add: Annotated[
        list[str] | None,
        typer.Option(help="Objective added to the rule: a method's slug or package.module:Class; may be repeated."),
    ] = None,
    add_set: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the added objective, key=value (of several, slug.key=value); networks by bundle."
        ),
    ] = None,
    model_set: ModelSet = None,
    allow: Allow = None,
    epochs: Annotated[int, typer.Option(min=1, max=MOST, help="Passes over the training data.")] = 10,
    batch_size: BatchSize = 128,
    optimizer: Annotated[str, typer.Option(help="sgd (Nesterov momentum 0.9) or adamw.")] = "sgd",
    lr: Annotated[float, typer.Option(help="Learning rate, the peak of the schedule.", callback=at_least_zero)] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="Weight decay.", callback=at_least_zero)] = 1e-4,
    schedule: Annotated[str, typer.Option(help="onecycle, cosine or constant.")] = "onecycle",
    augment: Annotated[bool, typer.Option(help="Random crops and flips of colour images.")] = True,
    image_size: ImageSize = None,
    train_size: TrainSize = None,
    test_size: TestSize = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of network, order and subset.")] = 0,
    device: Device = "auto",
    precision: Precision = "32-true",
    early_stopping: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Stop after so many epochs without a better validation loss.")
    ] = None,
    val: Annotated[
        str | None,
        typer.Option(
            help="Validate on all of this set, in place of examples held out of --data (which stay held out).",
            callback=named,
        ),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Follow the losses of 500 training examples and the sharpness, for inspect."),
    ] = False,
    log: Annotated[str | None, typer.Option(help="Log to csv, tensorboard or wandb, in NAME.logs beside it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted training stopped.")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a network by any learning rule, with any objectives added, and write it as a bundle.

    Example: torchfolio train --model resnet20 --data cifar10 --rule auglocal --rule-set aux_depth=3 --epochs 5 -o net/

    Example: torchfolio train --model mlp --data digits --add dhkd --add-set teacher=net/ -o student/
    """
    import shutil
    from dataclasses import replace

    from torchfolio import engine
    from torchfolio.bundle import save_bundle
    from torchfolio.engine.lock import exclusive

    checkpoints = _checkpoints(output, force, resume)
    allowed = importable(allow or [])
    named_rule = NamedRule.of(rule, rule_set or [], add or [], add_set or [], allowed)
    loggers = make_logger(log, output)
    make_optimizer = _optimizer(optimizer, lr, weight_decay)
    if schedule not in SCHEDULES:
        raise typer.BadParameter(f"expected {', '.join(SCHEDULES)}, got {schedule!r}", param_hint="--schedule")
    sizes = {"seed": seed, "image_size": image_size, "train_size": train_size, "test_size": test_size}
    if model is not None and start is None:
        net, manifest, splits = _new_network(model, parse_settings(model_set), data, sizes)
    elif start is not None and model is None and not model_set:
        net, manifest, splits = _started(start, allowed, data, sizes)
    else:
        raise typer.BadParameter("expected either --model, for a new network, or --start, for a bundle to fine-tune")
    held_out = splits.val if val is None else validation_set(val, data, splits, manifest, image_size)
    learning_rule, host = named_rule.make(net, manifest, splits)
    if not learning_rule.needs_targets:
        typer.echo(f"{rule} sees no labels: its features are not scored as a classifier's answers", err=True)
        held_out = None
    steps = epochs * -(-len(splits.train) // batch_size)
    recorder = make_recorder(splits.train, steps) if record else None
    with exclusive(checkpoints):
        check_output(output, force)  # once more: another process may have written there in the meantime
        result = engine.fit(
            net,
            splits.train,
            val=held_out,
            rule=learning_rule,
            optimizer=make_optimizer,
            scheduler=_scheduler(schedule, lr, steps),
            epochs=epochs,
            batch_size=batch_size,
            augment=augmentation(splits) if augment else None,
            seed=seed,
            fabric=engine.make_fabric(device, precision, loggers),
            checkpoint=checkpoints,
            resume=resume,
            early_stopping=early_stopping,
            callbacks=[*(recorder.parts if recorder else ()), say_epoch],
        )
        scores = engine.evaluate(net, splits.test, rule=learning_rule) if learning_rule.needs_targets else {}
        facts = {
            "data": data, **named_rule.facts(),
            "epochs": epochs, "batch_size": batch_size, "optimizer": optimizer, "lr": lr, "weight_decay": weight_decay,
            "schedule": schedule, "seed": seed, "image_size": image_size or manifest.training.get("image_size"),
            "split": splits.split_digest, "seen": seen_so_far(manifest, splits),
            "predictor": type(host).predictor is not engine.LearningRule.predictor,
            "start": str(start) if start else None, "steps": result.steps, "examples": len(splits.train),
            "stopped": result.stopped, "val_data": val, "val": validation(result.history.rows), "test": scores,
        }  # fmt: skip
        notes = {HISTORY: history_text(result.history.rows)}
        if recorder:
            notes[RECORD] = recorder.record().to_text()
        save_bundle(net, output, replace(manifest, training=facts), notes=notes)
        shutil.rmtree(checkpoints, ignore_errors=True)
    show_result({"bundle": str(output), **scores}, as_json)


def _checkpoints(output: Path, force: bool, resume: bool) -> Path:
    """The folder of the checkpoints, which stand beside the bundle: that holds safe weights alone.

    Raises:
        TorchfolioError: if the bundle may not be written, another process trains it, or `resume` does not fit.
    """
    from torchfolio.engine.checkpoint import checkpoints as whole
    from torchfolio.engine.lock import user_of

    folder = working_folder(output)
    if (user := user_of(folder)) is not None:
        raise TorchfolioError(user)
    check_output(output, force)
    if whole(folder) and not resume:
        raise TorchfolioError(f"{folder} holds an interrupted training; pass --resume to go on, or remove it")
    if resume and not folder.exists():
        raise TorchfolioError(f"there is nothing to resume: {folder} does not exist")
    return folder


def _new_network(
    model: str, arguments: dict[str, Any], data: str, sizes: dict[str, Any]
) -> tuple[nn.Module, Manifest, DataSplits]:
    """A network with random weights that fits the data, which is normalised by its own constants."""
    from torchfolio.bundle import Manifest, build
    from torchfolio.data import load
    from torchfolio.engine import seeded

    splits = load(data, **sizes)
    path, arguments = network_recipe(model, arguments, splits)
    with seeded(sizes["seed"]):
        net = build(path, arguments, allow=[path])
    mean, std = (tuple(t.flatten().tolist()) for t in (splits.mean, splits.std))
    return net, Manifest(path, arguments, tuple(splits.shape), tuple(splits.classes), mean, std), splits


def _started(
    folder: Path, allow: list[str], data: str, sizes: dict[str, Any]
) -> tuple[nn.Module, Manifest, DataSplits]:
    """The network of a bundle, and data normalised by its constants.

    Where the data have another number of classes the network gets a new classifier.
    """
    from dataclasses import replace

    from torchfolio.bundle import build, load_bundle
    from torchfolio.data import load
    from torchfolio.engine import seeded

    net, manifest = (loaded := load_bundle(folder, allow=allow)).model, loaded.manifest
    sizes = {**sizes, "image_size": sizes["image_size"] or manifest.training.get("image_size")}
    classes = tuple(load(data, normalize=False, **sizes).classes)
    if classes and manifest.classes and len(classes) != len(manifest.classes):
        width = next((k for k in ("num_classes", "out_features") if k in manifest.arguments), None)
        if width is None:
            raise TorchfolioError(
                f"{folder} tells {len(manifest.classes)} classes apart, {data} has {len(classes)}, and {manifest.build} "
                "takes no num_classes to make another classifier by"
            )
        manifest = replace(manifest, arguments={**manifest.arguments, width: len(classes)})
        with seeded(sizes["seed"]):
            old, net = net.state_dict(), build(manifest.build, manifest.arguments, allow=allow)
        fitting = {k: v for k, v in old.items() if v.shape == net.state_dict()[k].shape}
        net.load_state_dict(fitting, strict=False)
    if set(classes) != set(manifest.classes):
        manifest = replace(manifest, classes=classes)  # what it tells apart from now on
    splits = fitting_splits(manifest, str(folder), data, scored=False, **sizes)
    return net, manifest, normalized_splits(splits, manifest.mean, manifest.std)


def _optimizer(name: str, lr: float, weight_decay: float) -> Any:
    from functools import partial

    import torch

    if name == "sgd":
        return partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    if name == "adamw":
        return partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay)
    raise typer.BadParameter(f"expected sgd or adamw, got {name!r}", param_hint="--optimizer")


def _scheduler(name: str, lr: float, steps: int) -> Any:
    from functools import partial

    from torch.optim import lr_scheduler

    if name == "constant":
        return None
    if name == "cosine":
        return partial(lr_scheduler.CosineAnnealingLR, T_max=steps)
    return partial(lr_scheduler.OneCycleLR, max_lr=lr, total_steps=steps, cycle_momentum=False)
