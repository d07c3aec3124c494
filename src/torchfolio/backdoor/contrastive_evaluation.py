"""Attacks on encoders that were trained without labels, judged by a probe on their features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import measure
from torchfolio.backdoor.attacker_data import labelled_images

__all__ = ["SSLReport", "evaluate_ssl_backdoor"]


@dataclass(frozen=True)
class SSLReport:
    """A probe on an encoder's features, and how they lie.

    Attributes:
        accuracy: accuracy of the probe on clean test images.
        asr: share of triggered test images of other classes that the probe takes for the target.
        alignment: mean cosine of triggered images' features with the mean direction of the target's.
        uniformity: $\\log \\mathbb{E} \\exp(-2 \\lVert f(x) - f(x') \\rVert^2)$ of clean test images; lower is more uniform.
    """

    accuracy: float
    asr: float
    alignment: float
    uniformity: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def evaluate_ssl_backdoor(
    encoder: nn.Module,
    train: Any,
    test: Any,
    trigger: Callable[[Tensor], Tensor],
    target: int,
    *,
    probe: Callable[..., float] | None = None,
) -> SSLReport:
    """Judge an attack on a pretrained encoder by a probe that is trained on clean labelled images.

    Args:
        encoder: network from images to features, left as it was.
        train: clean images and labels of the probe.
        test: clean images and labels.
        trigger: trigger of the attack.
        target: class that triggered images are to be taken for.
        probe: `(features, y, test_features, test_y) -> accuracy` on features of length 1, such as `linear_probe` or
            `knn_accuracy` of `torchfolio.measure`; by default a logistic regression on them as they are.

    Raises:
        ValueError: on an encoder that does not give `[N, d]`, or test images of the target class alone.
    """
    (x, y), (x_test, y_test) = labelled_images(train), labelled_images(test)
    other = y_test != target
    if not bool(other.any()):
        raise ValueError(f"expected test images of other classes than {target}, got none")
    with torch.no_grad():
        triggered = trigger(x_test[other])
    f, f_test, f_triggered = (_features(encoder, part) for part in (x, x_test, triggered))
    wanted, probe = torch.full((int(other.sum()),), target), probe or _logistic
    centre = F.normalize(f[y == target].mean(0), dim=0)
    return SSLReport(
        probe(f, y, f_test, y_test), probe(f, y, f_triggered, wanted), float((f_triggered @ centre).mean()),
        float((-2 * torch.pdist(f_test).square()).exp().mean().log()),
    )  # fmt: skip


def _logistic(features: Tensor, y: Tensor, test_features: Tensor, test_y: Tensor) -> float:
    """Accuracy of a logistic regression without standardising, which would undo the lengths of directions."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=1000).fit(features.numpy(), y.numpy())
    return float(probe.score(test_features.numpy(), test_y.numpy()))


def _features(encoder: nn.Module, x: Tensor) -> Tensor:
    features = measure.outputs(encoder, x)
    if features.dim() != 2:
        raise ValueError(f"expected an encoder that gives features [N, d], got {tuple(features.shape)}")
    return F.normalize(features.cpu(), dim=1)
