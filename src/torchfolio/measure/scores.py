"""Scores of predictions: accuracy, calibration, ranking, probes."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(logits: Tensor, y: Tensor, *, top: int = 1) -> float:
    """Share of examples whose label is among the `top` largest outputs.

    Args:
        logits: `[N, C]`.
        y: labels `[N]`.
        top: how many outputs count.

    Raises:
        ValueError: on shapes that do not fit, no examples, or labels out of range.
    """
    _check_labels(logits, y)
    if not 1 <= top <= logits.shape[1]:
        raise ValueError(f"expected top between 1 and {logits.shape[1]}, got {top}")
    return (logits.topk(top, dim=1).indices == y[:, None]).any(1).double().mean().item()


def calibration_error(probabilities: Tensor, y: Tensor, *, bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error of the predicted class:

    $$\\mathrm{ECE} = \\sum_b \\frac{n_b}{N} \\lvert \\mathrm{acc}(b) - \\mathrm{conf}(b) \\rvert.$$

    Args:
        probabilities: `[N, C]`, rows that sum to 1.
        y: labels `[N]`.
        bins: number of bins of the confidence.
        adaptive: bins of equal counts in place of equal widths.

    Raises:
        ValueError: on shapes that do not fit, no examples, or rows that are no probabilities.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3.
    """
    _check_labels(probabilities, y)
    sums = probabilities.sum(1)
    if probabilities.min() < 0 or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ValueError("expected rows of probabilities that sum to 1; apply softmax to logits first")
    confidence, predicted = probabilities.double().max(1)
    correct = (predicted == y).double()
    if adaptive:
        order = confidence.argsort()
        groups = order.tensor_split(bins)
        gaps = [len(g) * (correct[g].mean() - confidence[g].mean()).abs() for g in groups if len(g)]
        return (torch.stack(gaps).sum() / len(y)).item()
    index = (confidence * bins).long().clamp(max=bins - 1)
    difference = torch.zeros(bins, dtype=torch.float64, device=index.device).index_add_(0, index, correct - confidence)
    return (difference.abs().sum() / len(y)).item()


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    Args:
        scores: `[N]`, larger for positives.
        positive: `[N]`, 0 or 1.

    Raises:
        ValueError: on shapes that do not fit, NaN, or a single class.
    """
    scores, positive = scores.detach().double().flatten(), positive.detach().flatten().bool()
    if scores.shape != positive.shape:
        raise ValueError(f"expected as many labels as scores, got {len(positive)} and {len(scores)}")
    if scores.isnan().any():
        raise ValueError("the scores hold NaN")
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        raise ValueError(f"expected positives and negatives, got {n_positive} and {n_negative}")
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[inverse]  # the mean rank of a tie, from 1
    return ((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)).item()


def linear_probe(
    features: Tensor,
    y: Tensor,
    test_features: Tensor,
    test_y: Tensor,
    *,
    regularization: float = 1.0,
    max_iter: int = 200,
) -> float:
    """Test accuracy of a logistic regression on standardised features.

    Args:
        features: `[N, ...]`, flattened to rows.
        y: labels `[N]`.
        test_features: `[M, ...]`.
        test_y: labels `[M]`.
        regularization: inverse strength C of the L2 penalty.
        max_iter: of the solver.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=max_iter))
    probe.fit(_rows(features), y.cpu().numpy())
    return float(probe.score(_rows(test_features), test_y.cpu().numpy()))


def _rows(x: Tensor):
    return x.detach().flatten(1).float().cpu().numpy()


def _check_labels(outputs: Tensor, y: Tensor) -> None:
    if outputs.dim() != 2 or y.dim() != 1 or len(outputs) != len(y):
        raise ValueError(f"expected outputs [N, C] and labels [N], got {tuple(outputs.shape)} and {tuple(y.shape)}")
    if not len(y):
        raise ValueError("expected at least one example, got none")
    if outputs.isnan().any():
        raise ValueError("the outputs hold NaN")
    if y.min() < 0 or y.max() >= outputs.shape[1]:
        raise ValueError(f"expected labels from 0 to {outputs.shape[1] - 1}, got {int(y.min())} to {int(y.max())}")
