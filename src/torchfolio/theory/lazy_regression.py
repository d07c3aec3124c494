"""Regression that is linear in its weights: gradient descent in closed form, random features, and kernels.

A network of which only the last layer moves, and a network in the lazy regime, are linear regressions on fixed features.
Gradient descent on them, with weight decay, is known for every number of steps from one eigendecomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.shown import Shown

__all__ = [
    "RandomFeatureRidge",
    "SpectralDescent",
    "TunedKernelRidge",
    "activation",
    "gradient_descent",
    "random_features",
    "tuned_weights",
]

DECAYS = torch.logspace(-5, 0, 16, dtype=torch.float64)  # tried, over the top eigenvalue
HELD_OUT = 0.2  # share of the data on which a decay is chosen


class Square(nn.Module):
    """$z^2$."""

    def forward(self, z: Tensor) -> Tensor:
        return z.square()


def activation(name: str) -> nn.Module:
    """The activation `"softplus"`, `"relu"`, `"gelu"` or `"quadratic"` as a module."""
    known = {"softplus": nn.Softplus, "relu": nn.ReLU, "gelu": nn.GELU, "quadratic": Square}
    return known[checks.one_of("inner", name, known)]()


def random_features(d: int, m: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights V `[m, d]` uniform on the sphere of radius $1/\\sqrt2$ and shifts s `[m]` from N(0, 1/2), float64.

    Of standard normal inputs and over the draw of s, $\\langle v, x \\rangle + s$ is standard normal.
    """
    V = torch.randn(m, d, generator=generator, dtype=torch.float64)
    V = V / V.norm(dim=1, keepdim=True) / math.sqrt(2)
    return V, torch.randn(m, generator=generator, dtype=torch.float64) / math.sqrt(2)


class SpectralDescent(Shown):
    """Gradient descent from 0 on $\\frac1{2n} \\lVert \\Phi u - y \\rVert^2 + \\frac\\xi2 \\lVert u \\rVert^2$, for every decay and time.

    With the eigenvalues $\\lambda$ and eigenvectors U of $\\Phi^\\top\\Phi/n$, the rate $\\eta = 1/(\\lambda_1 + \\xi)$ and
    $r = \\Phi^\\top y/n$,

    $$u_T = U \\operatorname{diag}\\Bigl(\\frac{1 - (1 - \\eta(\\lambda + \\xi))^T}{\\lambda + \\xi}\\Bigr) U^\\top r.$$

    Args:
        features: $\\Phi$, `[n, m]`, centred where there is an intercept; with m > n the matrix of side n is decomposed.
        y: targets `[n]`.

    Attributes:
        eigenvalues: eigenvalues of $\\Phi^\\top\\Phi/n$, in ascending order; of the $\\min(n, m)$ directions that can
            be other than 0.
    """

    def __init__(self, features: Tensor, y: Tensor) -> None:
        n, m = features.shape
        if n < 1 or y.shape != (n,):
            raise ValueError(f"expected features [n, m] and targets [n], got {tuple(features.shape)}, {tuple(y.shape)}")
        dual = m > n
        values, vectors = torch.linalg.eigh((features @ features.T if dual else features.T @ features) / n)
        self.eigenvalues = values.clamp_min(0)
        # Both forms are back @ diag(filter) @ r, as f(AᵀA) Aᵀ = Aᵀ f(AAᵀ).
        self._back = features.T @ vectors if dual else vectors
        self._r = vectors.T @ (y if dual else features.T @ y) / n

    @property
    def top(self) -> float:
        """The largest eigenvalue."""
        return float(self.eigenvalues[-1])

    def weights(self, decay: float | Tensor, steps: int | None = None) -> Tensor:
        """$u_T$, `[m]`, or `[m, D]` for decays `[D]`.

        Args:
            decay: $\\xi$, at least 0.
            steps: T; the limit of many, the ridge solution, by default (of least norm where $\\xi = 0$).
        """
        if steps is not None:
            checks.whole("steps", steps, low=0)
        xi = torch.as_tensor(decay, dtype=self.eigenvalues.dtype, device=self.eigenvalues.device)
        if not bool((xi >= 0).all()):
            raise ValueError(f"expected a decay of at least 0, got {decay!r}")
        total = self.eigenvalues[:, None] + xi.reshape(1, -1)
        done = 1.0
        if steps is not None:
            # log1p keeps what many steps do to small eigenvalues.
            share = (total / total[-1].clamp_min(1e-300)).clamp_max(1.0)
            done = torch.where(share < 1, -torch.expm1(steps * torch.log1p(-share)), 1.0 if steps else 0.0)
        tiny = total <= 1e-14 * max(self.top, 1e-300)
        u = self._back @ (torch.where(tiny, 0.0, done / total.clamp_min(1e-300)) * self._r[:, None])
        return u if xi.dim() else u[:, 0]

    def steps_needed(self, decay: float, rank: int, rest: float = 1e-3) -> int:
        """Steps after which the first `rank` directions are learned up to the share `rest`."""
        at = float(self.eigenvalues[-min(rank, len(self.eigenvalues))])
        share = (at + decay) / max(self.top + decay, 1e-300)
        return 1 if share >= 1 else max(1, math.ceil(math.log(rest) / math.log1p(-max(share, 1e-6))))


