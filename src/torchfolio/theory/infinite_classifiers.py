"""The classifiers that infinitely wide and deep networks become.

Adityanarayanan Radhakrishnan, Mikhail Belkin, Caroline Uhler, "Wide and Deep Neural Networks Achieve Optimality for
Classification", PNAS 2023, https://arxiv.org/abs/2204.14126.

A fully connected network of infinite width predicts by a kernel that its activation $\\varphi$ decides. As it grows in
depth, too, its classifier has one of three limits. With $E[\\varphi^2] = 1$, $A = E[\\varphi]$, $A' = E[\\varphi']$ and
$B' = E[\\varphi'^2]$ under the standard normal distribution, and data on the sphere:

- $A = A' = 0$: the nearest neighbour;
- $A = 0 \\ne A'$: a vote $\\sum_i y_i \\psi(x_i^\\top x)$ with the Koenigs function $\\psi$ of the dual activation, which
  is singular at the training points as $\\|x - x_i\\|^{-\\alpha}$, $\\alpha = -4 \\ln|A'| / \\ln B'$;
- $A \\ne 0$: the majority vote.

The vote reaches the Bayes error for $n \\to \\infty$ if $\\alpha$ is the dimension $d$ of the sphere (without its
singularity, Devroye's Hilbert kernel), which `OptimalActivation` is made for. At other exponents nothing is promised:
above $d$ the vote is too local, below it distant clusters outvote near ones, though at moderate $n$ a slightly smaller
exponent may even predict better.

The limit is computed as such, without a depth that stands for infinity and without a linear solve.

Longer than most because the classifier has three limits beside finite depth.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from numbers import Real
from typing import Any, Literal

import numpy as np
import torch
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.neighbors import NearestNeighbors
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from torchfolio import checks
from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation
from torchfolio.theory.infinite_kernels import nngp, ntk
from torchfolio.theory.koenigs_table import KoenigsTable
from torchfolio.theory.limit_activations import (
    ActivationReport,
    HermiteActivation,
    OptimalActivation,
    classify_activation,
)
from torchfolio.theory.ntk_networks import finite_network

__all__ = [
    "ActivationReport",
    "DualActivation",
    "HermiteActivation",
    "InfiniteNetworkClassifier",
    "OptimalActivation",
    "classify_activation",
    "dual_activation",
    "finite_network",
    "intrinsic_dimension",
    "nngp",
    "ntk",
]

TILE = 1 << 17  # pairs of a test and a training point held at a time
TABULATED = 2_000_000  # pairs from which on a table of the Koenigs function pays
CLOSE = 1e-4  # 1 - ξ below which it is taken from the difference of the points
NORM_ERROR = 1e-6


def intrinsic_dimension(X: np.ndarray) -> float:
    """Dimension of the surface that data lie on, from the ratio of the two nearest distances of every point.

    Args:
        X: data `[n, features]`, three different points or more.

    Raises:
        ValueError: if there are fewer.

    Reference:
        Facco et al., "Estimating the intrinsic dimension of datasets by a minimal neighborhood information", 2017.
    """
    distinct = np.unique(X, axis=0)
    if len(distinct) < 3:
        raise ValueError(f"expected three different points or more to estimate a dimension, got {len(distinct)}")
    distances, _ = NearestNeighbors(n_neighbors=3).fit(distinct).kneighbors(distinct)
    logs = np.log(distances[:, 2] / distances[:, 1])
    return float((len(logs) - 1) / logs.sum()) if logs.sum() > 0 else math.inf


class InfiniteNetworkClassifier(ClassifierMixin, BaseEstimator):
    """Predicts as a fully connected network of infinite width, and by default infinite depth, does after training.

    Nothing is trained. At infinite depth the classifier is the vote that `kind_` names: at a test point that equals
    training points, these decide. At finite depth the kernel system is solved.

    The theory is for points with coordinates that are not negative. Negative inner products are allowed: the votes are
    still the limits where $A = 0$, but optimality is not proven, and the nearest neighbour is meant in angle (a warning
    says so, since an even dual activation takes opposite points for near ones).

    A tie goes to the class of most training points, the first one if these are equal.

    Args:
        activation: `"optimal"` for the one made for the intrinsic dimension, or a name, module, function or dual.
        depth: number of hidden layers; infinite by default.
        kernel: `"ntk"` for networks with all layers trained, `"nngp"` for the last one alone. At infinite depth the
            limits are the same.
        intrinsic_dim: dimension $d$ for `"optimal"`: `"auto"` for that of the sphere, features − 1; `"estimate"` for
            that of the data (`intrinsic_dimension`, rounded); or a whole number.
        normalize: whether rows are divided by their norm; otherwise their norm must be 1.
        ridge: number that is added to the diagonal of the kernel at finite depth, at least 0.

    Attributes:
        classes_: labels.
        kind_: `"nearest neighbor"`, `"singular kernel"`, `"majority vote"`, or `"linear"` (at finite depth).
        alpha_: exponent of the singularity; infinite for the nearest neighbour, NaN for the majority vote.
        dual_: dual activation.
        intrinsic_dim_: dimension that `"optimal"` was made for, otherwise `None`.

    Raises:
        ValueError: from `fit`, on settings out of range, rows of norm 0 (or not 1), a linear activation at infinite
            depth, or a kernel that float64 cannot hold or factor.

    Warns:
        UserWarning: from `fit`, if a majority vote is tied; from `predict`, on negative inner products with the nearest
            neighbour.

    Reference:
        Radhakrishnan et al., theorems 1 to 3.

    Example:
        >>> X = np.array([[1.0, 0.1], [0.9, 0.3], [0.1, 1.0]])
        >>> InfiniteNetworkClassifier().fit(X, ["a", "a", "b"]).predict([[0.2, 0.9]])
        array(['b'], dtype='<U1')
    """

    def __init__(
        self,
        activation: Activation = "optimal",
        *,
        depth: float = math.inf,
        kernel: Literal["ntk", "nngp"] = "ntk",
        intrinsic_dim: int | Literal["auto", "estimate"] = "auto",
        normalize: bool = True,
        ridge: float = 0.0,
    ) -> None:
        self.activation = activation
        self.depth = depth
        self.kernel = kernel
        self.intrinsic_dim = intrinsic_dim
        self.normalize = normalize
        self.ridge = ridge

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        assert tags.classifier_tags is not None
        tags.classifier_tags.poor_score = True  # the length of rows, which the tests' classes differ in, is not used
        return tags

    def fit(self, X: Any, y: Any) -> InfiniteNetworkClassifier:
        """Keep the training points; at finite depth, solve the kernel system.

        Args:
            X: points `[n, features]`, two features or more.
            y: labels `[n]`.
        """
        self._check_settings()
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_features=2)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        self.X_ = self._on_sphere(X)
        self.targets_ = np.eye(len(self.classes_))[codes]
        self.dual_ = self._dual()
        self._classify()
        if math.isinf(self.depth):
            if self.kind_ == "linear":
                raise ValueError("expected an activation that is not linear at infinite depth; set depth")
        else:
            self.dual_coef_ = self._solve()
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[m]` of points `[m, features]`."""
        votes = self._votes(X)
        tied = votes == votes.max(1, keepdims=True)
        # Among equal votes the larger class, then the first.
        order = np.argsort(-self.targets_.sum(0), kind="stable")
        return self.classes_[order[tied[:, order].argmax(1)]]

    def decision_function(self, X: Any) -> np.ndarray:
        """Votes for each class `[m, classes]`; for two classes the second's less the first's, `[m]`.

        At infinite depth they are shares of all votes (each counted without its sign).
        """
        votes = self._votes(X)
        return votes[:, 1] - votes[:, 0] if votes.shape[1] == 2 else votes[:, 0] if votes.shape[1] == 1 else votes

    # Fitting

    def _check_settings(self) -> None:
        checks.one_of("kernel", self.kernel, ("ntk", "nngp"))
        if not (isinstance(self.depth, Real) and math.isinf(self.depth) and self.depth > 0):
            checks.whole("depth", self.depth, 1)
        if isinstance(self.intrinsic_dim, str):
            checks.one_of("intrinsic_dim", self.intrinsic_dim, ("auto", "estimate"))
        else:
            checks.whole("intrinsic_dim", self.intrinsic_dim, 1)
        checks.at_least("ridge", self.ridge, 0)

    def _on_sphere(self, X: np.ndarray) -> np.ndarray:
        if not self.normalize:
            error = np.abs(np.linalg.norm(X, axis=1) - 1).max()
            if not error < NORM_ERROR:
                raise ValueError(f"expected rows of norm 1 with normalize=False, got one that is {error:.2g} off")
            return X
        largest = np.abs(X).max(1, keepdims=True)
        if not largest.all():
            raise ValueError(f"expected rows that can be normalised, got {int((largest == 0).sum())} of zeros alone")
        X = X / largest  # a norm may overflow where its entries do not
        return X / np.linalg.norm(X, axis=1, keepdims=True)

    def _dual(self) -> DualActivation:
        self.intrinsic_dim_: int | None = None
        if not (isinstance(self.activation, str) and self.activation == "optimal"):
            return dual_activation(self.activation)
        if isinstance(self.intrinsic_dim, str):
            estimate = self.X_.shape[1] - 1 if self.intrinsic_dim == "auto" else intrinsic_dimension(self.X_)
            self.intrinsic_dim_ = int(min(max(1, round(estimate)), self.X_.shape[1] - 1))
        else:
            self.intrinsic_dim_ = self.intrinsic_dim
        return OptimalActivation(self.intrinsic_dim_).dual

    def _classify(self) -> None:
        self.kind_, self.alpha_ = "linear", math.nan
        if not self.dual_.is_linear:
            report = classify_activation(self.dual_)
            self.kind_, self.alpha_ = report.kind, report.alpha
        counts = self.targets_.sum(0)
        if self.kind_ == "majority vote" and math.isinf(self.depth) and (counts == counts.max()).sum() > 1:
            tied = ", ".join(str(c) for c in self.classes_[counts == counts.max()])
            warnings.warn(f"the majority vote is tied between the classes {tied}; the first is predicted", stacklevel=3)

    def _solve(self) -> np.ndarray:
        """Coefficients `[n, classes]` of the kernel's interpolation of one-hot labels."""
        gram = self._kernel(self.X_, None)
        if not np.isfinite(gram).all() or not (np.diag(gram) > 0).all():
            raise ValueError(f"the kernel of depth {self.depth} leaves the range of float64; use depth=math.inf")
        gram[np.diag_indices_from(gram)] += self.ridge
        try:
            return cho_solve(cho_factor(gram, lower=True, overwrite_a=True), self.targets_)
        except LinAlgError:
            raise ValueError(
                f"the kernel of depth {self.depth} with ridge {self.ridge} is not positive definite in float64: points "
                "are equal or too alike; raise ridge"
            ) from None

    def _kernel(self, X1: np.ndarray, X2: np.ndarray | None) -> np.ndarray:
        kernel = ntk if self.kernel == "ntk" else nngp
        second = None if X2 is None else torch.from_numpy(X2)
        with torch.no_grad():
            return kernel(torch.from_numpy(X1), second, self.dual_, int(self.depth), normalized=True).numpy()

    # Prediction

    def _votes(self, X: Any) -> np.ndarray:
        """Votes `[m, classes]`."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False, dtype=np.float64)
        points = self._on_sphere(checked)
        rows = list(_tiles(len(points), len(self.X_)))
        if math.isfinite(self.depth):
            return np.concatenate([self._kernel(points[r], self.X_) @ self.dual_coef_ for r in rows])
        if self.kind_ == "majority vote":
            return np.tile(self.targets_.mean(0), (len(points), 1))
        train, targets = torch.from_numpy(self.X_), torch.from_numpy(self.targets_)
        koenigs = self._koenigs(len(points))
        votes, lowest = [], 1.0
        for r in rows:
            eta = _distances(torch.from_numpy(points[r]), train)
            lowest = min(lowest, 1 - float(eta.max()))
            if self.kind_ == "nearest neighbor":
                weight = (eta == eta.amin(1, keepdim=True)).double()
            else:
                weight = _finite(koenigs(eta))
            total = weight.abs().sum(1, keepdim=True)
            votes.append((weight @ targets / total.clamp_min(torch.finfo(total.dtype).tiny)).numpy())
        if self.kind_ == "nearest neighbor" and lowest < -NORM_ERROR:
            warnings.warn(
                f"inner products down to {lowest:.2g} are outside the theorem; the nearest neighbour in angle is taken",
                stacklevel=3,
            )
        return np.concatenate(votes)

    def _koenigs(self, m: int) -> Callable[[Tensor], Tensor]:
        """The Koenigs function of $1 - \\xi$, from a table where `m` points make many pairs."""
        if self.kind_ == "singular kernel" and m * len(self.X_) >= TABULATED:
            table = KoenigsTable(self.dual_)
            if table.is_finite:
                return table
        return lambda eta: self.dual_.koenigs(eta=eta)


def _tiles(m: int, n: int) -> Iterator[slice]:
    step = max(1, TILE // n)
    return (slice(start, min(m, start + step)) for start in range(0, m, step))


def _distances(x: Tensor, train: Tensor) -> Tensor:
    """$1 - x^\\top x_i = \\|x - x_i\\|^2 / 2$ `[m, n]`; of close points by the difference, which keeps its digits."""
    eta = 1 - x @ train.T
    i, j = (eta < CLOSE).nonzero(as_tuple=True)
    for a, b in zip(i.split(TILE // x.shape[1] + 1), j.split(TILE // x.shape[1] + 1), strict=True):
        eta[a, b] = (x[a] - train[b]).square().sum(1) / 2
    return eta.clamp_max_(2)


def _finite(weight: Tensor) -> Tensor:
    """Weights whose infinite ones, in a row that has any, are 1 and the others 0."""
    infinite = torch.isinf(weight)
    rows = infinite.any(1)
    if bool(rows.any()):
        weight[rows] = infinite[rows].to(weight.dtype)
    return weight
