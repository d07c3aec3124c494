"""Scores of predictions: accuracy, calibration, ranking."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, y: Tensor, *, top: int = 1) -> float:
    """Share of examples whose label is among the `top` largest outputs.

    Args:
        logits: `[N, C]`.
        y: labels `[N]`.
        top: number of outputs that count.

    Raises:
        ValueError: on shapes that do not fit, no examples, NaN, or labels out of range.
    """
    logits, y = _checked(logits, y)
    if not 1 <= top <= logits.shape[1]:
        raise ValueError(f"expected top between 1 and {logits.shape[1]}, got {top}")
    return (logits.topk(top, dim=1).indices == y[:, None]).any(1).double().mean().item()


def calibration_error(probabilities: Tensor, y: Tensor, *, bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error of the predicted class, in [0, 1]:

    $$\\mathrm{ECE} = \\sum_b \\frac{n_b}{N} \\lvert \\mathrm{acc}(b) - \\mathrm{conf}(b) \\rvert.$$

    Args:
        probabilities: `[N, C]`, rows that sum to 1.
        y: labels `[N]`.
        bins: number of bins of the confidence.
        adaptive: bins of equal counts in place of equal widths.

    Raises:
        ValueError: on shapes that do not fit, no examples, rows that are no probabilities, or no bin.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3; adaptive: Nguyen,
        O'Connor, "Posterior calibration and exploratory analysis for natural language processing models",
        EMNLP 2015.
    """
    probabilities, y = _checked(probabilities, y)
    rounding = torch.finfo(probabilities.dtype).eps if probabilities.is_floating_point() else 0
    probabilities = probabilities.double()
    sums = probabilities.sum(1)
    if probabilities.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=max(1e-3, rounding)):
        raise ValueError("expected rows of probabilities that sum to 1; apply softmax to logits first")
    if bins < 1:
        raise ValueError(f"expected at least one bin, got {bins}")
    confidence, predicted = probabilities.max(1)
    gap = (predicted == y).double() - confidence
    if adaptive:
        order = confidence.argsort(stable=True)
        index = torch.empty_like(order)
        index[order] = torch.arange(len(y), device=y.device) * bins // len(y)
    else:
        index = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)  # a bin holds its upper edge
    difference = torch.zeros(bins, dtype=torch.float64, device=gap.device).index_add_(0, index, gap)
    return (difference.abs().sum() / len(y)).item()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: `[N]`, larger for positives.
        positive: `[N]`, 0 or 1.

    Raises:
        ValueError: on shapes that do not fit, NaN, labels other than 0 and 1, or a single class.
    """
    negatives, positives = _split(scores, positive)
    ordered = negatives.sort().values
    below = torch.searchsorted(ordered, positives, right=False)
    not_above = torch.searchsorted(ordered, positives, right=True)
    # Counts are whole numbers, so that the result is exact up to one division.
    return (below.sum() + not_above.sum()).item() / (2 * len(negatives) * len(positives))


def roc_curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """False-positive rates, true-positive rates and the thresholds that give them by `score >= threshold`.

    Args:
        scores: `[N]`, larger for positives.
        positive: `[N]`, 0 or 1.

    Returns:
        Three float64 tensors `[T]`, one point for each distinct score, thresholds falling from infinity.

    Raises:
        ValueError: see `auroc`.
    """
    negatives, positives = _split(scores, positive)
    observed = torch.cat([negatives, positives]).unique().flip(0).double()
    infinity = torch.full((1,), torch.inf, dtype=observed.dtype, device=observed.device)
    thresholds = torch.cat([infinity, observed])
    rates = [
        1 - torch.searchsorted(side.sort().values, thresholds, right=False).double() / len(side)
        for side in (negatives, positives)
    ]
    return rates[0], rates[1], thresholds


def threshold_at_fpr(negatives: Tensor, fpr: float) -> float:
    """The smallest observed score that at most a share `fpr` of the negatives lies above.

    Choose it on negatives held out for the purpose, never on those the rate is reported on.

    Args:
        negatives: scores of negatives `[N]`.
        fpr: largest false-positive rate, in [0, 1].

    Returns:
        The threshold $\\tau$ for the rule `score > threshold`; minus infinity where every score may be
        flagged.

    Raises:
        ValueError: on no scores, NaN, or a rate out of range.
    """
    if not 0 <= fpr <= 1:
        raise ValueError(f"expected a rate between 0 and 1, got {fpr}")
    ordered = _finite_scores(negatives).sort().values
    n = len(ordered)
    above = n - torch.searchsorted(ordered, ordered, right=True)
    if fpr == 1:
        return -torch.inf
    allowed = above.double() / n <= fpr
    return ordered[allowed][0].item()


def tpr_at_fpr(scores: Tensor, positive: Tensor, fpr: float) -> float:
    """Share of positives above the threshold that lets at most a share `fpr` of the negatives pass.

    Args:
        scores: `[N]`, larger for positives.
        positive: `[N]`, 0 or 1.
        fpr: largest false-positive rate, in [0, 1].

    Raises:
        ValueError: see `auroc` and `threshold_at_fpr`.
    """
    negatives, positives = _split(scores, positive)
    return (positives > threshold_at_fpr(negatives, fpr)).double().mean().item()


def _finite_scores(scores: Tensor) -> Tensor:
    scores = torch.as_tensor(scores).detach()
    if scores.dim() != 1 or not len(scores):
        raise ValueError(f"expected scores [N], at least one, got shape {tuple(scores.shape)}")
    if scores.isnan().any():
        raise ValueError("the scores hold NaN")
    # Large integers are not all floats; float64 holds what any other type can.
    return scores if scores.dtype == torch.int64 else scores.double()


def _split(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the negatives and of the positives."""
    scores, positive = torch.as_tensor(scores), torch.as_tensor(positive)
    if scores.shape != positive.shape:
        raise ValueError(
            f"expected a label for every score, got shapes {tuple(positive.shape)} and {tuple(scores.shape)}"
        )
    scores = _finite_scores(scores)
    if not ((positive == 0) | (positive == 1)).all():
        raise ValueError("expected labels 0 and 1")
    chosen = positive.detach().bool().to(scores.device)
    if not chosen.any() or chosen.all():
        raise ValueError(f"expected positives and negatives, got {int(chosen.sum())} and {int((~chosen).sum())}")
    return scores[~chosen], scores[chosen]


def _checked(outputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and labels, which may be arrays, as tensors."""
    outputs, y = torch.as_tensor(outputs), torch.as_tensor(y)
    if outputs.dim() != 2 or y.dim() != 1 or len(outputs) != len(y):
        raise ValueError(f"expected outputs [N, C] and labels [N], got {tuple(outputs.shape)} and {tuple(y.shape)}")
    if not len(y):
        raise ValueError("expected at least one example, got none")
    if outputs.isnan().any():
        raise ValueError("the outputs hold NaN")
    if y.min() < 0 or y.max() >= outputs.shape[1]:
        raise ValueError(f"expected labels from 0 to {outputs.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
    return outputs, y
