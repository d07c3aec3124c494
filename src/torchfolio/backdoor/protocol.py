"""One way to call every attack, detector and defence, so that one can stand in for another.

These are `typing.Protocol`s: any class with these methods fits, no base class is needed. Scores are higher for what is
more suspicious. All leave the network as they found it: modes, `requires_grad`, running statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

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
from torchfolio.backdoor.poison import PoisonedDataset

__all__ = [
    "Attack",
    "DefenseReport",
    "DetectorReport",
    "InputDetector",
    "InvertedTrigger",
    "ModelDetector",
    "ModelReport",
    "ModelVerdict",
    "TrainingDefense",
    "TriggerInverter",
    "evaluate_attack",
    "evaluate_defense",
    "evaluate_input_detector",
    "evaluate_model_detector",
]


@runtime_checkable
class InputDetector(Protocol):
    """Tells triggered inputs of a network from clean ones."""

    def fit(self, model: nn.Module, clean: Any) -> InputDetector:
        """Get ready on clean examples, a part of which is held out to calibrate the threshold."""
        ...

    def score(self, x: Tensor) -> Tensor:
        """Suspicion `[N]` of inputs `[N, ...]`."""
        ...

    def threshold(self, fpr: float) -> float:
        """The score above which at most a share `fpr` of held-out clean inputs lies."""
        ...

    def predict(self, x: Tensor, fpr: float | None = None) -> Tensor:
        """Which inputs are rejected, bool `[N]`."""
        ...


@dataclass(frozen=True)
class ModelVerdict:
    """What a detector says about a network.

    Attributes:
        is_backdoored: the verdict.
        score: how suspicious the network is.
        threshold: what the score was compared with.
        pairs: `(source, target)` classes that are suspected.
        trigger: what was recovered of it.
        evidence: figures behind the verdict.
    """

    is_backdoored: bool
    score: float
    threshold: float
    pairs: tuple[tuple[int, int], ...] = ()
    trigger: Any = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class ModelDetector(Protocol):
    """Says whether a network has a backdoor."""

    def scan(self, model: nn.Module, clean: Any | None = None) -> ModelVerdict: ...


@dataclass(frozen=True)
class InvertedTrigger:
    """A trigger recovered from a network.

    Attributes:
        delta: what is added to an image.
        mask: where; `None` is everywhere.
        asr: from (model, images) to the share that the trigger sends to the target.
    """

    delta: Tensor
    mask: Tensor | None
    asr: Callable[[nn.Module, Tensor], float]


@runtime_checkable
class TriggerInverter(Protocol):
    """Recovers a trigger from a network."""

    def invert(self, model: nn.Module, x: Tensor, target: int) -> InvertedTrigger: ...


@runtime_checkable
class TrainingDefense(Protocol):
    """Makes training on data that may be poisoned safe."""

    def prepare(self, dataset: Any, *, clean: Any = None, seed: int = 0) -> Dataset:
        """The data to train on."""
        ...

    def wrap(self, model: nn.Module) -> nn.Module:
        """The network to deploy."""
        ...


@runtime_checkable
class Attack(Protocol):
    """Makes a trigger, and data poisoned by it."""

    trigger: nn.Module

    def fit(self, *args: Any, **kwargs: Any) -> Attack: ...

    def poison(self, dataset: Any, seed: int) -> PoisonedDataset: ...


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
        model: the network that is deployed.
        clean: test images and labels, seen by neither network nor detector.
        attacked: triggered test images, of `poisoned_test`.
        fpr: false-positive rate of thresholds.
        successful_only: negatives are clean inputs that are classified right, positives triggered inputs that
            reach the attacker's label; otherwise all of them.
    """
    x, y = clean
    triggered, target = attacked.tensors()
    labels, attacked_labels = labels_of(model, x), labels_of(model, triggered)
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
    verdicts = [detector.scan(model, clean) for model, _ in models]
    truth = torch.tensor([bad for _, bad in models])
    said = torch.tensor([v.is_backdoored for v in verdicts])
    scores = torch.tensor([v.score for v in verdicts], dtype=torch.float64)
    hits = (said == truth).double()
    return ModelReport(
        float(hits.mean()), float(said[truth].double().mean()), float(said[~truth].double().mean()),
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
    found = None
    if rejecting is not None:
        x, y = clean
        labels, rejected = rejecting(x)
        attacked_labels, attacked_rejected = rejecting(attacked.tensors()[0])
        found = filter_metrics(labels, rejected, y, attacked_labels, attacked_rejected, attacked)
    return DefenseReport(before, after, defense_effectiveness(before, after), found)
