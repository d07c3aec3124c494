"""Fully bundled networks in closed form: fixed random features and the best last matrix, as scikit-learn estimators.

Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio.checks import at_least, finite, whole
from torchfolio.layers.random_features import FourierMeasure, RandomFeatures, features_of

__all__ = ["BundledClassifier", "BundledRegressor", "ridge_solution"]

_validated: Any = validate_data  # its defaults for X and y are strings, which misleads type checkers
_BATCH = 8192


def ridge_solution(features: Tensor, targets: Tensor, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
    """The matrix and bias that minimise $\\lVert ZA^\\top + a - Y \\rVert^2 + \\lambda \\lVert A \\rVert^2$, in float64.

    $A = Y^\\top Z (Z^\\top Z + \\lambda I)^{-1}$ for centred Z and Y; for fewer rows than columns by the kernel form. The
    bias is not penalised.

    Args:
        features: Z, `[N, k]`.
        targets: Y, `[N, c]`.
        alpha: penalty $\\lambda$ of at least 0; at 0 the solution of smallest norm.

    Returns:
        A `[c, k]` and a `[c]`, in float64.

    Raises:
        ValueError: if shapes do not fit, or something is not finite.
    """
    at_least("alpha", alpha, 0)
    if features.dim() != 2 or targets.dim() != 2 or len(features) != len(targets) or not len(features):
        raise ValueError(
            f"expected [N, k] features and [N, c] targets, got {list(features.shape)}, {list(targets.shape)}"
        )
    Z, Y = finite("features", features.double()), finite("targets", targets.double())
    mean, level = Z.mean(0), Y.mean(0)
    Z, Y = Z - mean, Y - level
    wide = len(Z) < Z.shape[1]
    gram = Z @ Z.mT if wide else Z.mT @ Z
    gram.diagonal().add_(alpha)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if alpha > 0 and not failed:
        A = (Z.mT @ torch.cholesky_solve(Y, factor) if wide else torch.cholesky_solve(Z.mT @ Y, factor)).mT
    else:  # singular but for rounding
        U, s, Vh = torch.linalg.svd(Z, full_matrices=False)
        keep = s > s.max() * max(Z.shape) * torch.finfo(s.dtype).eps
        factors = torch.where(keep, s / (s.square() + alpha).clamp(min=torch.finfo(s.dtype).tiny), 0)
        A = (Vh.mT * factors) @ (U.mT @ Y)
        A = A.mT
    return A, level - A @ mean


class _Scale(nn.Module):
    """Inputs times a number that a state dict holds."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Bundled(BaseEstimator):
    """What regressor and classifier have in common."""

    n_features_in_: int
    network_: nn.Sequential

    def __init__(
        self,
        hidden: Sequence[int] = (512, 512),
        features: str | FourierMeasure | Callable[..., RandomFeatures] = "relu",
        alpha: float = 1e-5,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.features = features
        self.alpha = alpha
        self.random_state = random_state

    def _solve(self, X: NDArray[np.float64], targets: NDArray[np.float64]) -> None:
        at_least("alpha", self.alpha, 0)
        if not isinstance(self.hidden, Iterable):
            raise TypeError(f"expected hidden to be sizes such as (512, 512), got {self.hidden!r}")
        sizes = [whole("every size of hidden", size, 1) for size in self.hidden]
        if not sizes:
            raise ValueError("expected at least one hidden size, got none")
        x = torch.tensor(X)
        # Inputs of norm 1 or so, beside which the constant 1 of the biases counts.
        size = x.square().sum(1).mean().sqrt()
        scale = torch.where(size > 0, 1 / size, 1.0)
        generator = check_random_state(self.random_state)
        layers: list[nn.Module] = [_Scale(scale)]
        width = x.shape[1]
        for m in sizes:
            seed = int(generator.randint(2**31 - 1))
            own = features_of(self.features, width, m, bias=True, radius=None, seed=seed).double()
            layers.append(own)
            width = own.width
        body = nn.Sequential(*layers)
        A, a = ridge_solution(_run(body, x), torch.tensor(targets), self.alpha)
        last = nn.Linear(width, len(A), dtype=torch.float64)
        with torch.no_grad():
            last.weight.copy_(A)
            last.bias.copy_(a)
        self.network_ = body.append(last).eval()

    def _outputs(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self)
        rows = _validated(self, X, dtype=np.float64, reset=False)
        return _run(self.network_, torch.tensor(rows)).numpy()

    @property
    def coef_(self) -> NDArray[np.float64]:
        """The trained matrix A, `[outputs, features of the last layer]`."""
        check_is_fitted(self, "network_")
        return self.network_[-1].weight.detach().numpy()  # pyright: ignore


@torch.no_grad()
def _run(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in x.contiguous().split(_BATCH)])