def gradient_descent(features: Tensor, y: Tensor, decay: float, steps: int) -> Tensor:
    """The literal loop of `SpectralDescent`, step by step, `[m]`."""
    n, m = features.shape
    gram = (features.T @ features if m <= n else features @ features.T) / n
    rate = 1 / (float(torch.linalg.eigvalsh(gram)[-1]) + decay)
    u = features.new_zeros(m)
    for _ in range(checks.whole("steps", steps, low=0)):
        gradient = features.T @ (features @ u - y) / n + decay * u
        u = u - rate * gradient
    return u


def ridge(features: Tensor, y: Tensor, decay: float) -> Tensor:
    """The minimiser of the loss of `SpectralDescent` for a positive decay, `[m]`, by Cholesky."""
    n, m = features.shape
    dual = m > n
    gram = (features @ features.T if dual else features.T @ features) / n
    gram.diagonal().add_(decay)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return SpectralDescent(features, y).weights(decay)
    right = (y if dual else features.T @ y)[:, None] / n
    solution = torch.cholesky_solve(right, factor)[:, 0]
    return features.T @ solution if dual else solution


def tuned_weights(
    features: Tensor, y: Tensor, decay: float | str, steps: int | None, solver: str, rank: int
) -> tuple[Tensor, float, dict[str, np.ndarray]]:
    """Weights on centred features: the decay is chosen on the last fifth, and all data are fitted with it.

    Args:
        features: `[n, m]`.
        y: `[n]`.
        decay: its value, or `"cv"` to choose.
        steps: number of steps of gradient descent; `None` for ridge, or, in the loop, for as many as `rank` directions
            need.
        solver: `"spectral"` or `"gd"`.
        rank: directions that the loop resolves.

    Returns:
        The weights, the decay, and what was tried: `decays` and `errors`.
    """
    path = {"decays": np.empty(0), "errors": np.empty(0)}
    if decay == "cv":
        held = max(1, round(HELD_OUT * len(y)))
        part = SpectralDescent(features[:-held], y[:-held])
        decays = DECAYS.to(features.device) * max(part.top, 1e-12)
        errors = (features[-held:] @ part.weights(decays, steps) - y[-held:, None]).square().mean(0)
        decay = float(decays[errors.argmin()])
        path = {"decays": decays.cpu().numpy(), "errors": errors.cpu().numpy()}
    xi = float(decay)
    if solver == "gd":
        count = SpectralDescent(features, y).steps_needed(xi, rank) if steps is None else steps
        return gradient_descent(features, y, xi, count), xi, path
    if steps is None and xi > 0:
        return ridge(features, y, xi), xi, path
    return SpectralDescent(features, y).weights(xi, steps), xi, path


