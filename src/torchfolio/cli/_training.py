"""What `train` says and keeps while it works: lines of epochs, the history, loggers."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from torchfolio.errors import TorchfolioError

if TYPE_CHECKING:
    from torch.utils.data import TensorDataset

    from torchfolio.bundle import Manifest
    from torchfolio.data import DataSplits
    from torchfolio.engine import FitState
    from torchfolio.insight.training_record import TrainingRecord, TrainingRecorder

HISTORY, RECORD = "history.csv", "training_record.json"
FOLLOWED = 500  # training examples whose losses are recorded
LOGS = ("csv", "tensorboard", "wandb")
SHOWN = ("loss", "accuracy", "val_loss", "val_accuracy")


def say_epoch(state: FitState) -> None:
    """Write a line on standard error at the end of every epoch, where no progress bar is seen."""
    if not state.epoch_end or sys.stderr.isatty():
        return
    row = state.history.rows[-1]
    figures = [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in SHOWN if row.get(name) is not None]
    ends = f"/{state.epochs}" if state.epochs is not None else ""
    print(f"epoch {row['epoch']}{ends}  {'  '.join(figures)}  {row['seconds']:.1f} s", file=sys.stderr, flush=True)


def history_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The history as CSV: a row for every epoch, a column for every value that any of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def make_recorder(train: Any, steps: int) -> TrainingRecorder:
    """A recorder that follows the first training examples."""
    from torchfolio.insight.training_record import TrainingRecorder

    return TrainingRecorder(tuple(t[:FOLLOWED] for t in train.tensors), steps)


def read_record(folder: Path) -> TrainingRecord | None:
    """The record that stands in a bundle, or `None` where there is none.

    Raises:
        TorchfolioError: if it is none of ours.
    """
    from torchfolio.insight.training_record import LARGEST, TrainingRecord

    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError("the record of the training is too large to be one")
        return TrainingRecord.from_text(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TorchfolioError(f"{path}: {error}") from error


def validation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last validation figures, by name."""
    last = rows[-1] if rows else {}
    return {name.removeprefix("val_"): float(value) for name, value in last.items() if name.startswith("val_")}


def validation_set(
    name: str, data: str, splits: DataSplits, manifest: Manifest, image_size: int | None
) -> TensorDataset:
    """All examples of a set of the user's own, normalised and labelled as those that are trained on.

    Raises:
        TorchfolioError: if they do not fit the training data, or are the training data.
    """
    import torch

    from torchfolio.cli._network import normalized
    from torchfolio.data import load_whole
    from torchfolio.data.seen import are_seen, marks_of, sketch

    if name == data or (Path(name).is_dir() and Path(name).resolve() == Path(data).resolve()):
        raise TorchfolioError(f"--val names the training data, {data}; its validation part is taken without --val")
    size = image_size or manifest.training.get("image_size")
    examples = load_whole(name, like=splits, image_size=size)
    examples = normalized(examples, manifest.mean, manifest.std)
    known, there = (marks_of(x, torch.arange(len(x))) for x in (splits.train.tensors[0], examples.tensors[0]))
    if are_seen(sketch(known.tolist()), there):
        raise TorchfolioError(f"{name} holds examples that are trained on; expected others for --val")
    return examples


def make_logger(kind: str | None, output: Path) -> list[Any]:
    """A logger of Lightning's that writes beside the bundle, in `NAME.logs`; none for None.

    Raises:
        BadParameter: if there is no such logger.
        TorchfolioError: if its package is not installed.
    """
    if kind is None:
        return []
    from torchfolio.engine.fabric import import_fabric

    import_fabric()
    place = output.parent / f"{output.name}.logs"
    if kind == "csv":
        from lightning_fabric.loggers import CSVLogger

        return [CSVLogger(str(place.parent), name=place.name)]
    if kind == "tensorboard":
        from lightning_fabric.loggers import TensorBoardLogger

        try:
            return [TensorBoardLogger(str(place.parent), name=place.name)]
        except ModuleNotFoundError as error:
            raise TorchfolioError("tensorboard is not installed: pip install torchfolio[tensorboard]") from error
    if kind == "wandb":
        return [_WandB(place)]
    raise typer.BadParameter(f"expected {', '.join(LOGS)}, got {kind!r}", param_hint="--log")


class _WandB:
    """Weights & Biases as a logger of Fabric's; its own environment variables say where to and whether offline."""

    def __init__(self, place: Path) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise TorchfolioError("wandb is not installed: pip install wandb") from error
        place.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project="torchfolio", name=place.name.removesuffix(".logs"), dir=str(place))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        self.run.log(dict(metrics), step=step)

    def save(self) -> None:
        """Called when the training ends."""
        self.run.finish()
