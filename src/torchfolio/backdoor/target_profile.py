"""Which class do perturbations carry over to: a profile of the classes, the verdict from it, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchfolio.backdoor.inversion import perturbations
from torchfolio.backdoor.model_detector import ModelVerdict
from torchfolio.shown import Shown

__all__ = ["OUTLIER", "SHARE", "SmoothVerdict", "TargetProfile", "flagged", "outlier", "shown"]

OUTLIER, SHARE = 3.0, 0.5


@dataclass(frozen=True, repr=False)
class TargetProfile(Shown):
    """How far the perturbations towards each class carry over to other images.

    Attributes:
        scores: $a_t$, share of other images, not predicted $t$ before, that $\\delta_t$ sends to $t$, `[C]`.
        hits: number of those images, `[C]`.
        trials: number of images behind every share, `[C]`.
        outlier: $(a_t - \\text{median}) / (1.4826\\, \\text{MAD} + 0.02)$, `[C]`.
        target: class that stands out, or `None`.
        deltas: $\\delta_t$ from the first image, `[C, ...]`.
    """

    scores: Tensor
    hits: Tensor
    trials: Tensor
    outlier: Tensor
    target: int | None
    deltas: Tensor


@dataclass(frozen=True, repr=False)
class SmoothVerdict(ModelVerdict):
    """A verdict from a profile of the classes; `evidence` holds `share`, `low`, `high`, `others`, `runner_up`, `class`,
    `median`, and the tensors `profile` and `image`."""

    def sentences(self, classes: Sequence[str] = ()) -> list[str]:
        """The verdict in words; `classes` names the network's."""
        e = self.evidence
        name, second = (str(classes[e[k]]) if e[k] < len(classes) else str(e[k]) for k in ("class", "second"))
        word = "suspicious" if self.is_backdoored else "not suspicious"
        sentences = [
            f"The network is {word}: a perturbation towards the class {name}, drawn from {e['images']} image(s), sends "
            f"{_percent(e['share'])} ({_percent(e['low'])} to {_percent(e['high'])}, 95 % interval, {e['others']} images) of other "
            f"images there. The next class, {second}, gets {_percent(e['runner_up'])}, the median one "
            f"{_percent(e['median'])}.",
            f"A class is suspected where that share is at least {_percent(SHARE)} and lies more than {self.threshold:g} "
            f"deviations above the median; this one lies {e['outlier']:.2g} above.",
        ]
        if self.is_backdoored:
            sentences.append(
                f"Suspected target: {name}. Which classes are its sources is not known: all were taken. Small clean networks are "
                "called suspicious too now and then, where one direction carries over by nature: look at the picture."
            )
        else:
            sentences.append(
                "That is no proof that it has no backdoor: a trigger that is not added to images (a warp, say), or one larger "
                f"than the budget of {e['eps']:.3g}, is not drawn."
            )
        if not self.complete:
            sentences.append("The scan was cut short by its time limit and did not look at everything.")
        return sentences


def flagged(scores: Tensor, deviations: Tensor, t: int) -> bool:
    """Whether a class stands out of a profile."""
    return bool(deviations[t] > OUTLIER) and bool(scores[t] >= SHARE)


def outlier(scores: Tensor, tried: Tensor) -> Tensor:
    """Deviations above the median of the classes that were tried; those that were not are at 0."""
    known = scores[tried]
    if not len(known):
        return torch.zeros_like(scores)
    median = known.quantile(0.5)
    spread = 1.4826 * (known - median).abs().quantile(0.5) + 0.02
    return torch.where(tried, (scores - median) / spread, 0.0)


def shown(verdict: ModelVerdict, classes: Sequence[str]) -> list[tuple[Any, str]]:
    """The profile of the classes, and the perturbation of the one that leads."""
    import matplotlib.pyplot as plt

    profile, image = verdict.evidence["profile"], verdict.evidence["image"].cpu()
    best = verdict.evidence["class"]
    fig, ax = plt.subplots(figsize=(max(4, 0.4 * len(profile.scores)), 3), layout="constrained")
    ax.bar(
        range(len(profile.scores)),
        profile.scores.tolist(),
        color=["C3" if k == best else "C0" for k in range(len(profile.scores))],
    )
    ax.axhline(SHARE, c="k", ls="--")
    ax.set(ylabel="share of other images", ylim=(0, 1))
    ax.set_xticks(range(len(profile.scores)), [str(c) for c in classes][: len(profile.scores)], rotation=90)
    delta = profile.deltas[best].cpu()
    panel = perturbations([[image, (image + delta).clamp(0, 1), delta]], ["image", "with it", "perturbation"])
    return [
        (fig, "Share of other images that the perturbation towards each class sends there."),
        (
            panel,
            f"Perturbation towards {classes[best] if best < len(classes) else best}, on the image it was drawn from.",
        ),
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
