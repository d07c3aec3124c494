"""Gaussian processes of infinitely wide networks whose last layer has a random scale.

Hyungi Lee, Eunggu Yun, Hongseok Yang, Juho Lee, "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022,
https://arxiv.org/abs/2107.01408.

Draw the variance $\\sigma^2$ of the last layer's weights from a prior $H$, once for all inputs and outputs. The infinitely
wide network is then a scale mixture of Gaussian processes, $f \\mid \\sigma^2 \\sim GP(0, \\sigma^2 K)$ with its NNGP
kernel $K$: for an inverse-gamma prior $(a, b)$ a Student-t process of $2a$ degrees of freedom and scale $(b / a) K$. The
noise $\\varepsilon$ is scaled along, $C = K + \\varepsilon I$, which keeps regression exact:

$$\\sigma^2 \\mid y \\sim \\mathrm{InvGamma}(a + N/2,\\; b + y^\\top C^{-1} y / 2), \\qquad
f_* \\mid y \\sim t_{2a + N}\\Bigl(K_* C^{-1} y,\\;
\\frac{2b + y^\\top C^{-1} y}{2a + N} (K_{**} - K_* C^{-1} K_*^\\top)\\Bigr).$$

With many points this is a Gaussian process whose scale is fitted; it differs for few points, outliers and shifts. One
Cholesky factor gives mean, evidence and weights. Predictive distributions include the noise.

The module is longer than most since it has a regressor for two kinds of priors, a classifier, kernels as modules and an
initialisation.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data
from torch import Tensor, nn
from torch.distributions import Distribution, InverseGamma
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.engine import seeded
from torchfolio.theory.dual_activations import Activation, DualActivation, dual_activation
from torchfolio.theory.infinite_kernels import conv_nngp, nngp
from torchfolio.theory.scale_priors import Burr12, NormalMixture, StudentT, draw

__all__ = [
    "Burr12",
    "ConvNNGPKernel",
    "InverseGamma",
    "NNGPKernel",
    "ScaleMixtureRegressor",
    "SparseStudentTClassifier",
    "StudentTProcessRegressor",
    "kl_inverse_gamma",
    "sample_prior",
    "scale_mixture_init_",
]

JITTER, LARGEST_JITTER = 1e-8, 1e-3


# Kernels


def _raw(value: float) -> nn.Parameter:
    """What softplus takes to a positive number."""
    return nn.Parameter(torch.tensor(value + math.log(-math.expm1(-value)), dtype=torch.float64))


class NNGPKernel(nn.Module):
    """Covariance of an infinitely wide fully connected network with unit last-layer variance; its variances can be
    trained.

    Args:
        depth: number of hidden layers.
        activation: name, module, function or dual; see `dual_activation`.
        weight_var: variance of weights times their fan-in, above 0; 2 keeps the scale of ReLU.
        bias_var: variance of biases, above 0.

    Shapes:
        `[n, d]`, `[m, d]` to `[n, m]`; one argument gives the symmetric kernel.
    """

    def __init__(
        self, depth: int = 4, activation: Activation = "relu", *, weight_var: float = 2.0, bias_var: float = 0.01
    ) -> None:
        super().__init__()
        self.depth = checks.whole("depth", depth, 1)
        self.dual: DualActivation = dual_activation(activation)
        self.raw_weight_var = _raw(float(checks.positive("weight_var", weight_var)))
        self.raw_bias_var = _raw(float(checks.positive("bias_var", bias_var)))

    @classmethod
    def of(cls, network: nn.Sequential) -> NNGPKernel:
        """The kernel of `Linear, activation, …, Linear`, with the mean variances of its weights and biases.

        Raises:
            ValueError: if the network is of another form, or its activations differ.
        """
        layers = list(network)
        linear, activations = layers[::2], layers[1::2]
        if len(layers) < 3 or len(layers) % 2 == 0 or not all(isinstance(m, nn.Linear) for m in linear):
            raise ValueError(f"expected Linear, activation, …, Linear, got {[type(m).__name__ for m in layers]}")
        if len({repr(m) for m in activations}) > 1:
            raise ValueError(f"expected one activation, got {sorted({repr(m) for m in activations})}")
        hidden: list[Any] = linear[:-1]
        weight_var = float(np.mean([m.weight.detach().square().mean().item() * m.in_features for m in hidden]))
        biases = [m.bias.detach().square().mean().item() for m in hidden if m.bias is not None]
        bias_var = max(float(np.mean(biases)) if biases else 0.0, 1e-12)
        return cls(len(activations), activations[0], weight_var=weight_var, bias_var=bias_var)

    @property
    def variances(self) -> tuple[Tensor, Tensor]:
        """Variances of weights and of biases."""
        return F.softplus(self.raw_weight_var), F.softplus(self.raw_bias_var)

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        weight, bias = self.variances
        return nngp(x1, x2, self.dual, self.depth, weight_var=weight, bias_var=bias)

    def diagonal(self, x: Tensor) -> Tensor:
        """Variances `[n]`."""
        weight, bias = self.variances
        value = weight * x.double().square().mean(1) + bias
        for _ in range(self.depth - 1):
            value = weight * self.dual.diagonal(value) + bias
        return self.dual.diagonal(value)

    def extra_repr(self) -> str:
        weight, bias = self.variances
        return f"depth={self.depth}, {self.dual!r}, weight_var={weight.item():.4g}, bias_var={bias.item():.4g}"


class ConvNNGPKernel(NNGPKernel):
    """Covariance of a convolutional network (3 × 3, same size, flattened readout) of infinitely many channels.

    Args:
        image_shape: `(channels, height, width)`, into which rows are shaped.
        depth: number of hidden layers.
        activation: name, module, function or dual.
        weight_var: variance of weights times their fan-in, above 0.
        bias_var: variance of biases, above 0.

    Shapes:
        `[n, d]` or `[n, channels, height, width]`, likewise `[m, …]`, to `[n, m]`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        depth: int = 4,
        activation: Activation = "relu",
        *,
        weight_var: float = 2.0,
        bias_var: float = 0.01,
    ) -> None:
        super().__init__(depth, activation, weight_var=weight_var, bias_var=bias_var)
        self.image_shape = tuple(image_shape)

    def forward(self, x1: Tensor, x2: Tensor | None = None) -> Tensor:
        weight, bias = self.variances
        first = x1.reshape(-1, *self.image_shape)
        second = None if x2 is None else x2.reshape(-1, *self.image_shape)
        return conv_nngp(first, second, self.dual, self.depth, weight_var=weight, bias_var=bias)

    def diagonal(self, x: Tensor) -> Tensor:
        (weight, bias), window = self.variances, nn.AvgPool2d(3, 1, 1)
        value = x.double().reshape(-1, *self.image_shape).square().mean(1, keepdim=True)
        for _ in range(self.depth):
            value = self.dual.diagonal(weight * window(value) + bias)
        return value.mean((1, 2, 3))


