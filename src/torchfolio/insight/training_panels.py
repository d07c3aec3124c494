"""How a training went: its sharpness against the step size, and the examples whose loss moved most.

The panels of `inspect` for what `torchfolio train --record` leaves; what cannot be told the panels say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchfolio.insight.example_losses import example_pictures
from torchfolio.insight.opposing_signals import OpposingGroups, find_groups
from torchfolio.insight.training_record import TrainingRecord, step_limits
from torchfolio.measure import Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["group_panel", "sharpness_panel"]

SHOWN_PICTURES = 6
SPIKE = 0.02  # rise of the mean loss, of itself, below which there is nothing to explain
OPPOSED = -0.3  # correlation above which two groups cannot be said to oppose each other
ADVICE = "Train again with --record to see it."
TITLE, EYEBROW = "Was it at the edge of stability?", "sharpness, the largest eigenvalue of the Hessian"
MEANING = (
    "Gradient descent with step size lr diverges along a direction whose curvature is above 2 / lr: a loss that spikes "
    "there asks for a smaller step."
)


def sharpness_panel(record: TrainingRecord | None, training: Mapping[str, Any], last: float = math.nan) -> Panel:
    """The sharpness on the way against the largest that the step size allows.

    Args:
        record: record of the training, where there is one.
        training: record of a bundle.
        last: sharpness of the trained network, where there is no record.

    Raises:
        ValueError: if nothing is known of it.
    """
    import pandas as pd

    if record is None:
        return _last_sharpness(training, last)
    sharp, lr = np.asarray(record.sharpness), np.asarray(record.lr)
    if not np.isfinite(sharp).any():
        raise ValueError("Its sharpness is not shown: the network has no second derivative.")
    descent = "sgd" in record.optimizer.lower()
    limits = np.array([step_limits(v, record.momentum, record.nesterov) for v in lr])
    table = pd.DataFrame({"step": record.measured, "learning rate": lr, "sharpness": sharp})
    sentences = []
    if descent:
        table["2 / lr"] = limits[:, 0]
        if record.momentum:
            table[f"limit with momentum {record.momentum:g}"] = limits[:, 1]
        table["share of the limit"] = sharp / limits[:, 1]
        sentences.append(_nearest_to_limit(record, sharp, limits[:, 1]))
        sentences.append(MEANING + " Steps on small batches can already be unstable at a fraction of it.")
    else:
        sentences.append(
            f"The sharpness went from {sharp[0]:.3g} to {sharp[-1]:.3g}. {record.optimizer} scales each direction by itself, so "
            "that 2 / lr is no limit for it, and the sharpness does not tell whether its steps were stable."
        )
    notes = [
        f"Estimated over {record.followed} training examples, without dropout, with batch norm by these examples; that of the "
        "whole set is another, of the same order."
    ]
    if not np.isfinite(sharp).all():
        notes.append("Where a figure is missing the curvature could not be computed.")
    pictures = []
    if np.isfinite(sharp).sum() > 2:
        fig = _sharpness_figure(record, sharp, limits if descent else None)
        pictures = [(fig, "Sharpness over the training" + (", and what the step size allows." if descent else "."))]
    figures = {"steps": list(record.measured), "sharpness": sharp.tolist(), "lr": lr.tolist(), "limit": limits[:, 1].tolist() if descent else []}  # fmt: skip
    return Panel(TITLE, sentences, notes, [table], pictures, figures, EYEBROW)


def _last_sharpness(training: Mapping[str, Any], last: float) -> Panel:
    """The panel of a training that was not recorded."""
    if not math.isfinite(last):
        raise ValueError(f"Its sharpness is not shown: it was not recorded, and the network has no second derivative. {ADVICE}")  # fmt: skip
    lr, optimizer, meaning = training.get("lr"), training.get("optimizer"), MEANING
    sentence = f"At its last weights the sharpness is {last:.3g}"
    if optimizer and optimizer != "sgd":
        meaning = f"{optimizer} scales each direction by itself, so that the sharpness does not tell whether its steps were stable."
    if isinstance(lr, int | float) and not isinstance(lr, bool) and lr > 0 and optimizer == "sgd":
        sentence += f"; at the largest learning rate of its schedule, {lr:g}, the limit 2 / lr is {2 / lr:.3g}"
        if training.get("schedule") != "constant":
            sentence += ", but the network ends at a far smaller one, with a far higher limit"
    notes = [
        f"What it was on the way, where the steps were large, cannot be told from the bundle: nothing was recorded. {ADVICE}"
    ]
    return Panel(TITLE, [sentence + ".", meaning], notes, record={"last": last}, eyebrow=EYEBROW)


def _nearest_to_limit(record: TrainingRecord, sharp: np.ndarray, limits: np.ndarray) -> str:
    """One sentence on the step at which the sharpness came nearest to its limit."""
    ratio = sharp / limits
    most = int(np.nanargmax(ratio))
    if ratio[most] > 2:
        verdict = "far beyond it, where gradient descent throws the network about until it finds a flatter place"
    elif ratio[most] > 0.8:
        verdict = "there training is at the edge of stability, and the step size decides how sharp the network becomes"
    else:
        verdict = "the steps were small enough, and a spike of the loss has another cause"
    figures = f"{sharp[most]:.4g} against {limits[most]:.4g}"
    return f"The sharpness came nearest to its limit at step {record.measured[most]}: {figures}: {verdict}."


def _sharpness_figure(record: TrainingRecord, sharp: np.ndarray, limits: np.ndarray | None) -> Figure:
    """The sharpness by step, with the limits without and with momentum `[steps, 2]`."""
    fig, ax = _axes("step", "sharpness")
    ax.plot(record.measured, sharp, marker="o", label="sharpness")
    if limits is not None:
        ax.plot(record.measured, limits[:, 0], c="k", ls="--", label="2 / lr")
        if record.momentum:
            ax.plot(record.measured, limits[:, 1], c="grey", ls=":", label=f"limit with momentum {record.momentum:g}")
    if (sharp[np.isfinite(sharp)] > 0).all():
        ax.set_yscale("log")
    ax.legend()
    return fig


def group_panel(
    record: TrainingRecord, classes: Sequence[str] = (), pictures: Tensor | None = None, texts: Sequence[str] = ()
) -> Panel:
    """The examples whose loss moved most at the spike of the mean loss, or where it first rose if there is none.

    Args:
        record: record of the training.
        classes: names of the labels.
        pictures: followed examples as images in [0, 1], `[n, C, H, W]`, to show.
        texts: followed examples in words, to show.

    Raises:
        ValueError: if the losses are too few or not finite.
    """
    import pandas as pd

    if record.losses.shape[0] < 3 or record.losses.shape[1] < 20:
        raise ValueError(
            "Which examples moved the loss is not shown: fewer than 3 moments or 20 examples were recorded."
        )
    means = record.losses.mean(1)
    rises = np.diff(means) / np.maximum(means[:-1], 1e-300)
    # Steps on batches make the loss rise a little all the time: the spike is the largest rise.
    spike = bool(rises.max() >= SPIKE) if np.isfinite(rises).all() else False
    groups = find_groups(record.losses, step=int(np.diff(means).argmax()) if spike else None)
    here, there = record.steps[groups.step], record.steps[groups.step + 1]
    k, n = len(groups.positive), record.losses.shape[1]
    follows = groups.step + 2 < len(record.steps)
    table = pd.DataFrame([_group(record, groups, name, m, classes, follows)
                          for name, m in (("rose", groups.positive), ("fell", groups.negative))])  # fmt: skip
    sentences = _group_sentences(record, groups, rises, spike)
    gap = there - here
    notes = []
    if gap > 1:
        notes.append(f"Losses were recorded every {gap} steps; a swing from one step to the next is not seen.")
    notes.append("How far the gradients of the groups oppose each other, and how much of the sharpness they own, cannot be told from losses alone: torchfolio.insight.trace and measure_groups do so for training by full batches.")  # fmt: skip
    figures = [
        (_swings(record, groups), "Mean loss of all followed examples and of the two groups; the line marks the step.")
    ]
    if pictures is not None:
        both = np.concatenate([g[:SHOWN_PICTURES] for g in (groups.positive, groups.negative)])
        titles = [_class(record.targets[m], classes) for m in both]
        drawn = example_pictures(pictures[torch.as_tensor(both)], titles, columns=min(k, SHOWN_PICTURES))
        figures.append((drawn, "Above those whose loss rose most, below those whose loss fell most."))
    tables = [table]
    if texts:
        tables.append(pd.DataFrame([{"loss": label, "label": _class(record.targets[m], classes), "text": texts[m][:140]}
                                    for label, g in (("rose", groups.positive), ("fell", groups.negative)) for m in g[:SHOWN_PICTURES]]))  # fmt: skip
    summary = {"step": here, "instability": groups.instability, "opposition": groups.opposition,
               "concentration": groups.concentration, "positive": groups.positive.tolist(), "negative": groups.negative.tolist()}  # fmt: skip
    return Panel(
        "Which examples moved its loss?",
        sentences,
        notes,
        tables,
        figures,
        summary,
        f"opposing signals, {n} examples",
    )


def _group_sentences(record: TrainingRecord, groups: OpposingGroups, rises: np.ndarray, spike: bool) -> list[str]:
    """Who moved, by how much of the whole, and whether the two groups pull against each other."""
    here, there = record.steps[groups.step], record.steps[groups.step + 1]
    k, n = len(groups.positive), record.losses.shape[1]
    usual = max(1, round(0.02 * n)) / n
    sentences = [
        f"Of {n} training examples that were followed, {k} whose loss rose most between steps {here} and {there} are compared "
        f"with the {k} whose loss fell most there"
        + (f", where the mean loss rose most, by {rises[groups.step]:.0%}." if spike else ".")
        + f" The 2 % of examples that moved most carry {groups.concentration:.0%} of all change"
        + (f", {groups.concentration / usual:.1f} times their share." if usual else ".")
    ]
    if not groups.instability:
        sentences.append("No instability was seen: the mean loss never rose. The groups are those of the step with the most uneven changes, and stand behind no spike.")  # fmt: skip
    elif not spike:
        sentences.append(f"The mean loss never rose by more than {rises.max():.2%} of itself, which is no spike: take the groups for examples that the network wavers about.")  # fmt: skip
    if not math.isfinite(groups.opposition):
        sentences.append("Whether the two pull against each other cannot be told from so few moments.")
    elif groups.opposition < OPPOSED:
        sentences.append(
            f"Over the training their changes go against each other (correlation {groups.opposition:.2f}): what helps one hurts "
            "the other. Look at what the pictures or texts of a group have in common; it is what the network swings about."
        )
    else:
        sentences.append(
            f"Over the training their changes do not go against each other (correlation {groups.opposition:.2f}; opposing groups "
            "have one near -1): these are examples that are hard or were drawn lately, and no opposing signals."
        )
    return sentences


def _group(
    record: TrainingRecord,
    groups: OpposingGroups,
    name: str,
    members: np.ndarray,
    classes: Sequence[str],
    follows: bool,
) -> dict[str, Any]:
    """A row of the table."""
    counts = Counter(_class(record.targets[m], classes) for m in members)
    most = ", ".join(f"{label} {count}" for label, count in counts.most_common(3) if label)
    rows = record.losses[:, members].mean(1)
    t = groups.step
    row: dict[str, Any] = {"group": f"loss {name}", "examples": len(members)}
    if most:
        row["most frequent labels"] = most
    return row | {"loss before": float(rows[t]), "change": float(rows[t + 1] - rows[t]),
                  "change after that": float(rows[t + 2] - rows[t + 1]) if follows else math.nan}  # fmt: skip


def _class(target: float, classes: Sequence[str]) -> str:
    return classes[int(target)] if classes and float(target).is_integer() and 0 <= target < len(classes) else ""


def _swings(record: TrainingRecord, groups: OpposingGroups) -> Figure:
    fig, ax = _axes("step", "loss")
    ax.plot(record.steps, record.losses.mean(1), c="k", label="all")
    for label, members in (("whose loss rose", groups.positive), ("whose loss fell", groups.negative)):
        ax.plot(record.steps, record.losses[:, members].mean(1), alpha=0.8, label=label)
    ax.axvline(record.steps[groups.step], c="grey", lw=1, ls=":")
    ax.legend()
    return fig


def _axes(xlabel: str, ylabel: str) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3)
    return fig, ax
