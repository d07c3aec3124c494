"""What regressors by scale mixtures of Gaussian processes share: one Cholesky factor, standardised targets, predictions."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.theory.network_kernels import NNGPKernel
from torchfolio.theory.scale_priors import NormalMixture, StudentT

__all__ = ["MixtureProcess", "cholesky", "own_kernel"]

JITTER, LARGEST_JITTER = 1e-8, 1e-3


class MixtureProcess(RegressorMixin, BaseEstimator):
    """What the regressors share: one Cholesky factor for mean, evidence and predictive scales."""

    kernel: NNGPKernel | None
    noise: float
    noise_: float
    normalize_y: bool

    def _prepare(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        checks.positive("noise", self.noise)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self.kernel_ = own_kernel(self.kernel)
        self.X_ = X
        self.y_mean_, self.y_scale_ = (y.mean(), y.std() or 1.0) if self.normalize_y else (0.0, 1.0)
        return torch.from_numpy(X), torch.from_numpy((y - self.y_mean_) / self.y_scale_)

    def _factorise(self, X: Tensor, y: Tensor) -> None:
        with torch.no_grad():
            factor = cholesky(self.kernel_(X), self.noise_)
            self.factor_ = factor.numpy()
            whitened = torch.linalg.solve_triangular(factor, y[:, None], upper=False)
            self.quadratic_ = float(whitened.square().sum())
            self.log_det_ = float(2 * factor.diagonal().log().sum())
            self.dual_coef_ = torch.linalg.solve_triangular(factor.mT, whitened, upper=True)[:, 0].numpy()

    def _locations(self, X: Any) -> tuple[Tensor, Tensor]:
        """Means `[m]` and scales `[m]` at $\\sigma^2 = 1$, noise included, in the units of y."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False, dtype=np.float64)
        points = torch.from_numpy(checked)
        with torch.no_grad():
            cross = self.kernel_(points, torch.from_numpy(self.X_))
            half = torch.linalg.solve_triangular(torch.from_numpy(self.factor_), cross.T, upper=False)
            variance = (self.kernel_.diagonal(points) - half.square().sum(0)).clamp_min(0) + self.noise_
            location = cross @ torch.from_numpy(self.dual_coef_)
        return self.y_mean_ + self.y_scale_ * location, self.y_scale_ * variance.sqrt()

    def _distribution(self, X: Any) -> StudentT | NormalMixture:
        raise NotImplementedError

    def predict(self, X: Any, return_std: bool = False, return_dist: bool = False) -> Any:
        """Predict targets.

        Args:
            X: points `[m, features]`.
            return_std: whether to give standard deviations of a noisy observation, too; NaN with a warning where the
                distribution has none.
            return_dist: whether to give the predictive distribution instead, with `log_prob`, `quantile`, `mean`,
                `stddev`.

        Returns:
            Locations `[m]`, a pair with standard deviations `[m]`, or the distribution.
        """
        distribution = self._distribution(X)
        if return_dist:
            return distribution
        if not return_std:
            return distribution.loc.numpy()
        deviations = distribution.stddev.numpy()
        if np.isnan(deviations).any():
            warnings.warn(
                "a t distribution of 2 degrees of freedom or fewer has no variance; use quantiles", stacklevel=2
            )
        return distribution.loc.numpy(), deviations


def own_kernel(kernel: Any) -> NNGPKernel:
    """A copy of a user's kernel, `NNGPKernel()` for `None`.

    Raises:
        TypeError: if it is no module with a `diagonal`.
    """
    if kernel is None:
        return NNGPKernel()
    if not isinstance(kernel, nn.Module) or not callable(getattr(kernel, "diagonal", None)):
        raise TypeError(f"expected kernel to be a module with a diagonal, such as NNGPKernel, got {kernel!r}")
    return copy.deepcopy(kernel)  # pyright: ignore[reportReturnType]


def cholesky(kernel: Tensor, noise: float | Tensor) -> Tensor:
    """Cholesky factor of a kernel with noise on its diagonal, and more where rounding asks for it.

    Raises:
        ValueError: if it is not positive definite with 1e-3 of its mean diagonal either.
    """
    diagonal = kernel.diagonal()
    factor, info = torch.linalg.cholesky_ex(torch.diagonal_scatter(kernel, diagonal + noise))
    jitter = JITTER
    while bool(info) and jitter <= LARGEST_JITTER:
        more = noise + jitter * diagonal.mean()
        factor, info = torch.linalg.cholesky_ex(torch.diagonal_scatter(kernel, diagonal + more))
        jitter *= 2
    if bool(info):
        raise ValueError(
            f"the kernel is not positive definite, even with {LARGEST_JITTER} of its diagonal; raise noise"
        )
    return factor