# Regression


class _ScaleMixture(RegressorMixin, BaseEstimator):
    """What the regressors share: one Cholesky factor for mean, evidence and predictive scales."""

    kernel: NNGPKernel | None
    noise: float
    noise_: float
    normalize_y: bool

    def _prepare(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        checks.positive("noise", self.noise)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        self.kernel_ = NNGPKernel() if self.kernel is None else copy.deepcopy(self.kernel)
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
            return_dist: give the predictive distribution instead, with `log_prob`, `quantile`, `mean`, `stddev`.

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


def t_evidence(y: Tensor, factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """$\\log t_{2a}(y; 0, (b/a) C)$ from the Cholesky factor of $C$."""
    n = len(y)
    quadratic = torch.linalg.solve_triangular(factor, y[:, None], upper=False).square().sum()
    log_det = 2 * factor.diagonal().log().sum()
    gammas = torch.lgamma(a + n / 2) - torch.lgamma(a) - n / 2 * (2 * math.pi * b).log()
    return gammas - log_det / 2 - (a + n / 2) * torch.log1p(quadratic / (2 * b))


class StudentTProcessRegressor(_ScaleMixture):
    """Regression by the Student-t process of an infinitely wide network, or its Gaussian twin.

    Args:
        kernel: `NNGPKernel` or another module with its two methods, `NNGPKernel()` by default; left as it is.
        a: shape of the inverse-gamma prior, above 0; the prior has $2a$ degrees of freedom.
        b: its scale, above 0.
        noise: variance $\\varepsilon$ of the noise relative to $\\sigma^2$, above 0.
        prior: `"inverse_gamma"`; `"fixed"` for the Gaussian process of variance `b / a`; `"evidence"` for the
            Gaussian process of the variance that the data make most likely.
        optimize: whether kernel, noise, $a$ and $b$ (for the Gaussian process: its variance) maximise the evidence.
        steps: number of Adam steps for that.
        lr: learning rate; halved when the evidence has not improved for 20 steps.
        normalize_y: whether targets are standardised inside.

    Attributes:
        kernel_: trained kernel.
        a_: trained shape.
        b_: trained scale.
        noise_: trained noise.
        df_: degrees of freedom of predictions, $2a + N$.
        log_marginal_likelihood_: log evidence of the targets in their own units.
        scale_posterior_: shape and scale of the inverse-gamma posterior of $\\sigma^2$ (of standardised targets).

    Raises:
        ValueError: from `fit`, on settings out of range or a kernel that cannot be factored.

    Reference:
        Lee et al., theorem 3.1 and section 3.3.

    Example:
        >>> X = np.linspace(0, 1, 10)[:, None]
        >>> model = StudentTProcessRegressor(optimize=False).fit(X, X[:, 0] ** 2)
        >>> model.df_
        14.0
    """

    def __init__(
        self,
        kernel: NNGPKernel | None = None,
        *,
        a: float = 2.0,
        b: float = 2.0,
        noise: float = 1e-2,
        prior: Literal["inverse_gamma", "fixed", "evidence"] = "inverse_gamma",
        optimize: bool = True,
        steps: int = 200,
        lr: float = 1e-2,
        normalize_y: bool = True,
    ) -> None:
        self.kernel = kernel
        self.a = a
        self.b = b
        self.noise = noise
        self.prior = prior
        self.optimize = optimize
        self.steps = steps
        self.lr = lr
        self.normalize_y = normalize_y

    def fit(self, X: Any, y: Any) -> StudentTProcessRegressor:
        """Condition on data.

        Args:
            X: inputs `[N, features]`.
            y: targets `[N]`.
        """
        for name in ("a", "b", "lr"):
            checks.positive(name, getattr(self, name))
        checks.one_of("prior", self.prior, ("inverse_gamma", "fixed", "evidence"))
        checks.whole("steps", self.steps, 0)
        inputs, targets = self._prepare(X, y)
        self.a_, self.b_, self.noise_ = float(self.a), float(self.b), float(self.noise)
        if self.optimize:
            self._optimise(inputs, targets)
        self._factorise(inputs, targets)
        n = len(targets)
        self.scale_posterior_ = (self.a_ + n / 2, self.b_ + self.quadratic_ / 2)
        self.df_ = 2 * self.a_ + n if self.prior == "inverse_gamma" else math.inf
        if self.prior == "evidence":
            self.variance_ = max(self.quadratic_ / n, np.finfo(float).tiny)
        elif self.prior == "fixed":
            self.variance_ = self.b_ / self.a_
        else:
            self.variance_ = (2 * self.b_ + self.quadratic_) / self.df_
        with torch.no_grad():
            evidence = self._evidence(targets, torch.from_numpy(self.factor_), *map(torch.tensor, (self.a_, self.b_)))
        self.log_marginal_likelihood_ = float(evidence) - n * math.log(self.y_scale_)
        return self

    def _evidence(self, y: Tensor, factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.double(), b.double()
        if self.prior == "inverse_gamma":
            return t_evidence(y, factor, a, b)
        n = len(y)
        quadratic = torch.linalg.solve_triangular(factor, y[:, None], upper=False).square().sum()
        variance = b / a if self.prior == "fixed" else quadratic / n
        log_det = 2 * factor.diagonal().log().sum()
        return -(quadratic / variance + n * (2 * math.pi * variance).log() + log_det) / 2

    def _optimise(self, X: Tensor, y: Tensor) -> None:
        raws = [_raw(value) for value in (self.a_, self.b_, self.noise_)]
        # For a Gaussian process only b / a matters.
        trained = [*self.kernel_.parameters(), raws[2], *(raws[:2] if self.prior == "inverse_gamma" else raws[1:2])]
        optimizer = torch.optim.Adam(trained, lr=self.lr)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=20)
        for _ in range(self.steps):
            optimizer.zero_grad()
            a, b, noise = (F.softplus(raw) for raw in raws)
            loss = -self._evidence(y, cholesky(self.kernel_(X), noise), a, b) / len(y)
            loss.backward()
            optimizer.step()
            plateau.step(loss.detach())
        self.a_, self.b_, self.noise_ = (F.softplus(raw).item() for raw in raws)

    def _distribution(self, X: Any) -> StudentT:
        location, scale = self._locations(X)
        return StudentT(self.df_, location, scale * math.sqrt(self.variance_))


class ScaleMixtureRegressor(_ScaleMixture):
    """Regression by an infinitely wide network whose last-layer variance has any prior.

    Args:
        kernel: `NNGPKernel` or another module with its two methods, `NNGPKernel()` by default; left as it is, not trained.
        prior: distribution on positive numbers with `log_prob` and `sample`; `InverseGamma(2, 2)` by default.
        noise: variance of the noise relative to $\\sigma^2$, above 0.
        inference: `"quadrature"` over $\\ln \\sigma^2$, exact to rounding; or `"importance"`, the paper's sampling, which
            wastes its samples when $N$ is large.
        proposal: distribution to draw from in importance sampling; the prior by default.
        nodes: number of nodes or samples; 200 and 1,000 by default.
        normalize_y: whether targets are standardised inside.
        random_state: seed of the samples.

    Attributes:
        weights_: posterior weights `[S]`.
        variances_: values $\\sigma_s^2$ `[S]`.
        effective_sample_size_: $1 / \\sum_s w_s^2$.
        log_marginal_likelihood_: log evidence of the targets in their own units.

    Warns:
        UserWarning: from `fit`, if fewer than ten samples carry the weight.

    Reference:
        Lee et al., section 3.3, "Generalisation to other priors".
    """

    def __init__(
        self,
        kernel: NNGPKernel | None = None,
        *,
        prior: Distribution | None = None,
        noise: float = 1e-2,
        inference: Literal["quadrature", "importance"] = "quadrature",
        proposal: Distribution | None = None,
        nodes: int | None = None,
        normalize_y: bool = True,
        random_state: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.prior = prior
        self.noise = noise
        self.inference = inference
        self.proposal = proposal
        self.nodes = nodes
        self.normalize_y = normalize_y
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> ScaleMixtureRegressor:
        """Condition on data.

        Args:
            X: inputs `[N, features]`.
            y: targets `[N]`.
        """
        checks.one_of("inference", self.inference, ("quadrature", "importance"))
        prior = InverseGamma(torch.tensor(2.0), torch.tensor(2.0)) if self.prior is None else self.prior
        for name, value in (("prior", prior), ("proposal", self.proposal)):
            if value is not None and not (hasattr(value, "log_prob") and hasattr(value, "sample")):
                raise TypeError(f"expected {name} to be a torch distribution, got {type(value).__name__}")
        inputs, targets = self._prepare(X, y)
        self.noise_ = float(self.noise)
        self._factorise(inputs, targets)
        if self.inference == "quadrature":
            log_weight, values = self._quadrature(prior, checks.whole("nodes", self.nodes or 200, 10))
        else:
            log_weight, values = self._importance(prior, checks.whole("nodes", self.nodes or 1000, 1))
        total = torch.logsumexp(log_weight, 0)
        weights = (log_weight - total).exp()
        kept = weights > 0
        self.weights_, self.variances_ = weights[kept].numpy(), values[kept].numpy()
        self.effective_sample_size_ = float(1 / weights.square().sum())
        if self.inference == "importance" and self.effective_sample_size_ < 10:
            warnings.warn(
                f"{self.effective_sample_size_:.1f} of {len(weights)} samples carry the weight; use quadrature, more "
                "nodes or a proposal near the posterior",
                stacklevel=2,
            )
        self.log_marginal_likelihood_ = float(total) - len(targets) * math.log(self.y_scale_)
        return self

    def _likelihood(self, log_variance: Tensor) -> Tensor:
        """$\\ln N(y; 0, \\sigma^2 C)$ for many variances from one factor."""
        n = len(self.X_)
        return (
            -(self.quadratic_ * torch.exp(-log_variance) + n * (math.log(2 * math.pi) + log_variance) + self.log_det_)
            / 2
        )

    def _quadrature(self, prior: Distribution, nodes: int) -> tuple[Tensor, Tensor]:
        """Trapezoids over the stretch of $\\ln \\sigma^2$ that matters: exponentially accurate for smooth densities."""

        def joint(u: Tensor) -> Tensor:
            log_prior = torch.as_tensor(prior.log_prob(u.exp()), dtype=torch.float64)
            return torch.nan_to_num(log_prior + u + self._likelihood(u), nan=-math.inf)

        low, high = -100.0, 100.0
        for _ in range(3):
            u = torch.linspace(low, high, 4000, dtype=torch.float64)
            value = joint(u)
            if not bool(torch.isfinite(value.max())):
                raise ValueError("expected a prior with a finite density somewhere in [1e-43, 1e43]")
            inside = u[value > value.max() - 42]
            step = (high - low) / 3999
            low, high = float(inside[0]) - step, float(inside[-1]) + step
        u = torch.linspace(low, high, nodes, dtype=torch.float64)
        return joint(u) + math.log((high - low) / (nodes - 1)), u.exp()

    def _importance(self, prior: Distribution, samples: int) -> tuple[Tensor, Tensor]:
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        proposal = prior if self.proposal is None else self.proposal
        values = draw(proposal, samples, torch.Generator().manual_seed(seed))
        log_weight = self._likelihood(values.log()) - math.log(samples)
        if proposal is not prior:
            log_weight = log_weight + prior.log_prob(values) - proposal.log_prob(values)
        return log_weight.double(), values

    def _distribution(self, X: Any) -> NormalMixture:
        location, scale = self._locations(X)
        return NormalMixture(torch.from_numpy(self.weights_), torch.from_numpy(self.variances_), location, scale)


# Classification


def kl_inverse_gamma(a_q: Tensor, b_q: Tensor, a: float, b: float) -> Tensor:
    """Divergence of the inverse-gamma distribution $(a_q, b_q)$ from $(a, b)$."""
    return (
        a * (b_q / b).log()
        - torch.lgamma(a_q)
        + math.lgamma(a)
        + (a_q - a) * torch.digamma(a_q)
        + (b - b_q) * a_q / b_q
    )


class _SparseProcess(nn.Module):
    """$q(u_c \\mid \\sigma^2) = N(L m_c, \\sigma^2 L S_c L^\\top)$ at inducing inputs, $K_{ZZ} = LL^\\top$, $S_c$ diagonal."""

    def __init__(self, kernel: NNGPKernel, Z: Tensor, classes: int, prior: tuple[float, float] | None) -> None:
        super().__init__()
        self.kernel, self.prior = kernel, prior
        self.Z = nn.Parameter(Z.clone())
        self.mean = nn.Parameter(torch.zeros(len(Z), classes, dtype=torch.float64))
        self.raw_scale = nn.Parameter(torch.full((len(Z), classes), math.log(math.e - 1), dtype=torch.float64))
        self.raw = nn.ParameterList([_raw(value) for value in (prior or (1.0,))])

    def marginals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Means and variances `[n, classes]` at $\\sigma^2 = 1$; only marginal ones are ever needed."""
        factor = cholesky(self.kernel(self.Z), 1e-6)
        half = torch.linalg.solve_triangular(factor, self.kernel(self.Z, x), upper=False).T
        rest = (self.kernel.diagonal(x) - half.square().sum(1)).clamp_min(1e-12)
        scale = F.softplus(self.raw_scale)
        return half @ self.mean, half.square() @ scale.square() + rest[:, None]

    def scales(self, samples: int) -> Tensor:
        """Draws of $\\sigma$ `[samples, 1, 1]`: one for all points and classes."""
        if self.prior is None:
            return F.softplus(self.raw[0]).expand(samples, 1, 1)  # trained with the Gaussian twin's last layer
        a, b = (F.softplus(raw) for raw in self.raw)
        return (b / torch.distributions.Gamma(a, torch.ones_like(a)).rsample(torch.Size((samples, 1, 1)))).sqrt()

    def values(self, mean: Tensor, variance: Tensor, scales: Tensor) -> Tensor:
        """Draws `[samples, n, classes]` of the process by its marginals."""
        noise = torch.randn(len(scales), *mean.shape, dtype=mean.dtype)
        return mean * (scales if self.prior is None else 1) + scales * variance.sqrt() * noise

    def divergence(self) -> Tensor:
        squares, scale = self.mean.square().sum(), F.softplus(self.raw_scale)
        rest = (scale.square() - 1 - 2 * scale.log()).sum()
        if self.prior is None:
            return (squares + rest) / 2
        a, b = (F.softplus(raw) for raw in self.raw)
        return (a / b * squares + rest) / 2 + kl_inverse_gamma(a, b, *self.prior)


class SparseStudentTClassifier(ClassifierMixin, BaseEstimator):
    """Classification by a scale mixture of network Gaussian processes, with inducing points and variational inference.

    Maximises $E[\\log \\mathrm{softmax}_y f] - \\mathrm{KL} / N$ over inducing inputs, the distributions of their values
    and of $\\sigma^2$, and the kernel's variances. A draw has one $\\sigma^2$ for all points and classes.

    Args:
        kernel: `NNGPKernel` or another module with its two methods, `NNGPKernel()` by default; left as it is.
        n_inducing: number of inducing points, by class in proportion to the training points.
        prior: shape and scale of the inverse-gamma prior; `"fixed"` for the Gaussian twin with a trained scale.
        epochs: passes over the training points.
        batch_size: points of a batch.
        samples: draws for a training step.
        test_samples: draws for a prediction.
        lr: learning rate of Adam; falls to 0 by a cosine.
        random_state: seed of inducing points, order and draws.

    Attributes:
        classes_: labels.
        process_: trained module.
        elbo_: bound for each datum, mean of every epoch.

    Raises:
        ValueError: from `fit`, on settings out of range.

    Reference:
        Lee et al., section 3.4. Whitened, and with one scale a draw, where the authors' code draws one for each class
        and coordinate.
    """

    def __init__(
        self,
        kernel: NNGPKernel | None = None,
        *,
        n_inducing: int = 100,
        prior: tuple[float, float] | Literal["fixed"] = (2.0, 2.0),
        epochs: int = 100,
        batch_size: int = 100,
        samples: int = 20,
        test_samples: int = 1000,
        lr: float = 1e-2,
        random_state: int | None = None,
    ) -> None:
        self.kernel = kernel
        self.n_inducing = n_inducing
        self.prior = prior
        self.epochs = epochs
        self.batch_size = batch_size
        self.samples = samples
        self.test_samples = test_samples
        self.lr = lr
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> SparseStudentTClassifier:
        """Train on inputs `[N, features]` with labels `[N]`."""
        for name in ("n_inducing", "epochs", "batch_size", "samples", "test_samples"):
            checks.whole(name, getattr(self, name), 1)
        checks.positive("lr", self.lr)
        if self.prior != "fixed":
            for name, value in zip("ab", self.prior, strict=True):
                checks.positive(f"the prior's {name}", value)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"expected two classes or more, got 1 class: {self.classes_[0]!r}")
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        with seeded(self.seed_):
            self._train(torch.from_numpy(X), torch.from_numpy(codes))
        return self

    def _train(self, X: Tensor, y: Tensor) -> None:
        kernel = NNGPKernel() if self.kernel is None else copy.deepcopy(self.kernel)
        prior = None if self.prior == "fixed" else (float(self.prior[0]), float(self.prior[1]))
        # Every k-th point of a random order by class has the classes in proportion.
        order = torch.argsort(y + torch.rand(len(y)) / 2)
        chosen = order[torch.linspace(0, len(y) - 1, min(self.n_inducing, len(y))).round().long()]
        process = _SparseProcess(kernel, X[chosen], len(self.classes_), prior)
        optimizer = torch.optim.Adam(process.parameters(), lr=self.lr)
        batches = -(-len(X) // self.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * batches)
        self.elbo_ = []
        for _ in range(self.epochs):
            bounds = []
            for rows in torch.randperm(len(X)).split(self.batch_size):
                optimizer.zero_grad()
                logits = process.values(*process.marginals(X[rows]), process.scales(self.samples)).log_softmax(-1)
                fits = logits.gather(-1, y[rows].expand(self.samples, -1)[..., None]).mean()
                bound = fits - process.divergence() / len(X)
                (-bound).backward()
                optimizer.step()
                schedule.step()
                bounds.append(float(bound.detach()))
            self.elbo_.append(float(np.mean(bounds)))
        self.process_ = process.requires_grad_(False)

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `[m, classes]`, the mean over draws; the same ones at every call."""
        check_is_fitted(self)
        checked: Any = validate_data(self, X, reset=False, dtype=np.float64)
        points = torch.from_numpy(checked)
        with torch.no_grad(), seeded(self.seed_):
            mean, variance = self.process_.marginals(points)
            rows = max(1, 2_000_000 // (self.test_samples * mean.shape[1]))
            scales = self.process_.scales(self.test_samples)
            parts = [
                self.process_.values(m, v, scales).softmax(-1).mean(0)
                for m, v in zip(mean.split(rows), variance.split(rows), strict=True)
            ]
        return torch.cat(parts).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels `[m]`."""
        return self.classes_[self.predict_proba(X).argmax(1)]


# Finite networks


@torch.no_grad()
def scale_mixture_init_(
    layer: nn.Linear, prior: Distribution | None = None, generator: torch.Generator | None = None
) -> float:
    """Initialise a network's last layer with heavy tails, in place: one variance drawn, then normal weights.

    Args:
        layer: linear layer; its weights become $N(0, \\sigma^2 / \\text{fan-in})$, its bias 0.
        prior: distribution of $\\sigma^2$; `InverseGamma(2, 2)` by default.
        generator: source of the draws; torch's global one by default.

    Returns:
        $\\sigma^2$.

    Raises:
        TypeError: if the layer is no linear layer.

    Reference:
        Lee et al., section 3.1.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected layer to be an nn.Linear, got {type(layer).__name__}")
    prior = InverseGamma(torch.tensor(2.0), torch.tensor(2.0)) if prior is None else prior
    variance = float(draw(prior, 1, generator))
    layer.weight.normal_(0, math.sqrt(variance / layer.in_features), generator=generator)
    if layer.bias is not None:
        layer.bias.zero_()
    return variance


@torch.no_grad()
def sample_prior(module_factory: Callable[[], nn.Module], X: Tensor, n: int) -> Tensor:
    """Outputs of `n` networks at the same inputs, `[n, ...]`.

    Args:
        module_factory: function that makes a freshly initialised network.
        X: inputs.
        n: number of networks.
    """
    return torch.stack([module_factory()(X) for _ in range(checks.whole("n", n, 1))])
