"""Gaussian naive Bayes with shared variances, as a scikit-learn estimator that computes in torch.

Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications", ICML 2023,
https://arxiv.org/abs/2302.02334.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from torchfolio.adaptation.class_sums import Array, ClassSums, as_numpy
from torchfolio.checks import at_least, one_of

__all__ = ["NaiveBayesProbe"]

_SUBSETS = 2**24  # scores of subsets' classifiers that are held at a time


class NaiveBayesProbe(ClassSums):
    """Gaussian naive Bayes with one variance a feature, shared by all classes: a linear classifier in closed form.

    With $m_k$ samples of class k, their mean $\\mu_k$ and $SS_k = \\sum_{i: y_i = k} (x_i - \\mu_k)^2$,

    $$\\sigma_j^2 = \\frac{1}{m}\\sum_k SS_{kj} + \\epsilon r_j^2, \\qquad
    \\ln p(k \\mid x) = \\ln\\pi_k - \\frac12 \\sum_j \\frac{(x_j - \\mu_{kj})^2}{\\sigma_j^2} + \\text{const}
    = w_k \\cdot x + b_k + \\text{const}.$$

    $r_j$ is the range of feature j in the training samples: features scaled to [0, 1] get $\\epsilon$ added to their
    variances, and nothing else of naive Bayes depends on their scale. $w_k = (\\mu_k - \\mu) / \\sigma^2$ with the
    overall mean $\\mu$, which is the same for all classes: so a feature that is constant in training has no weight.

    Samples are summed in float64, in one pass; `partial_fit` merges counts, means and squares, and is equal to one
    `fit` whatever the chunks are. Arrays give arrays; tensors are computed in torch on their device and give tensors.

    Args:
        variance: `"shared"`, the method; or `"class"`, a variance for each class, which is scikit-learn's
            `GaussianNB`, quadratic in x and much worse with few samples.
        epsilon: variance of at least 0 that is added to each (scaled) feature's.
        var_smoothing: part, of at least 0, of the largest (scaled) feature's total variance that is added besides.
            1e-2 helps with very few samples.
        prior: $\\pi$: `"empirical"`, the classes' shares; `"uniform"`; or probabilities in the order of `classes_`.
        scale: `"minmax"` or `None`, which takes $r_j = 1$. Only $\\epsilon$ and `var_smoothing` depend on it.

    Attributes:
        classes_: labels, in the order of the outputs.
        class_count_: samples of each class, `[K]`.
        class_prior_: $\\pi$, `[K]`.
        theta_: means $\\mu_k$, `[K, n]`, float64 as all others.
        var_: variances, `[n]` if they are shared, else `[K, n]`.
        coef_: $w$, `[K, n]`, also for two classes; only if variances are shared.
        intercept_: $b$, `[K]`; likewise.

    Raises:
        ValueError: in `fit` and `partial_fit`, for parameters out of range, features that are not finite or of another
            number than before, a single class, labels outside `classes`, variances of 0 with `epsilon=0`; in what
            predicts, if a class has had no sample yet.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> head = NaiveBayesProbe().fit(X[:30], y[:30])
        >>> head.predict(X[30:]).shape
        (1767,)
        >>> head.to_linear()
        Linear(in_features=64, out_features=10, bias=True)

    Reference:
        Zheng et al., ICML 2023, linear evaluation by naive Bayes, and the authors' code for it. Merging: Chan, Golub, LeVeque, "Updating
        Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(
        self,
        variance: Literal["shared", "class"] = "shared",
        epsilon: float = 1e-9,
        var_smoothing: float = 0.0,
        prior: Literal["empirical", "uniform"] | ArrayLike = "empirical",
        scale: Literal["minmax"] | None = "minmax",
    ) -> None:
        self.variance: Literal["shared", "class"] = variance
        self.epsilon = epsilon
        self.var_smoothing = var_smoothing
        self.prior = prior
        self.scale: Literal["minmax"] | None = scale

    def _check_settings(self) -> None:
        one_of("variance", self.variance, ("shared", "class"))
        one_of("scale", self.scale, ("minmax", None))
        at_least("epsilon", self.epsilon, 0)
        at_least("var_smoothing", self.var_smoothing, 0)

    def _check_solved(self) -> None:
        """Whether there were samples enough to predict."""
        super()._check_solved()
        if (flat := np.flatnonzero(np.atleast_2d(self.var_ == 0).any(0))).size:
            raise ValueError(
                f"expected features that vary within classes, feature {flat[0]} does not; drop it, or take epsilon or "
                "var_smoothing above 0"
            )

    def _solve(self) -> None:
        """Variances, weights and biases from what was summed."""
        seen, m = self.class_count_[:, None] > 0, self.class_count_.sum()
        self.theta_ = np.where(seen, self._means, np.nan)
        self.class_prior_ = self._priors(self.class_count_)
        centre = self.class_count_ @ self._means / m
        between = self.class_count_ @ (self._means - centre) ** 2
        total = (self._scatter.sum(0) + between) / m
        added = self._floor(total, self._high - self._low)
        if self.variance == "class":
            self.var_ = np.where(seen, self._scatter / np.maximum(self.class_count_, 1)[:, None] + added, np.nan)
        else:
            self.var_ = self._scatter.sum(0) / m + added
        if self.variance == "shared":
            self.coef_, self.intercept_ = _linear(self.theta_, self.var_, centre, self.class_prior_)

    def _floor(self, total: Array, spread: Array) -> Array:
        """What is added to variances `[..., n]`, for total variances and ranges of the features."""
        square = np.where(spread > 0, spread, 1.0) ** 2 if self.scale == "minmax" else np.ones_like(spread)
        return (self.epsilon + self.var_smoothing * (total / square).max(-1, keepdims=True)) * square

    def _logits(self, X: Any) -> Tensor:
        """$\\ln p(k \\mid x)$ up to a constant a sample, `[N, K]`, in float64."""
        self._check_solved()
        if self.var_.ndim == 1:
            return self._linear_logits(X)
        rows = self._rows(X).double()

        def like(array: Array) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(rows.device)

        means, variances = like(self.theta_), like(self.var_)
        columns = [
            ((rows - mean).square() / var + var.log()).sum(1) for mean, var in zip(means, variances, strict=True)
        ]
        return like(self.class_prior_).log() - torch.stack(columns, 1) / 2

    def to_linear(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> nn.Linear:
        """The classifier as a layer that takes raw features, for the end of a network; its softmax is the posterior.

        Args:
            dtype: floating type of the weights.
            device: place of the weights.

        Returns:
            `nn.Linear(n, K)`, its outputs in the order of `classes_`.

        Raises:
            ValueError: if variances are not shared, for then the classifier is not linear.
        """
        self._check_solved()
        if self.var_.ndim != 1:
            raise ValueError("expected variance='shared' for a linear layer, got 'class', which is quadratic")
        return self._layer(dtype, device)

    to_module = to_linear

    def subset_errors(
        self, X: Tensor, codes: Tensor, subsets: Sequence[Tensor], X_test: Tensor, test_codes: Tensor
    ) -> Array:
        """Test errors of probes fitted to many subsets, all at once: what `learning_curve` calls.

        Class sums of every subset are one product of a matrix of zeros and ones with the features of a class, and all
        their predictions one product with the weights of all probes. Squares are taken about the class means of all
        samples, where they do not cancel.

        Args:
            X: features `[M, n]`, float64.
            codes: classes `[M]`, from 0 to K - 1.
            subsets: row numbers of each; every class must be among them.
            X_test: features `[T, n]`.
            test_codes: classes `[T]`.

        Returns:
            Share of test samples that are told wrongly, `[S]`.
        """
        one_of("variance", self.variance, ("shared",))
        K = int(codes.max()) + 1
        self.classes_ = np.arange(K)
        self._check_parameters()
        order = codes.argsort(stable=True)
        sizes = torch.bincount(codes, minlength=K).tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        pool = X[order]
        means = torch.stack([part.mean(0) for part in pool.split(sizes)])
        deviations = pool - means[codes[order]]
        squares = deviations.square()
        step = max(1, _SUBSETS // (len(X_test) * K))
        errors = []
        for start in range(0, len(subsets), step):
            chosen = [place[s] for s in subsets[start : start + step]]
            weight = torch.zeros(len(chosen), len(pool), dtype=pool.dtype, device=pool.device)
            for row, members in zip(weight, chosen, strict=True):
                row[members] = 1
            parts = list(zip(weight.split(sizes, 1), deviations.split(sizes), strict=True))
            count = torch.stack([w.sum(1) for w, _ in parts], 1)  # [S, K]
            offset = torch.stack([w @ d for w, d in parts], 1) / count[..., None]  # [S, K, n]
            within = (weight @ squares - (count[..., None] * offset.square()).sum(1)).clamp(min=0)
            ranges = [pool[members].aminmax(dim=0) for members in chosen] if self.scale == "minmax" else []
            spread = torch.stack([r.max - r.min for r in ranges]) if ranges else torch.ones_like(within)
            scores = self._scores(*map(as_numpy, (count, means + offset, within, spread)), X_test=X_test)
            errors.append((scores.argmax(-1) != test_codes[:, None]).double().mean(0))
        return torch.cat(errors).cpu().numpy()

    def _scores(self, count: Array, theta: Array, within: Array, spread: Array, X_test: Tensor) -> Tensor:
        """Logits `[T, S, K]` of S probes with counts `[S, K]`, means `[S, K, n]`, squares and ranges `[S, n]`."""
        m = count.sum(1, keepdims=True)
        centre = np.einsum("sk,skn->sn", count, theta) / m
        between = np.einsum("sk,skn->sn", count, (theta - centre[:, None]) ** 2)
        variance = within / m + self._floor((within + between) / m, spread)
        coef, intercept = _linear(theta, variance[:, None], centre[:, None], self._priors(count))
        weight = torch.from_numpy(coef.reshape(-1, coef.shape[-1])).to(X_test.device)
        scores = torch.addmm(torch.from_numpy(intercept.reshape(-1)).to(X_test.device), X_test, weight.T)
        return scores.view(len(X_test), *intercept.shape)


def _linear(theta: Array, variance: Array, centre: Array, prior: Array) -> tuple[Array, Array]:
    """Weights and biases; of $\\mu_k^2 - \\mu^2 = (\\mu_k - \\mu)(\\mu_k + \\mu)$, the factored form does not cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):  # a prior of 0 is allowed; variances of 0 are told of later
        coef = (theta - centre) / variance
        return coef, np.log(prior) - (coef * (theta + centre)).sum(-1) / 2
