"""The learning curve of a bundle, read from the history that `train` leaves beside it."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from torchfolio.report.sheet import Picture, Sheet

__all__ = ["learning_card"]

LARGEST = 2**22  # of a history that is read
LOSSES, ACCURACIES = {"loss": "training", "val_loss": "validation"}, {"val_accuracy": "validation"}


def learning_card(folder: Path, name: str) -> Sheet | None:
    """How a network was trained, epoch by epoch.

    Args:
        folder: folder of the bundle.
        name: name of the network.

    Returns:
        The card; one that says so if the history cannot be read, `None` if there is none.
    """
    path = folder / "history.csv"
    if not path.is_file():
        return None
    title = f"How {name} was trained"
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        rows = _rows(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Sheet(title, "not shown", sentences=[f"history.csv of {name} cannot be read: {error}"])
    curves = [(ylabel, columns) for ylabel, names in (("loss", LOSSES), ("accuracy", ACCURACIES))
              if (columns := {label: values for key, label in names.items() if (values := _column(rows, key))})]  # fmt: skip
    sentences = [
        f"{len(rows)} epoch{'s' if len(rows) > 1 else ''}, {sum(row.get('seconds', 0) for row in rows):.1f} s."
    ]
    losses = _column(rows, "val_loss")
    if losses:
        epoch, best = min(losses, key=lambda point: point[1])
        last = losses[-1][1]
        after = "the last" if epoch == losses[-1][0] else f"which the last one, {last:.4g}, no longer has"
        sentences.append(f"The lowest validation loss, {best:.4g}, is that of epoch {epoch:g}, {after}.")
    pictures = [Picture(_figure(curves), "Loss and accuracy by epoch.")] if curves else []
    return Sheet(title, "learning curve", sentences=sentences, pictures=pictures)


def _rows(text: str) -> list[dict[str, float]]:
    """Epochs with the numbers they have.

    Raises:
        ValueError: if it is no table of numbers with an epoch in each row.
    """
    rows = []
    for row in csv.DictReader(text.splitlines()):
        if None in row or None in row.values():
            raise ValueError("a row has another length than the first")
        rows.append({key: float(value) for key, value in row.items() if value})
    if not rows or not all(math.isfinite(row.get("epoch", math.nan)) for row in rows):
        raise ValueError("it has no numbered epochs")
    return rows


def _column(rows: list[dict[str, float]], key: str) -> list[tuple[float, float]]:
    """(epoch, value) of the epochs that have a finite value."""
    return [(row["epoch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]


def _figure(curves: list[tuple[str, dict[str, list[tuple[float, float]]]]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 2.8), layout="constrained", squeeze=False)
    for ax, (ylabel, lines) in zip(axes[0], curves, strict=True):
        for label, points in lines.items():
            ax.plot(*zip(*points, strict=True), marker="." if len(points) <= 30 else None, label=label)
        ax.set(xlabel="epoch", ylabel=ylabel)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend()
    return figure