class RandomFeatureRidge(RegressorMixin, BaseEstimator):
    """Ridge regression on random features, a two-layer network in the lazy regime; the decay is chosen on held-out data.

    Args:
        m: number of features.
        inner: activation, as in `activation`.
        random_state: seed of the features.
    """

    def __init__(self, m: int = 2000, *, inner: str = "softplus", random_state: Any = None) -> None:
        self.m, self.inner, self.random_state = m, inner, random_state

    def fit(self, X: Any, y: Any) -> RandomFeatureRidge:
        """Fit to inputs `[n, d]` and targets `[n]`."""
        data, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        x, y_ = torch.tensor(data), torch.tensor(np.asarray(target, dtype=np.float64))
        seed = int(check_random_state(self.random_state).randint(2**31))
        self._V, self._s = random_features(x.shape[1], self.m, torch.Generator().manual_seed(seed))
        features = self._features(x)
        self._mean, self._offset = features.mean(0), y_.mean()
        fitted = tuned_weights(features - self._mean, y_ - self._offset, "cv", None, "spectral", 1)
        self.coef_, self.decay_, self.path_ = fitted
        return self

    def _features(self, x: Tensor) -> Tensor:
        return activation(self.inner)(x @ self._V.T + self._s)

    def predict(self, X: Any) -> np.ndarray:
        """Targets of inputs `[n, d]`."""
        check_is_fitted(self, "coef_")
        x = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        return ((self._features(x) - self._mean) @ self.coef_ + self._offset).numpy()


class TunedKernelRidge(RegressorMixin, BaseEstimator):
    """Kernel ridge regression whose decay (and width) are chosen on held-out data, before all data are fitted.

    Kernels are $(1 + x^\\top x'/d)^r$ and $\\exp(-\\lVert x - x' \\rVert^2 / (2 w^2 d))$. The systems are solved by Cholesky in
    float32, which halves time and memory.

    Args:
        degree: r of the polynomial; `None` for the RBF kernel.
        decays: decays tried, over the kernel's mean diagonal times n.
        widths: w tried for the RBF kernel.
    """

    def __init__(
        self,
        degree: int | None = None,
        decays: Sequence[float] = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3),
        widths: Sequence[float] = (2.0, 4.0),
    ) -> None:
        self.degree, self.decays, self.widths = degree, decays, widths

    def fit(self, X: Any, y: Any) -> TunedKernelRidge:
        """Fit to inputs `[n, d]` and targets `[n]`."""
        data, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        x, y_ = torch.tensor(data, dtype=torch.float32), torch.tensor(np.asarray(target, dtype=np.float64))
        self._x, self._offset = x.double(), y_.mean()
        y_ = y_ - self._offset
        train = len(x) - max(1, round(HELD_OUT * len(x)))
        tried = []
        for width in self.widths if self.degree is None else (1.0,):
            K = self._kernel(x[:train], x[:train], width)
            across = self._kernel(x[train:], x[:train], width).double()
            for decay in self.decays:
                dual = self._solve(K, y_[:train], decay)
                tried.append((float((across @ dual - y_[train:]).square().mean()), decay, width))
        _, self.decay_, self.width_ = min(tried)
        self.tried_ = tried
        self.dual_coef_ = self._solve(self._kernel(x, x, self.width_), y_, self.decay_)
        return self

    def _kernel(self, a: Tensor, b: Tensor, width: float) -> Tensor:
        d = a.shape[1]
        product = (a @ b.T) / d
        if self.degree is not None:
            return product.add_(1).pow_(self.degree)
        norms = a.square().sum(1)[:, None] / d + b.square().sum(1) / d
        return product.mul_(2).sub_(norms).div_(2 * width**2).exp_()

    def _solve(self, K: Tensor, y: Tensor, decay: float) -> Tensor:
        """$(K + \\xi I)^{-1} y$."""
        xi = decay * float(K.diagonal().mean()) * len(y)
        shifted = K.clone()
        shifted.diagonal().add_(xi)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if int(failed):  # not positive in float32
            return torch.linalg.solve(shifted.double(), y)
        return torch.cholesky_solve(y[:, None].float(), factor)[:, 0].double()

    def predict(self, X: Any) -> np.ndarray:
        """Targets of inputs `[n, d]`."""
        check_is_fitted(self, "dual_coef_")
        x = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        parts = [self._kernel(part, self._x, self.width_) @ self.dual_coef_ for part in x.split(2048)]
        return (torch.cat(parts) + self._offset).numpy()
