"""What one detector says of a network's inputs (a filter) or of the network itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn

    from torchfolio.backdoor.input_detector import InputDetector
    from torchfolio.backdoor.model_detector import ModelDetector
    from torchfolio.bundle import Bundle

__all__ = ["Part", "fit_filter", "judge_network"]


@dataclass(frozen=True)
class Part:
    """What one method says of the inputs (a filter) or of the network (a verdict)."""

    slug: str
    kind: Literal["inputs", "model"]
    report: dict[str, Any]
    pictures: list[tuple[Any, str]]
    notes: list[str] = field(default_factory=list)


Report = tuple[dict[str, Any], list[tuple[Any, str]]]


def judge_network(
    detector: ModelDetector,
    source: Bundle,
    clean: tuple[Tensor, Tensor] | None,
    classes: Sequence[str],
    seed: int,
    budget: float | None,
) -> Report:
    """What a detector of backdoored networks says, and its pictures."""
    model = source.model
    if detector.pixels and clean is not None:
        model, clean = _on_pixels(source, clean)
    verdict = detector.scan(model, clean, seed=seed, budget_seconds=budget)
    report = {
        "suspicious": verdict.is_backdoored, "score": verdict.score, "threshold": verdict.threshold,
        "pairs": [list(pair) for pair in verdict.pairs], "complete": verdict.complete,
        "evidence": {k: v for k, v in verdict.evidence.items() if isinstance(v, int | float | str)},
        "sentences": verdict.sentences(classes),
    }  # fmt: skip
    return report, detector.pictures(verdict, classes)


def _on_pixels(source: Bundle, clean: tuple[Tensor, Tensor]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The network with its normalisation in front, and the examples as images in [0, 1]."""
    import torch
    from torch import nn

    from torchfolio.backdoor.zoo import Normalize
    from torchfolio.models.device import device_of

    mean, std = source.manifest.mean, source.manifest.std
    x, y = clean
    if mean:
        shape = (1, -1, *[1] * (x.dim() - 2))
        x = x * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
        # What normalising and going back has lost of 0 and 1.
        x = torch.where((x > -1e-4) & (x < 1 + 1e-4), x.clamp(0, 1), x)
        place = device_of(source.model, x)
        return nn.Sequential(Normalize(mean, std).to(place), source.model), (x, y)
    return source.model, clean


def fit_filter(detector: InputDetector, source: Bundle, clean: tuple[Tensor, Tensor], classes: Sequence[str]) -> Report:
    """What a fitted filter of inputs promises, and its pictures. That it was fitted says nothing about the network."""
    from torchfolio.backdoor.audit import false_positives
    from torchfolio.backdoor.concentration import percent

    detector.fit(source.model, clean)
    share = false_positives(detector.calibration_, detector.threshold_)
    report: dict[str, Any] = {
        "suspicious": False, "threshold": detector.threshold_, "calibration_examples": share.n,
        "false_positives": {"expected": share.expected, "low": share.low, "high": share.high, "level": share.level},
        "figures": detector.figures(),
        "sentences": [
            "The filter is ready. Whether the network has a backdoor cannot be told from clean examples alone.",
            f"Of clean inputs that the network gets right, the filter will reject about {percent(share.expected)} "
            f"({percent(share.low)} to {percent(share.high)}, 95 % interval from {share.n} held-out examples), if they "
            "are like the clean examples. How many triggered inputs it catches is not known: none was seen.",
            *detector.remarks(clean[0], classes),
        ],
    }  # fmt: skip
    return report, [_histogram(detector), *detector.pictures(clean[0], classes)]


def _histogram(detector: InputDetector) -> tuple[Any, str]:
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(5, 3.2), layout="constrained")
    # A few clean inputs score so low that they would squeeze all others.
    scores = detector.calibration_.double()
    ax.hist(scores.clamp_min(float(scores.quantile(0.1))).numpy(), bins=40)
    ax.axvline(detector.threshold_, c="k", ls="--")
    ax.set(xlabel="suspicion", ylabel="clean examples")
    return fig, "Scores of held-out clean examples (the lowest tenth at its edge), and the threshold."