class BundledRegressor(RegressorMixin, _Bundled):
    """A fully bundled network whose one trained matrix is the best for squared errors, without backpropagation.

    $A\\,\\Phi_L(\\dots\\Phi_1(x)) + a$ with fixed random features; A by `ridge_solution`. Inputs
    are divided by their root mean square norm; features of different units should be standardised before.

    Args:
        hidden: number of random features of every layer, at least one.
        features: random features, see `torchfolio.layers.SNNK`.
        alpha: ridge penalty, at least 0.
        random_state: seed of the features.

    Attributes:
        network_: scale of the inputs, feature maps and last layer, a float64 module; see `to_module`.
        coef_: trained matrix.

    Raises:
        ValueError: in `fit`, for parameters out of range or data that scikit-learn refuses.

    Example:
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> BundledRegressor(hidden=(64,), alpha=1.0, random_state=0).fit(X, y).predict(X).shape
        (442,)
    """

    def fit(self, X: ArrayLike, y: ArrayLike):
        """Fit to inputs `[N, d]` and targets `[N]` or `[N, c]`."""
        rows, targets = _validated(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        targets = np.asarray(targets, dtype=np.float64)
        self._flat = targets.ndim == 1
        self._solve(rows, targets.reshape(len(targets), -1))
        return self

    def predict(self, X: ArrayLike) -> NDArray[np.float64]:
        """Targets of inputs `[N, d]`."""
        outputs = self._outputs(X)
        return outputs[:, 0] if self._flat else outputs

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network as a module of its own, `[N, d]` to `[N, c]`."""
        return _copy(self, dtype)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class BundledClassifier(ClassifierMixin, _Bundled):
    """A fully bundled network for classes: `BundledRegressor` of their indicators, and the largest output wins.

    Args:
        hidden: number of random features of every layer, at least one.
        features: random features, see `torchfolio.layers.SNNK`.
        alpha: ridge penalty, at least 0.
        random_state: seed of the features.

    Attributes:
        classes_: labels, in the order of the outputs.
        network_: scale of the inputs, feature maps and last layer, a float64 module; see `to_module`.
        coef_: trained matrix.

    Raises:
        ValueError: in `fit`, for parameters out of range, a single class, or data that scikit-learn refuses.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> X, y = load_digits(return_X_y=True)
        >>> BundledClassifier(hidden=(128,), random_state=0).fit(X, y).predict(X).shape
        (1797,)
    """

    classes_: NDArray[Any]

    def fit(self, X: ArrayLike, y: ArrayLike):
        """Fit to inputs `[N, d]` and labels `[N]`."""
        rows, labels = _validated(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected samples of at least two classes, got one class: {self.classes_[0]!r}")
        self._solve(rows, 2.0 * np.eye(len(self.classes_))[codes] - 1.0)
        return self

    def decision_function(self, X: ArrayLike) -> NDArray[np.float64]:
        """Outputs by class `[N, K]`; for two classes the second's `[N]`."""
        outputs = self._outputs(X)
        return outputs[:, 1] if len(self.classes_) == 2 else outputs

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Labels of inputs `[N, d]`."""
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]

    def to_module(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The network as a module of its own, `[N, d]` to `[N, K]`."""
        return _copy(self, dtype)


def _copy(estimator: _Bundled, dtype: torch.dtype) -> nn.Sequential:
    import copy

    check_is_fitted(estimator, "network_")
    return copy.deepcopy(estimator.network_).to(dtype)
