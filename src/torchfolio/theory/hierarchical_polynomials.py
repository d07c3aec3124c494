"""Hierarchical polynomials and the three-layer network that learns them one layer at a time.

Zihao Wang, Eshaan Nichani, Jason D. Lee, "Learning Hierarchical Polynomials with Three-Layer Neural Networks", ICLR 2024,
https://arxiv.org/abs/2311.13774.

The target $h(x) = g(p(x))$ applies a scalar polynomial g of degree q to a hidden polynomial p of degree k of Gaussian
inputs in d dimensions. Kernels need about $d^{kq}$ samples. A three-layer network needs about $d^k$: its first stage,
regression on random features, can only see the part of h of degree k, which is nearly p; the second stage then fits the
scalar g. Both stages are convex, and their gradient descent is known in closed form.

    target = HierarchicalPolynomial(24)
    X, y = target.sample(8000)
    model = LayerwiseThreeLayerRegressor().fit(X, y)
    feature_recovery(model, target, target.sample(5000, seed=1)[0]).correlation
    model.module_        # the same map as a plain three-layer nn.Module
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio.theory.feature_measures import FeatureRecovery, feature_recovery, sample_complexity
from torchfolio.theory.hierarchical_target import HierarchicalPolynomial, hermite
from torchfolio.theory.lazy_regression import (
    RandomFeatureRidge,
    SpectralDescent,
    TunedKernelRidge,
    activation,
    gradient_descent,
    random_features,
    tuned_weights,
)

__all__ = [
    "FeatureRecovery",
    "HierarchicalPolynomial",
    "LayerwiseThreeLayerRegressor",
    "RandomFeatureRidge",
    "SpectralDescent",
    "ThreeLayerNetwork",
    "TunedKernelRidge",
    "feature_recovery",
    "gradient_descent",
    "hermite",
    "sample_complexity",
]


class ThreeLayerNetwork(nn.Module):
    """$h(x) = f + \\sum_i c_i\\, \\mathrm{relu}(a_i f + b_i) + \\text{const}$ of a scalar feature
    $f(x) = \\langle u, \\sigma(Vx + s) \\rangle + \\text{const}$.

    Args:
        d: number of inputs.
        m1: neurons on the feature.
        m2: neurons on the inputs.
        inner: activation of these: `"softplus"`, `"relu"`, `"gelu"` or `"quadratic"`.
        skip: whether the feature itself is added to the output.

    Shapes:
        `[n, d]` to `[n]`.
    """

    def __init__(self, d: int, m1: int, m2: int, inner: str = "softplus", skip: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(d, m2)
        self.activation = activation(inner)
        self.bottleneck = nn.Linear(m2, 1)
        self.outer = nn.Linear(1, m1)
        self.readout = nn.Linear(m1, 1)
        self.skip = skip

    def feature(self, x: Tensor) -> Tensor:
        """The scalar feature f, `[n]`."""
        return self.bottleneck(self.activation(self.inner(x)))[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        f = self.feature(x)
        output = self.readout(torch.relu(self.outer(f[:, None])))[:, 0]
        return output + f if self.skip else output


class LayerwiseThreeLayerRegressor(RegressorMixin, BaseEstimator):
    """Three-layer network trained one layer at a time: a scalar feature on half of the data, its link on the other half.

    1. On the first part: ridge regression, or T steps of gradient descent, of y on $\\sigma(Vx + s)$ with random V and s
       gives u, and so the feature $f(x) = \\langle u, \\sigma(Vx+s) \\rangle$.
    2. On the second part: the same of $y - f$ on $\\mathrm{relu}(a_i f + b_i)$ with random signs $a_i$ and uniform $b_i$.

    Features and targets are centred, and f is scaled to unit deviation for the second stage; all of it is folded into
    the network's weights.

    Args:
        m1: neurons on the feature; 400.
        m2: neurons on the inputs; 2000.
        inner: their activation, `"softplus"`, `"relu"`, `"gelu"` or `"quadratic"`.
        decay1: weight decay of the first stage, at least 0; `"cv"` chooses among 16 values from 1e-5 to 1 of the top
            eigenvalue on a fifth of the first part.
        decay2: weight decay of the second stage.
        steps1: steps of gradient descent of the first stage at the rate 1 / (top eigenvalue + decay); all, the ridge
            solution, by default.
        steps2: number of steps of the second stage.
        split: share of the data for the first stage, in (0, 1); `None` uses all data in both stages, so that the second
            one also fits what the first one's noise left.
        solver: `"spectral"`, the closed form; `"gd"`, the literal loop with the same result. There, steps of `None` are
            as many as bring the part of degree up to `degree` to a thousandth.
        degree: degree that the loop resolves where its number of steps is not given.
        bound: B of the $b_i$, uniform in [-B, B]; 4.
        skip: whether the feature itself is added to the output, as in the paper.
        random_state: seed of the split and the random weights.

    Attributes:
        module_: fitted network, a `ThreeLayerNetwork` in float64.
        decay1_: weight decay of the first stage.
        decay2_: weight decay of the second stage.
        stage1_path_: decays tried in the first stage, and the mean squared error of each on data held out.
        stage2_path_: path of the second stage.
        n_features_in_: number of inputs.

    Reference:
        Algorithm 1; Theorem 1.
    """

    _parameter_constraints = {  # noqa: RUF012
        "m1": [Interval(Integral, 1, None, closed="left")],
        "m2": [Interval(Integral, 1, None, closed="left")],
        "inner": [StrOptions({"softplus", "relu", "gelu", "quadratic"})],
        "decay1": [StrOptions({"cv"}), Interval(Real, 0, None, closed="left")],
        "decay2": [StrOptions({"cv"}), Interval(Real, 0, None, closed="left")],
        "steps1": [None, Interval(Integral, 1, None, closed="left")],
        "steps2": [None, Interval(Integral, 1, None, closed="left")],
        "split": [None, Interval(Real, 0, 1, closed="neither")],
        "solver": [StrOptions({"spectral", "gd"})],
        "degree": [Interval(Integral, 1, None, closed="left")],
        "bound": [Interval(Real, 0, None, closed="neither")],
        "skip": ["boolean"],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        m1: int = 400,
        m2: int = 2000,
        *,
        inner: str = "softplus",
        decay1: float | str = "cv",
        decay2: float | str = "cv",
        steps1: int | None = None,
        steps2: int | None = None,
        split: float | None = 0.5,
        solver: str = "spectral",
        degree: int = 2,
        bound: float = 4.0,
        skip: bool = True,
        random_state: Any = None,
    ) -> None:
        self.m1, self.m2, self.inner = m1, m2, inner
        self.decay1, self.decay2, self.steps1, self.steps2 = decay1, decay2, steps1, steps2
        self.split, self.solver, self.degree = split, solver, degree
        self.bound, self.skip, self.random_state = bound, skip, random_state

    def fit(self, X: Any, y: Any) -> LayerwiseThreeLayerRegressor:
        """Train both stages.

        Args:
            X: inputs `[n, d]`, at least 8.
            y: targets `[n]`.
        """
        self._validate_params()
        data, target = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=8)
        x, y_ = torch.tensor(data), torch.tensor(np.asarray(target, dtype=np.float64))
        random = check_random_state(self.random_state)
        generator = torch.Generator().manual_seed(int(random.randint(2**31)))
        order = torch.randperm(len(x), generator=generator)
        size = len(x) if self.split is None else min(max(round(self.split * len(x)), 4), len(x) - 4)
        first = order[:size]
        second = order if self.split is None else order[size:]
        with torch.device("meta"):  # every weight is set below; torch's own draws would touch the global generator
            network = ThreeLayerNetwork(x.shape[1], self.m1, self.m2, self.inner, self.skip).double()
        network.to_empty(device="cpu")
        with torch.no_grad():
            V, s = random_features(x.shape[1], self.m2, generator)
            network.inner.weight.copy_(V)
            network.inner.bias.copy_(s)
            center = y_[first].mean()
            self._first_stage(network, x[first], y_[first] - center, generator)
            self._second_stage(network, network.feature(x[second]), y_[second] - center, generator)
            network.readout.bias.add_(center)
        self.module_ = network.requires_grad_(False).eval()
        return self

    def _first_stage(self, network: ThreeLayerNetwork, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
        features = network.activation(network.inner(x))
        mean = features.mean(0)
        rank = math.comb(x.shape[1] + self.degree, self.degree)
        u, self.decay1_, self.stage1_path_ = tuned_weights(
            features - mean, y, self.decay1, self.steps1, self.solver, rank
        )
        network.bottleneck.weight.copy_(u)
        network.bottleneck.bias.copy_(-(mean @ u))

    def _second_stage(self, network: ThreeLayerNetwork, f: Tensor, y: Tensor, generator: torch.Generator) -> None:
        # A constant feature tells nothing; its deviation, 0, must not be divided by.
        scale = f.std(correction=0)
        scale = torch.where(scale > 1e-12, scale, 1.0)
        signs = torch.randint(2, (self.m1,), generator=generator).double() * 2 - 1
        offsets = (torch.rand(self.m1, generator=generator, dtype=torch.float64) * 2 - 1) * self.bound
        network.outer.weight.copy_((signs / scale)[:, None])
        network.outer.bias.copy_(offsets)
        features = torch.relu(network.outer(f[:, None]))
        mean, rest = features.mean(0), y - f if self.skip else y
        offset = rest.mean()
        c, self.decay2_, self.stage2_path_ = tuned_weights(
            features - mean, rest - offset, self.decay2, self.steps2, self.solver, min(10, self.m1)
        )
        network.readout.weight.copy_(c)
        network.readout.bias.copy_(offset - mean @ c)

    def _apply(self, X: Any, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        check_is_fitted(self)
        x = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64))
        with torch.no_grad():
            return torch.cat([function(part) for part in x.split(4096)]).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Targets of inputs `[n, d]`, `[n]`."""
        check_is_fitted(self)
        return self._apply(X, self.module_)

    def feature_(self, X: Any) -> np.ndarray:
        """The scalar feature f that the first stage learned, `[n]`."""
        check_is_fitted(self)
        return self._apply(X, self.module_.feature)
