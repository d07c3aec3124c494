"""How far features are from what Gaussian naive Bayes takes them for.

Diagnostics of Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications", ICML
2023, https://arxiv.org/abs/2302.02334.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from torch import Tensor

from torchfolio.adaptation.class_sums import as_numpy
from torchfolio.checks import finite, same_length, whole

__all__ = ["GaussianFit", "gaussian_fit"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GaussianFit:
    """What `gaussian_fit` measures.

    Attributes:
        variance_quantiles: minimum, quartiles and maximum of the shared variances $\\sigma_j^2$ of features scaled to
            [0, 1], `[5]`. The theory wants them away from 0.
        divergence: divergence of each feature from its Gaussian, mean over classes, `[n]`, in nats; 0 is Gaussian.
        difference_mean: mean, over samples and classes $k \\ne y$, of the difference $\\ln p(x \\mid y) -
            \\ln p(x \\mid k)$ under the fit, divided by n.
        difference_variance: its variance within pairs of classes, divided by n; independent features keep it bounded
            as n grows.
    """

    variance_quantiles: Array
    divergence: Array
    difference_mean: float
    difference_variance: float


def gaussian_fit(X: ArrayLike | Tensor, y: ArrayLike | Tensor, *, bins: int = 10) -> GaussianFit:
    """Measure how well Gaussian naive Bayes with shared variances describes features.

    The divergence of a feature in a class is that of the shares of its samples in `bins` intervals, which its Gaussian
    holds equally likely, from equal shares: at most ln `bins`, and about `bins` / 2m for m Gaussian samples.

    Args:
        X: features `[m, n]`, array or tensor.
        y: labels `[m]`.
        bins: intervals, 2 or more.

    Returns:
        The diagnostics. Features that do not vary within classes are left out of the divergence (NaN) and of the
        difference.

    Raises:
        ValueError: on shapes that do not fit, features that are not finite, fewer than two classes, or no feature that
            varies.
    """
    rows, labels = as_numpy(X).astype(np.float64), as_numpy(y)
    if rows.ndim != 2 or labels.ndim != 1:
        raise ValueError(f"expected features [m, n] and labels [m], got shapes {rows.shape} and {labels.shape}")
    same_length(X=rows, y=labels)
    finite("X", rows)
    whole("bins", bins, 2)
    classes, codes = np.unique(labels, return_inverse=True)
    K = len(classes)
    if K < 2:
        raise ValueError(f"expected samples of at least two classes, got {K}")
    spread = np.ptp(rows, axis=0)
    scaled = (rows - rows.min(0)) / np.where(spread > 0, spread, 1)
    means = np.stack([scaled[codes == k].mean(0) for k in range(K)])
    within = scaled - means[codes]
    variance = (within**2).mean(0)
    varies = variance > 1e-12
    if not varies.any():
        raise ValueError("expected a feature that varies within classes, got none")
    divergence = np.full(rows.shape[1], np.nan)
    divergence[varies] = np.mean([_divergence(within[codes == k][:, varies], bins) for k in range(K)], axis=0)
    weight = means[:, varies] / variance[varies]
    score = scaled[:, varies] @ weight.T - (weight * means[:, varies]).sum(1) / 2
    difference = score[np.arange(len(codes)), codes][:, None] - score
    pairs = [difference[codes == k][:, j] for k in range(K) for j in range(K) if j != k]
    n = int(varies.sum())
    return GaussianFit(
        np.quantile(variance, [0, 0.25, 0.5, 0.75, 1]),
        divergence,
        float(np.mean([p.mean() for p in pairs]) / n),
        float(np.mean([p.var() for p in pairs]) / n),
    )


def _divergence(within: Array, bins: int) -> Array:
    """Of centred samples `[m, n]` of one class from a Gaussian of their variance, feature by feature."""
    deviation = within.std(0)
    place = norm.cdf(within / np.where(deviation > 0, deviation, 1))
    interval = np.minimum((place * bins).astype(int), bins - 1)
    share = np.stack([(interval == b).mean(0) for b in range(bins)])
    return np.where(share > 0, share * np.log(np.where(share > 0, share, 1) * bins), 0).sum(0)
