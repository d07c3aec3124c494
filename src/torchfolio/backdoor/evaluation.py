"""Attacks, detectors and defences judged in one call each; see `torchfolio.backdoor.metrics`.

Networks are left as they were found, whatever is judged: modes, `requires_grad`, running statistics, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.input_detector import InputDetector
from torchfolio.backdoor.metrics import (
    AttackMetrics,
    FilterMetrics,
    attack_metrics,
    auroc,
    defense_effectiveness,
    filter_metrics,
    labels_of,
    tpr_at_fpr,
)
from torchfolio.backdoor.model_detector import ModelDetector
from torchfolio.backdoor.poisoned_dataset import PoisonedDataset
from torchfolio.measure import untouched

__all__ = [
    "DefenseReport",
    "DetectorReport",
    "ModelReport",
    "evaluate_attack",
    "evaluate_defense",
    "evaluate_input_detector",
    "evaluate_model_detector",
]


def _left_alone(model: object) -> AbstractContextManager[None]:
    return untouched(model) if isinstance(model, nn.Module) else nullcontext()


def evaluate_attack(
    model: Callable[[Tensor], Tensor], clean: tuple[Tensor, Tensor], attacked: PoisonedDataset
) -> AttackMetrics:
    """ACC, ASR and BACC of a deployed network; see `torchfolio.backdoor.metrics`."""
    return attack_metrics(model, clean, attacked)


@dataclass(frozen=True)
class DetectorReport:
    """How well an input detector works on a network.

    `auroc` and `tpr` (at `fpr` on the test negatives) count clean inputs that are classified right against triggered
    inputs that reach the attacker's label; `auroc_all` counts all of both. `tpr_held_out` and `fpr_held_out` are at the
    detector's own threshold, which comes from clean inputs held out in `fit`.
    """

    auroc: float
    auroc_all: float
    tpr: float
    tpr_held_out: float
    fpr_held_out: float
    filter: FilterMetrics
    n_negatives: int
    n_positives: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_input_detector(
    detector: InputDetector,
    model: nn.Module,
    clean: tuple[Tensor, Tensor],
    attacked: PoisonedDataset,
    *,
    fpr: float = 0.01,
    successful_only: bool = True,
) -> DetectorReport:
    """Judge a fitted input detector.

    Args:
        detector: fitted on `model`.
        model: network that is deployed.
        clean: test images and labels, seen by neither network nor detector.
        attacked: triggered test images, of `poisoned_test`.
        fpr: false-positive rate of thresholds.
        successful_only: negatives are clean inputs that are classified right, positives triggered inputs that
            reach the attacker's label; otherwise all of them.
    """
    x, y = clean
    checks.finite("the clean images", x)
    triggered, target = attacked.tensors()
    labels, attacked_labels = labels_of(model, x), labels_of(model, triggered)
    with _left_alone(model):
        negatives, positives = detector.score(x).cpu(), detector.score(triggered).cpu()
        own, own_attacked = detector.predict(x, fpr).cpu(), detector.predict(triggered, fpr).cpu()
    right = labels == y if successful_only else torch.ones_like(labels, dtype=torch.bool)
    reached = attacked_labels == target if successful_only else torch.ones_like(target, dtype=torch.bool)
    return DetectorReport(
        auroc(negatives[right], positives[reached]),
        auroc(negatives, positives),
        tpr_at_fpr(negatives[right], positives[reached], fpr),
        float(own_attacked[reached].double().mean()),
        float(own[right].double().mean()),
        filter_metrics(labels, own, y, attacked_labels, own_attacked, attacked),
        int(right.sum()),
        int(reached.sum()),
    )


@dataclass(frozen=True)
class ModelReport:
    """How well a model detector tells backdoored networks from clean ones."""

    accuracy: float
    tpr: float
    fpr: float
    auroc: float
    n_clean: int
    n_backdoored: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate_model_detector(
    detector: ModelDetector, models: Sequence[tuple[nn.Module, bool]], clean: Any | None = None
) -> ModelReport:
    """Scan a population of networks whose truth is known, `(network, is_backdoored)`."""
    verdicts = []
    for model, _ in models:
        with _left_alone(model):
            verdicts.append(detector.scan(model, clean))
    truth = torch.tensor([bad for _, bad in models])
    decisions = torch.tensor([v.is_backdoored for v in verdicts])
    scores = torch.tensor([v.score for v in verdicts], dtype=torch.float64)
    hits = (decisions == truth).double()
    return ModelReport(
        float(hits.mean()), float(decisions[truth].double().mean()), float(decisions[~truth].double().mean()),
        auroc(scores[~truth], scores[truth]), int((~truth).sum()), int(truth.sum()),
    )  # fmt: skip


@dataclass(frozen=True)
class DefenseReport:
    """A defended network beside an undefended one; `filter` where the defended one can reject inputs."""

    before: AttackMetrics
    after: AttackMetrics
    effectiveness: float
    filter: FilterMetrics | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_defense(
    undefended: nn.Module, defended: nn.Module, clean: tuple[Tensor, Tensor], attacked: PoisonedDataset
) -> DefenseReport:
    """Judge a defence: the network as it is deployed, against one that was trained without.

    If `defended` has a method `filter(x) -> (labels, rejected)` its figures are added.
    """
    before, after = attack_metrics(undefended, clean, attacked), attack_metrics(defended, clean, attacked)
    rejecting: Any = getattr(defended, "filter", None)
    isolation = None
    if rejecting is not None:
        x, y = clean
        with _left_alone(defended):
            labels, rejected = rejecting(x)
            attacked_labels, attacked_rejected = rejecting(attacked.tensors()[0])
        isolation = filter_metrics(labels, rejected, y, attacked_labels, attacked_rejected, attacked)
    return DefenseReport(before, after, defense_effectiveness(before, after), isolation)
