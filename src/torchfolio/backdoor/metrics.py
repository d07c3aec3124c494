"""What attacks, filters and defences are judged by, each defined once.

With a deployed predictor $f$, a clean test set $D$, its triggered part $D_p$ (samples that can be attacked), adversarial
labels $\\hat y$ and true labels $y$:

- **ACC** $= P_D(f(x) = y)$, **ASR** $= P_{D_p}(f(x') = \\hat y)$, **BACC** $= P_{D_p}(f(x') = y)$;
- with a filter $r$, 1 to reject: **C-REJ** and **B-REJ**, the mean of $r$ on $D$ and $D_p$;
  **PSR** $= P_D(f(x) = y \\wedge \\neg r)$; **DSR** $= P_{D_p}(f(x') = y \\vee r)$; filtered ASR
  $= P_{D_p}(f(x') = \\hat y \\wedge \\neg r)$.

All are shares in [0, 1], never percentages; of nothing they are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks, measure
from torchfolio.backdoor.poisoned_dataset import PoisonedDataset

__all__ = [
    "AttackMetrics",
    "FilterMetrics",
    "Stealth",
    "accuracy_of",
    "attack_metrics",
    "auroc",
    "defense_effectiveness",
    "filter_metrics",
    "labels_of",
    "stealth",
    "threshold_at_fpr",
    "tpr_at_fpr",
]


@dataclass(frozen=True)
class AttackMetrics:
    """ACC, ASR and BACC with the numbers of samples behind them."""

    acc: float
    asr: float
    bacc: float
    n_clean: int
    n_attacked: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class FilterMetrics:
    """What a filter does to clean and triggered inputs of a network."""

    c_rej: float
    b_rej: float
    psr: float
    dsr: float
    filtered_asr: float
    n_clean: int
    n_attacked: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Stealth:
    """How far triggered images are from their originals, means over images; `psnr` in decibels."""

    linf: float
    l2: float
    psnr: float
    ssim: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def labels_of(model: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 512) -> Tensor:
    """Predicted labels `[N]` on the CPU; a module is run in evaluation mode on its device and left as it was."""
    if not len(x):
        return torch.zeros(0, dtype=torch.int64)
    if isinstance(model, nn.Module):
        return measure.outputs(model, x, batch_size=batch_size).argmax(1)
    return torch.cat([model(part).argmax(1).cpu() for part in x.split(batch_size)])


def accuracy_of(model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    """Share of inputs that get the label `y` `[N]`."""
    return _share(labels_of(model, x) == y.cpu())


def attack_metrics(
    model: Callable[[Tensor], Tensor], clean: tuple[Tensor, Tensor], attacked: PoisonedDataset
) -> AttackMetrics:
    """ACC on a clean test set, ASR and BACC on its triggered part.

    Args:
        model: deployed function from images to outputs `[N, C]`.
        clean: images and labels.
        attacked: triggered samples of `poisoned_test`, which leaves out samples of the target class.

    Raises:
        ValueError: if the images or the network hold NaN: its label would be that of the first class.
    """
    x, y = clean
    checks.finite("the clean images", x)
    if isinstance(model, nn.Module):
        checks.network(model)
    triggered, target = attacked.tensors()
    predicted, labels = labels_of(model, triggered), labels_of(model, x)
    return AttackMetrics(
        _share(labels == y.cpu()), _share(predicted == target), _share(predicted == torch.from_numpy(attacked.y_true)),
        len(y), len(target),
    )  # fmt: skip


def filter_metrics(
    labels: Tensor,
    rejected: Tensor,
    y: Tensor,
    attacked_labels: Tensor,
    attacked_rejected: Tensor,
    attacked: PoisonedDataset,
) -> FilterMetrics:
    """C-REJ, B-REJ, PSR, DSR and filtered ASR.

    Args:
        labels: predictions on the clean test set `[N]`.
        rejected: mask of its samples that the filter rejects `[N]`.
        y: true labels `[N]`.
        attacked_labels: predictions on the triggered samples `[M]`.
        attacked_rejected: mask of those that the filter rejects `[M]`.
        attacked: triggered samples.
    """
    true, target = torch.from_numpy(attacked.y_true), torch.from_numpy(attacked.y)
    return FilterMetrics(
        _share(rejected), _share(attacked_rejected), _share((labels == y) & ~rejected),
        _share((attacked_labels == true) | attacked_rejected), _share((attacked_labels == target) & ~attacked_rejected),
        len(y), len(target),
    )  # fmt: skip


def auroc(negatives: Tensor, positives: Tensor) -> float:
    """$P(\\text{pos} > \\text{neg}) + \\frac12 P(=)$; NaN where a side is empty. Higher scores are more suspicious."""
    return measure.auroc(*_joined(negatives, positives)) if len(negatives) and len(positives) else math.nan


def tpr_at_fpr(negatives: Tensor, positives: Tensor, fpr: float) -> float:
    """Share of positives above `threshold_at_fpr` of the negatives; NaN where a side is empty."""
    if not len(negatives) or not len(positives):
        return math.nan
    return measure.tpr_at_fpr(*_joined(negatives, positives), fpr)


def threshold_at_fpr(negatives: Tensor, fpr: float) -> float:
    """Smallest observed score that at most a share `fpr` of the negatives lies above; see `torchfolio.measure`."""
    return measure.threshold_at_fpr(negatives, fpr)


def _joined(negatives: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.cat([negatives.double(), positives.double()])
    return scores, torch.cat([torch.zeros(len(negatives)), torch.ones(len(positives))])


def defense_effectiveness(before: AttackMetrics, after: AttackMetrics) -> float:
    """$\\mathrm{DER} = \\frac12 (\\max(0, \\Delta \\mathrm{ASR}) - \\max(0, \\Delta \\mathrm{ACC}) + 1)$, with
    $\\Delta$ = before - after.

    Reference:
        Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023.
    """
    return (max(0.0, before.asr - after.asr) - max(0.0, before.acc - after.acc) + 1) / 2


def stealth(x: Tensor, triggered: Tensor) -> Stealth:
    """Distances of triggered images from their originals, `[N, C, H, W]` in [0, 1].

    SSIM has the usual constants, a Gaussian window of 11x11 pixels and deviation 1.5 (smaller where images are).

    Reference:
        Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004.
    """
    if x.shape != triggered.shape or x.dim() != 4:
        raise ValueError(
            f"expected images of one shape [N, C, H, W], got {tuple(x.shape)} and {tuple(triggered.shape)}"
        )
    if not len(x):
        return Stealth(math.nan, math.nan, math.nan, math.nan)
    difference = (triggered - x).double().flatten(1)
    mse = difference.square().mean(1)
    psnr = -10 * mse.log10()
    return Stealth(
        float(difference.abs().amax(1).mean()), float(difference.norm(dim=1).mean()), float(psnr.mean()),
        float(_ssim(x.double(), triggered.double()).mean()),
    )  # fmt: skip


def _ssim(a: Tensor, b: Tensor) -> Tensor:
    size = min(11, a.shape[-1], a.shape[-2])
    size -= 1 - size % 2
    line = torch.exp(-((torch.arange(size, dtype=a.dtype, device=a.device) - size // 2) ** 2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    window = window.expand(a.shape[1], 1, size, size)

    def mean(t: Tensor) -> Tensor:
        return F.conv2d(t, window, groups=t.shape[1])

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return ratio.flatten(1).mean(1)


def _share(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else math.nan
