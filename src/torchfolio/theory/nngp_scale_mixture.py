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
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributions import InverseGamma
from torch.nn import functional as F

from torchfolio import checks
from torchfolio.theory.heavy_tails import sample_prior, scale_mixture_init_
from torchfolio.theory.mixture_process import MixtureProcess, cholesky
from torchfolio.theory.network_kernels import ConvNNGPKernel, NNGPKernel, raw_of
from torchfolio.theory.scale_mixture import ScaleMixtureRegressor
from torchfolio.theory.scale_priors import Burr12, StudentT
from torchfolio.theory.sparse_process import SparseStudentTClassifier, kl_inverse_gamma

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
    "t_evidence",
]


def t_evidence(y: Tensor, factor: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """$\\log t_{2a}(y; 0, (b/a) C)$ from the Cholesky factor of $C$."""
    n = len(y)
    quadratic = torch.linalg.solve_triangular(factor, y[:, None], upper=False).square().sum()
    log_det = 2 * factor.diagonal().log().sum()
    gammas = torch.lgamma(a + n / 2) - torch.lgamma(a) - n / 2 * (2 * math.pi * b).log()
    return gammas - log_det / 2 - (a + n / 2) * torch.log1p(quadratic / (2 * b))


class StudentTProcessRegressor(MixtureProcess):
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
        raws = [raw_of(value) for value in (self.a_, self.b_, self.noise_)]
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
