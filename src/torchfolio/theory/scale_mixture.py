"""Regression by an infinitely wide network with any prior on the variance of its last layer.

Part of Lee et al., "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from sklearn.utils.validation import check_random_state
from torch import Tensor
from torch.distributions import Distribution, InverseGamma

from torchfolio import checks
from torchfolio.theory.mixture_process import MixtureProcess
from torchfolio.theory.network_kernels import NNGPKernel
from torchfolio.theory.scale_priors import NormalMixture, check_prior, draw, log_density

__all__ = ["ScaleMixtureRegressor"]


class ScaleMixtureRegressor(MixtureProcess):
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
            if value is not None:
                check_prior(name, value)
        inputs, targets = self._prepare(X, y)
        self.noise_ = float(self.noise)
        self._factorise(inputs, targets)
        if self.inference == "quadrature":
            log_weight, values = self._quadrature(prior, checks.whole("nodes", self.nodes or 200, 10))
        else:
            log_weight, values = self._importance(prior, checks.whole("nodes", self.nodes or 1000, 1))
        total = torch.logsumexp(log_weight, 0)
        weights = (log_weight - total).exp()
        positive = weights > 0
        self.weights_, self.variances_ = weights[positive].numpy(), values[positive].numpy()
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
            return torch.nan_to_num(log_density(prior, u.exp()) + u + self._likelihood(u), nan=-math.inf)

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
            log_weight = log_weight + log_density(prior, values) - log_density(proposal, values)
        return log_weight.double(), values

    def _distribution(self, X: Any) -> NormalMixture:
        location, scale = self._locations(X)
        return NormalMixture(torch.from_numpy(self.weights_), torch.from_numpy(self.variances_), location, scale)
