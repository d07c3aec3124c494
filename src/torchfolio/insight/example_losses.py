"""How the loss of a network is spread over examples, and which ones it gets most wrong: a panel of `inspect`.

Large losses are no opposing signals: those are found by the change of the loss in training, see `opposing_signals`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.data import Examples
from torchfolio.insight.training_record import losses_of
from torchfolio.measure import Panel, outputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["example_losses", "example_pictures"]

WORST = 12


def example_losses(
    model: nn.Module,
    data: Examples,
    classes: Sequence[str] = (),
    pictures: Tensor | None = None,
    texts: Sequence[str] = (),
) -> Panel:
    """The panel.

    Args:
        model: network, left as it was.
        data: examples (x, y) that it was not trained on, as it takes them.
        classes: names of its outputs.
        pictures: inputs as images in [0, 1], `[N, C, H, W]`, to show.
        texts: inputs in words, to show.

    Raises:
        ValueError: if there are no targets that the outputs fit, or losses are not finite.
    """
    import pandas as pd

    answers, targets = outputs(model, data).double(), data.targets
    if targets is None:
        raise ValueError("The losses of examples are not shown: it needs targets.")
    losses = losses_of(answers, targets.double() if targets.is_floating_point() else targets).numpy()
    if not np.isfinite(losses).all():
        raise ValueError(f"The losses of examples are not shown: that of example {int((~np.isfinite(losses)).argmax())} is not finite.")  # fmt: skip
    order = losses.argsort(kind="stable")[::-1]
    worst = order[: min(WORST, len(losses))]
    top = max(1, round(0.01 * len(losses)))
    share = losses[order[:top]].sum() / max(losses.sum(), 1e-300)
    record: dict[str, Any] = {
        "mean": float(losses.mean()),
        "median": float(np.median(losses)),
        "share_of_top_percent": float(share),
    }
    notes: list[str] = []
    labelled = not targets.is_floating_point()
    if labelled:
        answers = answers.softmax(1)
    rows, titles = _worst_rows(worst, answers, targets, losses, classes, texts)
    kind = "cross-entropy, nats" if labelled else "squared error"
    sentences = [
        f"Over {len(losses):,} examples the loss ({kind}) is {losses.mean():.3g} on average and {np.median(losses):.3g} for the "
        f"middle one. The {top} with the largest carr{'ies' if top == 1 else 'y'} {share:.0%} of it all"
        + (": a few outliers set the mean." if share > 0.1 else ": no few outliers set the mean.")
    ]
    if labelled:
        sentence, note, figures = _of_labels(answers, targets, losses)
        sentences.append(sentence)
        notes += note
        record |= figures
    if len(losses) < 100:
        notes.append(f"Among {len(losses)} examples the largest loss is an accident; take more (--examples).")
    shown = []
    if pictures is not None:
        shown = [(example_pictures(pictures[torch.as_tensor(worst.copy())], titles), "The examples with the largest loss: label, and what the network says.")]  # fmt: skip
    record["worst"] = [int(k) for k in worst]
    return Panel("Which examples does it get most wrong?", sentences, notes, [pd.DataFrame(rows)], shown, record,
                 f"losses of {len(losses):,} examples")  # fmt: skip


def _worst_rows(
    worst: np.ndarray,
    answers: Tensor,
    targets: Tensor,
    losses: np.ndarray,
    classes: Sequence[str],
    texts: Sequence[str],
) -> tuple[list[dict[str, object]], list[str]]:
    """Rows of the table of the worst examples, and titles of their pictures; `answers` are probabilities or values."""

    def name(label: int) -> str:
        return classes[label] if label < len(classes) else str(label)

    rows, titles = [], []
    for k in worst:
        row: dict[str, object] = {"example": int(k)}
        if targets.is_floating_point():
            row |= {"target": float(targets[k].reshape(-1)[0]), "network says": float(answers[k].reshape(-1)[0])}
            titles.append("")
        else:
            answer, true = int(answers[k].argmax()), int(targets[k])
            row |= {"label": name(true), "network says": name(answer), "with probability": float(answers[k, answer])}
            titles.append(f"{name(true)}\nnot {name(answer)}" if answer != true else name(true))
        row["loss"] = float(losses[k])
        if texts:
            row["text"] = texts[k] if len(texts[k]) <= 120 else f"{texts[k][:119]}…"
        rows.append(row)
    return rows, titles


def _of_labels(p: Tensor, targets: Tensor, losses: np.ndarray) -> tuple[str, list[str], dict[str, Any]]:
    """What probabilities say beside the losses: a sentence, a note where guessing does as well, and the figures."""
    errors = p.argmax(1) != targets
    wrong, sure = float(errors.double().mean()), int(((p.max(1).values > 0.9) & errors).sum())
    beyond = float((losses > math.log(p.shape[1])).mean())
    sentence = (
        f"{wrong:.1%} are classified wrongly, {_count(sure)} of them with a probability above 90 %; {beyond:.1%} would have "
        f"had a smaller loss if all {p.shape[1]} classes had got the same probability. Of examples at the top of the "
        "list look first whether the label is right."
    )
    notes = []
    common = float(targets.bincount().max()) / len(targets)
    spread = 2 * math.sqrt(common * (1 - common) / len(targets))
    if 1 - wrong < common + spread:
        notes.append(
            f"Always answering the most frequent label would be right for {common:.1%}, not much less often than the network: "
            "the rest of this page says little about what it learned."
        )
    return sentence, notes, {"wrong": wrong, "sure_and_wrong": sure, "worse_than_even": beyond}


def _count(count: int) -> str:
    return "none" if not count else "one" if count == 1 else f"{count:,}"


def example_pictures(images: Tensor, titles: Sequence[str], columns: int = 6) -> Figure:
    """Images `[N, C, H, W]` in [0, 1] side by side, a title each; of other channels than three the first is shown.

    Args:
        images: images to show.
        titles: one for each image.
        columns: maximum number of images in a row.
    """
    import matplotlib.pyplot as plt

    rows, across = -(-len(images) // columns), min(columns, len(images))
    fig, places = plt.subplots(rows, across, figsize=(1.25 * across, 1.55 * rows), layout="constrained", squeeze=False)
    for ax in places.flat:
        ax.axis("off")
    for ax, image, title in zip(places.flat, images.clamp(0, 1).float().cpu().numpy(), titles, strict=False):
        shown = image.transpose(1, 2, 0) if len(image) == 3 else image[0]
        ax.imshow(shown, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8)
    return fig
