"""Naive Bayes for features that are there or not: the classical discrete case, in the same linear form."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from torchfolio.adaptation.class_sums import ClassSums
from torchfolio.checks import finite, number, positive

__all__ = ["BernoulliProbe"]


class BernoulliProbe(ClassSums):
    """Bernoulli naive Bayes with Laplace smoothing: a linear classifier of binary features in closed form.

    With $n_{kj}$ of the $m_k$ samples of class k having feature j,

    $$p_{kj} = \\frac{n_{kj} + \\alpha}{m_k + 2 \\alpha}, \\qquad
    \\ln p(k \\mid x) = \\ln \\pi_k + \\sum_j x_j \\ln p_{kj} + (1 - x_j) \\ln(1 - p_{kj}) + \\text{const}.$$

    It fits in one pass, merges chunks and takes tensors as `NaiveBayesProbe` does.

    Args:
        alpha: number of samples, above 0, that are added to each side of every feature.
        binarize: threshold above which a feature counts as there; `None` takes features that are 0 or 1 already.
        prior: $\\pi$: `"empirical"`, `"uniform"`, or probabilities in the order of `classes_`.

    Attributes:
        classes_: labels, in the order of the outputs.
        class_count_: samples of each class, `[K]`.
        class_prior_: $\\pi$, `[K]`.
        feature_prob_: $p$, `[K, n]`.
        coef_: weights, `[K, n]`.
        intercept_: biases, `[K]`.

    Raises:
        ValueError: as `NaiveBayesProbe`, and for features other than 0 and 1 where `binarize` is `None`.

    Example:
        >>> import torch
        >>> X, y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> BernoulliProbe().fit(X, y).predict(torch.tensor([[1.0, 0.0]]))
        tensor([0])

    Reference:
        Zheng et al., ICML 2023 (arXiv 2302.02334), the discrete case; Ng and Jordan, On Discriminative vs. Generative
        Classifiers, NeurIPS 2001.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        binarize: float | None = 0.0,
        prior: Literal["empirical", "uniform"] | ArrayLike = "empirical",
    ) -> None:
        self.alpha = alpha
        self.binarize = binarize
        self.prior = prior

    def _check_settings(self) -> None:
        positive("alpha", self.alpha)
        if self.binarize is not None:
            finite("binarize", number("binarize", self.binarize))

    def _binary(self, rows: Tensor) -> Tensor:
        if self.binarize is not None:
            return (rows > self.binarize).double()
        if bool(((rows != 0) & (rows != 1)).any()):
            raise ValueError("expected features that are 0 or 1; give binarize, a threshold, for others")
        return rows.double()

    def _add(self, rows: Tensor, codes: Tensor) -> None:
        super()._add(self._binary(rows), codes)

    def _solve(self) -> None:
        count = self.class_count_[:, None]
        self.class_prior_ = self._priors(self.class_count_)
        self.feature_prob_ = (count * self._means + self.alpha) / (count + 2 * self.alpha)
        present, absent = np.log(self.feature_prob_), np.log1p(-self.feature_prob_)
        with np.errstate(divide="ignore"):  # a prior of 0 is allowed
            self.coef_, self.intercept_ = present - absent, np.log(self.class_prior_) + absent.sum(1)

    def _logits(self, X: Any) -> Tensor:
        self._check_solved()
        return self._linear_logits(self._binary(self._rows(X)))

    def to_linear(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> nn.Linear:
        """The classifier as a layer that takes binary features; its softmax is the posterior.

        Args:
            dtype: floating type of the weights.
            device: place of the weights.

        Returns:
            `nn.Linear(n, K)`, its outputs in the order of `classes_`.
        """
        self._check_solved()
        return self._layer(dtype, device)

    to_module = to_linear
