"""Sums of features by class, in one pass over arrays or tensors: what naive Bayes classifiers are fitted from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor, nn

from torchfolio.checks import finite, one_of

__all__ = ["Array", "ClassSums", "as_numpy"]

Array = NDArray[np.float64]

_validated: Any = validate_data  # scikit-learn's defaults for X and y are strings, which misleads type checkers
_BLOCK = 2**18  # numbers that are summed at a time: they stay in the cache for all that is asked of them


class ClassSums(ClassifierMixin, BaseEstimator, ABC):
    """A classifier that is fitted from counts, means, squared deviations and ranges of features by class.

    Samples are summed in float64, in one pass; `partial_fit` merges counts, means and squares, and is equal to one
    `fit` whatever the chunks are. Arrays give arrays; tensors are computed in torch on their device and give tensors. A
    subclass says what is made of the sums.

    Reference:
        Chan, Golub, LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    classes_: NDArray[Any]
    class_count_: Array
    coef_: Array
    intercept_: Array
    prior: Any

    @abstractmethod
    def _check_settings(self) -> None:
        """Refuse parameters out of range."""

    @abstractmethod
    def _solve(self) -> None:
        """Set the fitted attributes from what was summed."""

    @abstractmethod
    def _logits(self, X: Any) -> Tensor:
        """$\\ln p(k \\mid x)$ up to a constant a sample, `[N, K]`, in float64."""

    def fit(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor):
        """Fit to features `[m, n]` and labels `[m]`, forgetting what was before."""
        rows, labels = self._samples(X, y, reset=True)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        self._check_parameters()
        self._start(rows.shape[1])
        self._add(rows, torch.from_numpy(codes.reshape(-1)).to(rows.device))
        self._solve()
        self._check_solved()
        return self

    def partial_fit(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, classes: ArrayLike | Tensor | None = None):
        """Add features `[m, n]` and labels `[m]` to what was fitted.

        Args:
            X: features.
            y: labels.
            classes: all labels that there will be; needed in the first call. Each needs a sample before predictions.
        """
        first = not hasattr(self, "_scatter")
        if first and classes is None:
            raise ValueError("expected classes in the first call of partial_fit, got None")
        rows, labels = self._samples(X, y, reset=first)
        if classes is not None:
            named = np.unique(as_numpy(classes))
            if not first and not np.array_equal(named, self.classes_):
                raise ValueError(f"expected the classes of the first call, {self.classes_}, got {named}")
            self.classes_ = named
        self._check_parameters()
        codes = np.searchsorted(self.classes_, labels).clip(max=len(self.classes_) - 1)
        if (unknown := self.classes_[codes] != labels).any():
            raise ValueError(f"expected labels among {self.classes_}, got {labels[unknown][0]!r}")
        if first:
            self._start(rows.shape[1])
        self._add(rows, torch.from_numpy(codes).to(rows.device))
        self._solve()
        return self

    def _check_parameters(self) -> None:
        self._check_settings()
        K = len(self.classes_)
        if K < 2:
            raise ValueError(f"expected samples of at least two classes, got one class: {self.classes_[0]!r}")
        if isinstance(self.prior, str):
            one_of("prior", self.prior, ("empirical", "uniform"))
            return
        prior = np.asarray(self.prior, dtype=np.float64)
        if prior.shape != (K,):
            raise ValueError(f"expected prior to be {K} probabilities, one a class, got shape {prior.shape}")
        if not (prior >= 0).all() or abs(prior.sum() - 1) > 1e-8:
            raise ValueError(f"expected prior to be probabilities of at least 0 with sum 1, got {prior}")

    def _samples(self, X: Any, y: Any, *, reset: bool) -> tuple[Tensor, NDArray[Any]]:
        """Features as a tensor, and labels."""
        if not isinstance(X, Tensor):
            X, y = _validated(self, X, as_numpy(y), dtype=np.float64, reset=reset)
            return _tensor(X), y
        rows, labels = self._rows(X, reset=reset), column_or_1d(as_numpy(y))
        if len(labels) != len(rows):
            raise ValueError(f"expected as many labels as rows of features, got {len(labels)} and {len(rows)}")
        return rows, labels

    def _rows(self, X: Any, *, reset: bool = False) -> Tensor:
        if not isinstance(X, Tensor):
            return _tensor(_validated(self, X, dtype=np.float64, reset=reset))
        if X.dim() != 2 or not X.numel():
            raise ValueError(f"expected features [N, n] of one sample or more, got shape {tuple(X.shape)}")
        if X.is_complex() or X.dtype == torch.bool:
            raise ValueError(f"expected features to be real numbers, got {X.dtype}")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_}"
            )
        rows = finite("the features", X.detach())
        return rows.cpu() if rows.device.type == "mps" else rows  # which has no float64

    def _start(self, n: int) -> None:
        K = len(self.classes_)
        self.class_count_, self._means, self._scatter = np.zeros(K), np.zeros((K, n)), np.zeros((K, n))
        self._low, self._high = np.full(n, np.inf), np.full(n, -np.inf)

    def _add(self, rows: Tensor, codes: Tensor) -> None:
        """Merge samples into counts, means, squared deviations and ranges, block by block."""
        K, n = self._means.shape
        low, high, count, means, scatter = (
            torch.from_numpy(a).to(rows.device)
            for a in (self._low, self._high, self.class_count_, self._means, self._scatter)
        )
        size = max(512, _BLOCK // n)
        for part, k in zip(rows.split(size), codes.split(size), strict=True):
            block = part.double()
            low, high = torch.minimum(low, block.amin(0)), torch.maximum(high, block.amax(0))
            m = torch.bincount(k, minlength=K).double()
            mean = block.new_zeros(K, n).index_add_(0, k, block) / m.clamp(min=1)[:, None]
            within = block.new_zeros(K, n).index_add_(0, k, (block - mean.index_select(0, k)).square_())
            share = (m / (count + m).clamp(min=1))[:, None]
            difference = mean - means
            scatter = scatter + within + difference.square() * (count[:, None] * share)
            means, count = means + difference * share, count + m
        self._low, self._high, self.class_count_, self._means, self._scatter = (
            t.cpu().numpy() for t in (low, high, count, means, scatter)
        )

    def _check_solved(self) -> None:
        """Whether there were samples enough to predict."""
        check_is_fitted(self)
        if (missing := self.class_count_ == 0).any():
            raise ValueError(f"expected a sample or more of every class, class {self.classes_[missing][0]!r} has none")

    def _priors(self, count: Array) -> Array:
        """$\\pi$ for counts `[..., K]`."""
        if isinstance(self.prior, str):
            weight = count if self.prior == "empirical" else np.ones_like(count)
            return weight / weight.sum(-1, keepdims=True)
        return np.broadcast_to(np.asarray(self.prior, dtype=np.float64), count.shape)

    def _linear_logits(self, X: Any) -> Tensor:
        """$w_k \\cdot x + b_k$, `[N, K]`."""
        rows = self._rows(X).double()
        weight, bias = (
            torch.from_numpy(np.ascontiguousarray(a)).to(rows.device) for a in (self.coef_, self.intercept_)
        )
        return torch.addmm(bias, rows, weight.T)

    def _layer(self, dtype: torch.dtype, device: torch.device | str | None) -> nn.Linear:
        layer = nn.Linear(self.coef_.shape[1], len(self.coef_), device="meta")  # draws no weights from the generator
        layer.weight = nn.Parameter(torch.tensor(self.coef_, dtype=dtype, device=device))
        layer.bias = nn.Parameter(torch.tensor(self.intercept_, dtype=dtype, device=device))
        return layer

    def decision_function(self, X: ArrayLike | Tensor):
        """Logits `[N, K]`; for two classes `[N]`, those of the second less those of the first."""
        logits = self._logits(X)
        return _given(logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits, X)

    def predict_log_proba(self, X: ArrayLike | Tensor):
        """Logarithms of the class probabilities, `[N, K]`."""
        return _given(self._logits(X).log_softmax(1), X)

    def predict_proba(self, X: ArrayLike | Tensor):
        """Class probabilities $\\operatorname{softmax}(w x + b)$, `[N, K]`, in the order of `classes_`."""
        return _given(self._logits(X).softmax(1), X)

    def predict(self, X: ArrayLike | Tensor):
        """Labels `[N]`; a tensor for a tensor, if the labels are numbers."""
        codes = self._logits(X).argmax(1)
        if isinstance(X, Tensor) and self.classes_.dtype.kind in "biuf":
            return torch.from_numpy(self.classes_).to(X.device)[codes.to(X.device)]
        return self.classes_[codes.cpu().numpy()]

    def score(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, sample_weight: ArrayLike | None = None) -> float:
        """Accuracy, of arrays or tensors."""
        labels, predicted = as_numpy(y), as_numpy(self.predict(X))
        if labels.shape != predicted.shape:
            raise ValueError(f"expected a label for each of {len(predicted)} samples, got shape {labels.shape}")
        return float(
            np.average(predicted == labels, weights=None if sample_weight is None else np.asarray(sample_weight))
        )


def as_numpy(values: Any) -> NDArray[Any]:
    """An array of values that may be a tensor."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _tensor(X: Array) -> Tensor:
    """A view of an array, which is only read."""
    return torch.from_numpy(np.require(X, requirements=["C", "W"]))


def _given(values: Tensor, X: Any) -> Any:
    """A result in the form of the features that it was asked for."""
    if not isinstance(X, Tensor):
        return values.numpy()
    return values.to(X.device, X.dtype if X.is_floating_point() else torch.float32)
