"""Paths of linear classifiers by regularisation, and the type of their adversarial examples.

Tanay and Griffin, "A Boundary Tilting Perspective on the Phenomenon of Adversarial Examples", 2016,
https://arxiv.org/abs/1608.07690.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from torchfolio.checks import at_least, same_length, whole
from torchfolio.robustness.linear_weights import weights
from torchfolio.robustness.tilting_geometry import Array, TwoClasses, angle_between, flat, unit, upper_of
from torchfolio.shown import Shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["RidgePath", "pareto", "plot_path", "regularisation_path", "taxonomy"]


class RidgePath(Shown):
    """All ridge classifiers of two classes, for any strengths of regularisation, from one eigendecomposition.

    With the covariance within classes $\\Sigma = U \\operatorname{diag}(\\lambda) U^\\top$ and z in its axes,

    $$c_\\rho \\propto (\\Sigma + \\rho I)^{-1} z, \\qquad \\cos\\delta(\\rho) = \\frac{\\sum_k z_k^2 / (\\lambda_k +
    \\rho)}{\\sqrt{\\sum_k z_k^2 / (\\lambda_k + \\rho)^2}}.$$

    Least squares on labels -1 and 1 with penalty $N \\rho \\lVert w\\rVert^2$ (scikit-learn's `RidgeClassifier`) has the
    same directions. Large $\\rho$ gives the nearest-centroid classifier, $\\rho \\to 0$ linear discriminant analysis.
    Boundaries go through the middle of the centroids, so that unbalanced classes do not shift them.

    Args:
        X: samples `[N, ...]` of two classes, not standardised: that would change the centroids' geometry.
        y: labels `[N]`, of two kinds.
        alphas: strengths $\\rho > 0$ `[P]`, in the unit of a variance.

    Attributes:
        alphas: `[P]`.
        angles: deviation angles `[P]`.
        strengths: adversarial strengths $1 / \\cos\\delta$ `[P]`.
        coef_: directions $c_\\rho$ `[P, d]`, of length 1.
        intercept_: biases `[P]`.

    Raises:
        ValueError: if there are not two classes, the centroids coincide, a sample is not finite, or a strength is not
            positive.
    """

    def __init__(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor, alphas: ArrayLike) -> None:
        self.alphas = np.asarray(alphas, dtype=np.float64).reshape(-1)
        if not len(self.alphas) or not (np.isfinite(self.alphas) & (self.alphas > 0)).all():
            raise ValueError(f"expected alphas to be positive and finite, got {alphas!r}")
        pair = TwoClasses.of(X, y)
        self.classes_, self._middle, self._train = pair.classes, pair.middle, (pair.X, pair.upper)
        self._axes, self._variance = _principal(pair.within, pair.z)
        self._z = self._axes @ pair.z
        scaled = self._z / (self._variance + self.alphas[:, None])
        length = np.linalg.norm(scaled, axis=1)
        cosine = scaled @ self._z / length
        sine = np.linalg.norm(scaled / length[:, None] - cosine[:, None] * self._z, axis=1)
        self.angles = np.degrees(np.arctan2(sine, cosine))
        self.strengths = 1 / cosine
        self.coef_ = (scaled / length[:, None]) @ self._axes
        self.intercept_ = -self.coef_ @ self._middle

    def errors(self, X: ArrayLike | Tensor, y: ArrayLike | Tensor) -> Array:
        """Share of samples of the two classes that each classifier gets wrong, `[P]`."""
        upper = upper_of(y, self.classes_)
        same_length(X=flat(X), y=upper)
        return ((flat(X) @ self.coef_.T + self.intercept_ > 0) != upper[:, None]).mean(0)

    def to_frame(
        self, X_val: ArrayLike | Tensor, y_val: ArrayLike | Tensor, *, zero: float = 5.0, tol: float | None = None
    ) -> DataFrame:
        """As `regularisation_path`, a row a strength, errors on the samples of fitting and on others."""
        X, upper = self._train
        train = self.errors(X, self.classes_[upper.astype(int)])
        return _frame(self.alphas, self.angles, train, self.errors(X_val, y_val), len(flat(X_val)), zero, tol)


def regularisation_path(
    make_estimator: Callable[[float], Any],
    strengths: Sequence[float],
    X: ArrayLike | Tensor,
    y: ArrayLike | Tensor,
    X_val: ArrayLike | Tensor,
    y_val: ArrayLike | Tensor,
    *,
    zero: float = 5.0,
    tol: float | None = None,
) -> DataFrame:
    """Fit linear classifiers of different regularisation, and say of which type their adversarial examples are.

    Args:
        make_estimator: function from a strength to a linear scikit-learn classifier, not yet fitted.
        strengths: its settings, such as C of a support vector machine or a ridge.
        X: samples `[N, ...]` of two classes to fit to.
        y: labels `[N]`, of two kinds.
        X_val: other samples `[M, ...]`.
        y_val: their labels `[M]`.
        zero: angle up to which a boundary counts as the nearest centroid's; see `taxonomy`.
        tol: error that is not worth a tilt; see `taxonomy`.

    Returns:
        Columns `regularisation`, `angle`, `strength`, `train_error`, `val_error` and `type`.
    """
    pair, rows = TwoClasses.of(X, y), []
    upper = upper_of(y_val, pair.classes)
    val = flat(X_val)
    same_length(X_val=val, y_val=upper)
    for strength in strengths:
        fitted = make_estimator(strength).fit(pair.X, pair.upper.astype(int))
        w, b = weights(fitted, pair.X, 0, 1)
        errors = [((data @ w + b > 0) != truth).mean() for data, truth in ((pair.X, pair.upper), (val, upper))]
        rows.append((float(angle_between(unit(w), pair.z)), *errors))
    angle, train, other = np.array(rows).reshape(-1, 3).T
    return _frame(np.asarray(strengths, dtype=np.float64), angle, train, other, len(val), zero, tol)


def _frame(
    strengths: Array, angle: Array, train: Array, val: Array, count: int, zero: float, tol: float | None
) -> DataFrame:
    import pandas as pd

    strength = np.where(angle <= 90, 1 / np.cos(np.radians(angle)), np.nan)
    columns = {
        "regularisation": strengths,
        "angle": angle,
        "strength": strength,
        "train_error": train,
        "val_error": val,
    }
    return pd.DataFrame({**columns, "type": taxonomy(angle, val, count, zero=zero, tol=tol)})


def taxonomy(
    angles: ArrayLike, errors: ArrayLike, count: int, *, zero: float = 5.0, tol: float | None = None
) -> NDArray[np.int64]:
    """Types of the adversarial examples of classifiers on a path.

    With the least error $e^*$ and $\\delta^*$, the smallest angle of those whose error is at most $e^*$ + `tol`:

    - type 0, $\\delta \\le$ `zero`: the boundary is the nearest centroid's, no adversarial examples in a proper sense;
    - type 1, $\\delta \\le \\delta^*$: the tilt buys accuracy; a trade-off;
    - type 2, $\\delta > \\delta^*$: a tilt without gain, which regularisation would avoid.

    Args:
        angles: deviation angles `[P]`, in degrees.
        errors: validation errors `[P]`, in [0, 1].
        count: number of validation samples.
        zero: angle of type 0, at least 0.
        tol: error that is not worth a tilt; by default one standard error of $e^*$,
            $\\sqrt{e^* (1 - e^*) / \\text{count}}$.

    Returns:
        0, 1 or 2 for each, `[P]`.

    Reference:
        Tanay and Griffin, 2016, section 5, with a tolerance in place of judgement by eye.
    """
    delta, e = np.asarray(angles, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    same_length(angles=delta, errors=e)
    if not len(e) or not (np.isfinite(delta).all() and ((e >= 0) & (e <= 1)).all()):
        raise ValueError("expected angles and errors in [0, 1] of one classifier or more, finite")
    whole("count", count, 1)
    at_least("zero", zero, 0)
    best = e.min()
    allowed = math.sqrt(best * (1 - best) / count) if tol is None else at_least("tol", tol, 0)
    star = delta[e <= best + allowed].min()
    return np.where(delta <= zero, 0, np.where(delta <= star, 1, 2))


def pareto(path: DataFrame) -> DataFrame:
    """The rows of a path that no other row beats in angle and validation error at once, by angle."""
    rows: Any = path.sort_values(["angle", "val_error"])
    before = rows["val_error"].cummin().shift(fill_value=np.inf)
    return rows[rows["val_error"] < before]


def plot_path(path: DataFrame) -> Figure:
    """Errors against the deviation angle, coloured by type, with adversarial strength above."""
    import matplotlib.pyplot as plt

    rows: Any = path.sort_values("angle")
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(rows["angle"], 100 * rows["train_error"], color="0.6", label="training")
    ax.plot(rows["angle"], 100 * rows["val_error"], color="0.3", label="validation")
    for kind in sorted(set(rows["type"])):
        part = rows[rows["type"] == kind]
        ax.plot(part["angle"], 100 * part["val_error"], "o", color=f"C{int(kind)}", label=f"type {int(kind)}")
    ax.set(xlabel="deviation angle (degrees)", ylabel="error (%)", xlim=(-1, 91))
    top = ax.secondary_xaxis("top")
    ticks = np.array([0, 30, 60, 75, 85])
    top.set_xticks(ticks, [f"{1 / math.cos(math.radians(t)):.1f}" for t in ticks])
    top.set_xlabel("adversarial strength")
    ax.legend()
    ax.grid(alpha=0.3)
    return fig


def _principal(within: Array, z: Array) -> tuple[Array, Array]:
    """Orthonormal axes `[r, d]` that span the centred samples and z, and the variances along them.

    Features that never vary and in which the centroids agree are left out: they have no part in any direction of the
    path. With fewer samples than features the axes are those of a singular value decomposition, with the part of z
    outside of them as one more, of variance 0.
    """
    N, d = within.shape
    used = np.flatnonzero((np.abs(within).max(0) > 0) | (z != 0))
    rows, target = within[:, used], z[used]
    if len(used) <= N:
        variance, vectors = np.linalg.eigh(rows.T @ rows / N)
        axes = vectors.T
    else:
        _, size, axes = np.linalg.svd(rows, full_matrices=False)
        variance = np.square(size) / N
        rest = target - axes.T @ (axes @ target)
        rest -= axes.T @ (axes @ rest)
        if np.linalg.norm(rest) > 1e-12:
            axes, variance = np.vstack([axes, rest / np.linalg.norm(rest)]), np.append(variance, 0.0)
    whole_axes = np.zeros((len(axes), d))
    whole_axes[:, used] = axes
    return whole_axes, variance.clip(min=0)
