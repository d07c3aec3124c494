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

The file is longer than others because it holds the target with its closed forms, the solver and the estimator.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from torchfolio import checks
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


def hermite(z: Tensor, degree: int) -> Tensor:
    """Normalised Hermite polynomials $he_0 .. he_{degree}$ of z, in a last dimension.

    $he_j = He_j/\\sqrt{j!}$ with $He_{j+1} = z\\,He_j - j\\,He_{j-1}$; orthonormal for a standard normal z.
    """
    checks.whole("degree", degree, low=0)
    values = [torch.ones_like(z), z]
    for j in range(1, degree):
        values.append((z * values[j] - math.sqrt(j) * values[j - 1]) / math.sqrt(j + 1))
    return torch.stack(values[: degree + 1], -1)


class HierarchicalPolynomial:
    """A random target $h(x) = g(p(x))$ with $p = L^{-1/2} \\sum_i \\lambda_i \\psi_i$ and $g = \\sum_j g_j he_j$.

    Args:
        d: dimension of the inputs.
        k: degree of the hidden polynomial, at least 1.
        link: coefficients $g_0, g_1, ..$ of g in normalised Hermite polynomials. The first stage sees p only through
            $g_1$.
        family: `"sum_of_hermite"`, $\\psi_i(x) = he_k(\\langle w_i, x \\rangle)$ for orthonormal $w_i$, or
            `"sum_of_monomials"`, products of k coordinates in disjoint groups.
        L: number of terms; as many as fit by default, d or d/k.
        signs: $\\lambda_i$ `[L]` with $\\sum \\lambda_i^2 = L$; by default 1 and -1 in turn.
        rotate: whether the axes are turned by a random rotation, or the rotation itself, `[d, d]` with orthonormal rows.
        seed: seed of the rotation.

    Raises:
        ValueError: if the terms do not fit into d dimensions, or an argument is out of range.

    Warns:
        UserWarning: if $g_1 = 0$, so that the first stage cannot see p.

    Reference:
        Section 2; Assumptions on the target.
    """

    def __init__(
        self,
        d: int,
        k: int = 2,
        link: Sequence[float] = (0.0, math.sqrt(0.6), math.sqrt(0.4)),
        family: Literal["sum_of_hermite", "sum_of_monomials"] = "sum_of_hermite",
        L: int | None = None,
        signs: Sequence[float] | None = None,
        rotate: bool | Tensor = True,
        seed: int = 0,
    ) -> None:
        checks.whole("d", d, low=1)
        checks.whole("k", k, low=1)
        checks.one_of("family", family, ("sum_of_hermite", "sum_of_monomials"))
        room = d if family == "sum_of_hermite" else d // k
        L = room if L is None else checks.whole("L", L, low=1)
        if not 1 <= L <= room:
            raise ValueError(f"expected at most {room} terms of {family} with k = {k} in {d} dimensions, got {L}")
        self.d, self.k, self.family, self.L, self.seed = d, k, family, L, seed
        self.link = torch.as_tensor(tuple(link), dtype=torch.float64)
        if len(self.link) < 2 or not bool(self.link.isfinite().all()):
            raise ValueError(f"expected at least two finite coefficients of the link, got {tuple(link)}")
        if float(self.link[1]) == 0:
            warnings.warn("the link has no linear part, so that the first stage cannot see p", stacklevel=2)
        turns = (-1.0) ** torch.arange(L, dtype=torch.float64)
        self.signs = turns if signs is None else torch.as_tensor(tuple(signs), dtype=torch.float64)
        if self.signs.shape != (L,) or not math.isclose(float(self.signs.square().sum()), L, rel_tol=1e-6):
            raise ValueError(f"expected {L} signs whose squares sum to {L}, got {self.signs.tolist()}")
        self.axes = self._axes(rotate)

    def __repr__(self) -> str:
        link = tuple(round(float(g), 4) for g in self.link)
        return f"HierarchicalPolynomial({self.d}, k={self.k}, link={link}, family={self.family!r}, L={self.L})"

    def _axes(self, rotate: bool | Tensor) -> Tensor:
        eye = torch.eye(self.d, dtype=torch.float64)
        if isinstance(rotate, Tensor):
            Q = rotate.double()
            if Q.shape != eye.shape or not torch.allclose(Q @ Q.T, eye, atol=1e-5):
                raise ValueError(f"expected a rotation [{self.d}, {self.d}] with orthonormal rows")
            return Q
        if not rotate:
            return eye
        generator = torch.Generator().manual_seed(self.seed)
        Q, R = torch.linalg.qr(torch.randn(self.d, self.d, generator=generator, dtype=torch.float64))
        return (Q * R.diagonal().sign()).T  # uniform over rotations and reflections

    def features(self, x: Tensor) -> Tensor:
        """The orthonormal $\\psi_i(x)$, `[n, L]`."""
        z = self._inputs(x) @ self.axes.to(x).T
        if self.family == "sum_of_hermite":
            return hermite(z[:, : self.L], self.k)[..., self.k]
        return z[:, : self.L * self.k].unflatten(1, (self.L, self.k)).prod(-1)

    def p(self, x: Tensor) -> Tensor:
        """The hidden polynomial, `[n]`; mean 0 and variance 1."""
        return self.features(x) @ (self.signs / math.sqrt(self.L)).to(x)

    def g(self, z: Tensor) -> Tensor:
        """The link, of the shape of z."""
        return hermite(z, len(self.link) - 1) @ self.link.to(z)

    def __call__(self, x: Tensor) -> Tensor:
        return self.g(self.p(x))

    def sample(self, n: int, seed: int = 0, noise: float = 0.0) -> tuple[Tensor, Tensor]:
        """Standard normal inputs `[n, d]` and their targets `[n]`, in float64.

        Args:
            n: number of examples.
            seed: seed of the inputs, independent of the rotation's.
            noise: standard deviation of normal noise on the targets.
        """
        checks.whole("n", n, low=1)
        checks.at_least("noise", noise, 0)
        state = np.random.SeedSequence([checks.whole("seed", seed, low=0), n, 2]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        x = torch.randn(n, self.d, generator=generator, dtype=torch.float64)
        return x, self(x) + noise * torch.randn(n, generator=generator, dtype=torch.float64)

    def _square(self) -> float:
        """Coefficient of $\\psi_i$ in the degree-k part of $\\psi_i^2$, for Hermite terms: 0 for odd k."""
        if self.family != "sum_of_hermite" or self.k % 2:
            return 0.0
        half = self.k // 2
        return math.factorial(half) * math.comb(self.k, half) ** 2 / math.sqrt(math.factorial(self.k))

    def coefficients(self) -> Tensor:
        """Coefficients `[L]` of the degree-k part of h along the $\\psi_i$:
        $g_1 \\lambda_i/\\sqrt L + \\frac{g_2}{\\sqrt2} \\frac{c_k}{L} \\lambda_i^2$ with $c_2 = 2\\sqrt2$, $c_k = 0$ for odd k.

        Raises:
            ValueError: for links of a degree above 2 where k > 1, for which no closed form is at hand.
        """
        if self.k > 1 and bool((self.link[3:] != 0).any()):
            raise ValueError(f"expected a link of degree at most 2 for the closed form, got {len(self.link) - 1}")
        linear = self.link[1] * self.signs / math.sqrt(self.L)
        if len(self.link) < 3 or (self.k == 1 and self.L == 1):
            return linear
        return linear + self.link[2] / math.sqrt(2) * self._square() / self.L * self.signs.square()

    def projection_degree_k(self, x: Tensor) -> Tensor:
        """The part of h of degree k, $P_k h(x)$, in closed form, `[n]`.

        Raises:
            ValueError: where no closed form is at hand; see `coefficients`.
        """
        part = self.features(x) @ self.coefficients().to(x)
        if self.family == "sum_of_monomials" and self.k % 2 == 0 and len(self.link) > 2:
            z = (self._inputs(x) @ self.axes.to(x).T)[:, : self.L * self.k].unflatten(1, (self.L, self.k))
            # The square of a monomial is the product of 1 + (z^2 - 1): the terms with k / 2 factors are of degree k.
            chosen = _elementary(z.square() - 1, self.k // 2)
            part = part + self.link[2].to(x) / math.sqrt(2) / self.L * (chosen @ self.signs.square().to(x))
        return part

    def recovery_limit(self) -> float:
        """Correlation of $P_k h$ with p: what the first stage tends to with ever more samples, for this number of terms.

        For $|\\lambda_i| = 1$, $\\sum \\lambda_i = 0$ and k = 2 it is $g_1/\\sqrt{g_1^2 + 4 g_2^2/L}$.
        """
        a, weights = self.coefficients(), self.signs / math.sqrt(self.L)
        power = float(a.square().sum())
        if self.family == "sum_of_monomials" and self.k % 2 == 0 and len(self.link) > 2:
            terms = math.comb(self.k, self.k // 2) * 2 ** (self.k // 2)
            power += float(self.link[2] ** 2 / 2 / self.L**2 * self.signs.pow(4).sum() * terms)
        return float(a @ weights) / math.sqrt(power) if power else 0.0

    def _inputs(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.d or not x.is_floating_point():
            raise ValueError(f"expected inputs [n, {self.d}] of a floating type, got {x.dtype} {tuple(x.shape)}")
        return x


def _elementary(values: Tensor, order: int) -> Tensor:
    """Elementary symmetric polynomial of an order over the last dimension."""
    sums = [torch.ones_like(values[..., 0])] + [torch.zeros_like(values[..., 0])] * order
    for value in values.unbind(-1):
        sums = [sums[0]] + [sums[j] + value * sums[j - 1] for j in range(1, order + 1)]
    return sums[order]


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
        decay2: the same for the second stage.
        steps1: steps of gradient descent of the first stage at the rate 1 / (top eigenvalue + decay); all, the ridge
            solution, by default.
        steps2: the same for the second stage.
        split: share of the data for the first stage, in (0, 1); `None` uses all data in both stages, so that the second
            one also fits what the first one's noise left.
        solver: `"spectral"`, the closed form; `"gd"`, the literal loop with the same result. There, steps of `None` are
            as many as bring the part of degree up to `degree` to a thousandth.
        degree: degree that the loop resolves where its number of steps is not given.
        bound: B of the $b_i$, uniform in [-B, B]; 4.
        skip: whether the feature itself is added to the output, as in the paper.
        random_state: seed of the split and the random weights.

    Attributes:
        module_: the fitted network, a `ThreeLayerNetwork` in float64.
        decay1_: weight decay of the first stage.
        decay2_: weight decay of the second stage.
        stage1_path_: decays tried in the first stage, and the mean squared error of each on data held out.
        stage2_path_: the same for the second stage.
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


class FeatureRecovery(NamedTuple):
    """How well a feature is the hidden polynomial.

    Attributes:
        correlation: of f with p, times the sign of $g_1$: 1 if the network found p.
        target_correlation: of h itself with p, in absolute value.
        feature: f at the inputs, scaled by regression on p's scale and sign `[n]`.
        hidden: p at the inputs `[n]`.
    """

    correlation: float
    target_correlation: float
    feature: np.ndarray
    hidden: np.ndarray


def feature_recovery(model: Any, target: HierarchicalPolynomial, X: Tensor) -> FeatureRecovery:
    """Compare what the first stage learned with the hidden polynomial.

    Args:
        model: a fitted `LayerwiseThreeLayerRegressor`, or anything with `feature_(X)`.
        target: what it was trained on.
        X: inputs `[n, d]`.
    """
    x = torch.as_tensor(X, dtype=torch.float64)
    f, p, h = np.asarray(model.feature_(x.numpy())), target.p(x).numpy(), target(x).numpy()
    sign = 1.0 if float(target.link[1]) >= 0 else -1.0
    deviation = f.std()
    aligned = sign * (f - f.mean()) / (deviation if deviation > 0 else 1.0)
    return FeatureRecovery(sign * _correlation(f, p), abs(_correlation(h, p)), aligned, p)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() <= 1e-12 * max(1.0, abs(a.mean())) or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def sample_complexity(
    d_list: Sequence[int],
    n_list: Sequence[int],
    target: Callable[[int], HierarchicalPolynomial],
    models: dict[str, Callable[[int, int], Any]],
    *,
    n_test: int = 5000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Test errors over dimensions and numbers of samples.

    Args:
        d_list: dimensions.
        n_list: numbers of all training samples.
        target: from d to the target, such as `HierarchicalPolynomial`.
        models: by name, a function from d and n to a regressor that has not been fitted.
        n_test: fresh samples to test on.
        seed: seed of the samples.

    Returns:
        A row for each: `d`, `n`, `n/d^k`, `n/d^kq`, `model`, `test_mse_rel` (mean squared error over the targets'
        variance) and `corr` (of the feature with p; NaN for models without one). `pandas.DataFrame` takes them.
    """
    rows = []
    for d in d_list:
        truth = target(d)
        q = len(truth.link) - 1
        x_test, y_test = truth.sample(n_test, seed=seed + 1)
        for n in n_list:
            x, y = truth.sample(n, seed=seed)
            for name, make in models.items():
                model = make(d, n).fit(x.numpy(), y.numpy())
                error = float(np.mean((model.predict(x_test.numpy()) - y_test.numpy()) ** 2) / y_test.numpy().var())
                learned = hasattr(model, "feature_")
                corr = feature_recovery(model, truth, x_test).correlation if learned else math.nan
                scale = {"n/d^k": n / d**truth.k, "n/d^kq": n / d ** (truth.k * q)}
                rows.append({"d": d, "n": n, **scale, "model": name, "test_mse_rel": error, "corr": corr})
    return rows
