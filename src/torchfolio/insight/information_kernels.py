"""Bounds on the information in activations, in bits, from Gaussian kernels whose width follows the layer.

Reference:
    Chelombiev, Houghton, O'Donnell, ICLR 2019 (arXiv 1902.09037), Section 3; Kolchinsky and Tracey, "Estimating Mixture
    Entropy with Pairwise Distances", 2017.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from torchfolio.checks import one_of, positive, whole
from torchfolio.insight.information_estimators import Information, checked

__all__ = ["AdaptiveKDE", "kde_information"]

LARGEST_EXPONENT = 1e7  # of a kernel, up to which rounding of its parts does not show


class AdaptiveKDE:
    """Bounds on the information of a layer plus a little noise, whose width follows the layer.

    $\\tilde T = T + \\epsilon$, $\\epsilon \\sim N(0, \\sigma^2 I)$ with $\\sigma = \\sigma_0 \\max |T|$; see `kde_information`. The
    estimate does not change when the layer is scaled.

    Args:
        noise_variance: $\\sigma_0^2$; 1e-3.
        scaling: `"max"` as above; `"variance"`, $\\sigma^2 = \\sigma_0^2 \\max |T|$; `"none"`, $\\sigma = \\sigma_0$. The paper
            says that the noise scales with the largest activity, and leaves open which of the first two.
        bound: `"upper"` or `"lower"`.

    Reference:
        Section 3; bounds of Kolchinsky and Tracey, "Estimating Mixture Entropy with Pairwise Distances", 2017.
    """

    def __init__(
        self,
        noise_variance: float = 1e-3,
        scaling: Literal["max", "variance", "none"] = "max",
        bound: Literal["upper", "lower"] = "upper",
    ) -> None:
        self.noise_variance = positive("noise_variance", noise_variance)
        self.scaling = one_of("scaling", scaling, ("max", "variance", "none"))
        self.bound: Literal["upper", "lower"] = one_of("bound", bound, ("upper", "lower"))

    def __call__(self, activations: Tensor, labels: Tensor | None = None, inputs: Tensor | None = None) -> Information:
        """Information of one layer; see `AdaptiveBinning`. `inputs` are not needed: the noise makes the layer random."""
        labels = None if labels is None else torch.as_tensor(labels)
        t = checked(activations, labels).double()
        largest = float(t.abs().max())
        if largest == 0:
            return Information(0.0, math.nan if labels is None else 0.0)
        variance = self.noise_variance
        if self.scaling == "max":
            t = t / largest
        elif self.scaling == "variance":
            variance *= largest
        i_xt = _pairwise(t, variance, self.bound)
        if labels is None:
            return Information(i_xt, math.nan)
        within = 0.0
        for y in labels.unique():
            rows = labels == y
            within += float(rows.double().mean()) * _pairwise(t[rows], variance, self.bound)
        return Information(i_xt, max(0.0, i_xt - within))

    def __repr__(self) -> str:
        return f"AdaptiveKDE(noise_variance={self.noise_variance:g}, scaling={self.scaling!r}, bound={self.bound!r})"


def kde_information(T: Tensor, variance: float, bound: Literal["upper", "lower"] = "upper", chunk: int = 512) -> float:
    """Bounds on $I(\\tilde T; X)$ of a layer with Gaussian noise, in bits, from pairwise distances:

    $$\\hat I = -\\frac1N \\sum_i \\log_2 \\frac1N \\sum_j \\exp\\Bigl(-\\frac{\\lVert t_i - t_j \\rVert^2}{c\\,\\sigma^2}\\Bigr),
    \\qquad c = 2 \\text{ (upper)}, \\; 8 \\text{ (lower)}.$$

    Args:
        T: `[N, d]`.
        variance: $\\sigma^2$.
        bound: kind of bound; lower <= upper <= $\\log_2 N$.
        chunk: rows at a time.
    """
    whole("chunk", chunk, 1)
    positive("variance", variance)
    one_of("bound", bound, ("upper", "lower"))
    return _pairwise(checked(T, None).double(), variance, bound, chunk)


def _pairwise(t: Tensor, variance: float, bound: Literal["upper", "lower"], chunk: int = 512) -> float:
    # |t_i - t_j|^2 / (c sigma^2) = h_i + h_j - u_i u_j by one product of matrices, where it loses nothing by rounding.
    u = (t - t.mean(0)) * math.sqrt(2 / ((2 if bound == "upper" else 8) * variance))
    h = u.square().sum(1) / 2
    exact = float(h.max()) < LARGEST_EXPONENT
    sums = torch.zeros_like(h)
    parts = list(zip(u.split(chunk), h.split(chunk), sums.split(chunk), strict=True))
    for k, (ua, ha, rows) in enumerate(parts):
        for j, (ub, hb, columns) in enumerate(parts[k:]):  # pairs are alike both ways
            if exact:
                near = torch.addmm(-ha[:, None], ua, ub.T).sub_(hb).clamp_(max=0).exp_()
            else:
                near = torch.cdist(ua, ub, compute_mode="donot_use_mm_for_euclid_dist").square_().div_(-2).exp_()
            if j == 0:
                near.fill_diagonal_(1)
            else:
                columns += near.sum(0)
            rows += near.sum(1)
    return max(0.0, -float((sums / len(t)).log2().mean()))
