"""Priors on the scale of a network's last layer, and predictive distributions that such a scale leads to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Distribution, InverseGamma, constraints

from torchfolio import checks
from torchfolio.engine import seeded
from torchfolio.shown import Shown

__all__ = ["Burr12", "InverseGamma", "NormalMixture", "StudentT", "draw"]


class Burr12(Distribution):
    """Burr distribution of type XII on positive numbers, $p(x) = c k x^{c-1} (1 + x^c)^{-k-1}$.

    Args:
        c: first shape, above 0.
        k: second shape, above 0; the tail falls as $x^{-ck-1}$.

    Raises:
        ValueError: if a shape is not positive.
    """

    def __init__(self, c: float, k: float) -> None:
        self.c, self.k = float(checks.positive("c", c)), float(checks.positive("k", k))
        super().__init__(validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.positive

    @property
    def arg_constraints(self) -> dict[str, constraints.Constraint]:
        return {}  # checked above, in one sentence

    def __repr__(self) -> str:
        return f"Burr12({self.c}, {self.k})"

    def log_prob(self, value: Tensor) -> Tensor:
        log = value.log()
        return (
            math.log(self.c * self.k) + (self.c - 1) * log - (self.k + 1) * torch.nn.functional.softplus(self.c * log)
        )

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        # 1 - u is uniform, too: the upper tail keeps its digits.
        return torch.expm1(-torch.rand(sample_shape, dtype=torch.float64).log() / self.k) ** (1 / self.c)

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


def check_prior(name: str, prior: Any) -> Any:
    """Refuse what is no distribution of one positive number.

    Raises:
        TypeError: if it has no `log_prob` and `sample`.
        ValueError: if it is a batch of distributions, or has mass below 0.
    """
    if not (hasattr(prior, "log_prob") and hasattr(prior, "sample")):
        raise TypeError(f"expected {name} to be a torch distribution, got {type(prior).__name__}")
    shape = (*getattr(prior, "batch_shape", ()), *getattr(prior, "event_shape", ()))
    if math.prod(shape) != 1:
        raise ValueError(f"expected {name} to be a distribution of one number, got shape {shape}")
    if _inside(prior, torch.tensor([-1.0])).any():
        raise ValueError(f"expected {name} to be a distribution on positive numbers, got {prior!r}")
    return prior


def log_density(prior: Any, x: Tensor) -> Tensor:
    """Log density at `x` `[S]` in float64, -infinity outside of the support."""
    inside = _inside(prior, x)
    result = torch.full_like(x, -math.inf, dtype=torch.float64)
    result[inside] = torch.as_tensor(prior.log_prob(x[inside]), dtype=torch.float64).reshape(-1)
    return result


def _inside(prior: Any, x: Tensor) -> Tensor:
    support = getattr(prior, "support", constraints.positive)
    return support.check(x).reshape(x.shape)


def draw(prior: Distribution, n: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` draws of a distribution in float64; with a generator, torch's global one stays as it was.

    Raises:
        ValueError: if a draw is not positive.
    """
    if generator is None:
        values = prior.sample(torch.Size((n,)))
    else:
        with seeded(int(torch.randint(2**31, (), generator=generator))):
            values = prior.sample(torch.Size((n,)))
    values = values.double().reshape(n)
    if not bool((values > 0).all()):
        raise ValueError(f"expected a prior on positive numbers, got a draw of {float(values.min())}")
    return values


class StudentT(Shown):
    """Student's t distribution of every point, with quantiles; the normal distribution at infinite degrees of freedom.

    Args:
        df: degrees of freedom.
        loc: locations `[m]`.
        scale: scales `[m]`.
    """

    def __init__(self, df: float, loc: Tensor, scale: Tensor) -> None:
        self.df, self.loc, self.scale = df, loc, scale

    @property
    def mean(self) -> Tensor:
        return self.loc if self.df > 1 else torch.full_like(self.loc, math.nan)

    @property
    def stddev(self) -> Tensor:
        """Standard deviations; NaN at 2 degrees of freedom or fewer, where there are none."""
        if self.df <= 2:
            return torch.full_like(self.scale, math.nan)
        return self.scale * (1.0 if math.isinf(self.df) else math.sqrt(self.df / (self.df - 2)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density `[m]`."""
        if math.isinf(self.df):
            return torch.distributions.Normal(self.loc, self.scale).log_prob(value)
        return torch.distributions.StudentT(self.df, self.loc, self.scale).log_prob(value)

    def quantile(self, p: float) -> Tensor:
        """Quantiles `[m]` of a probability in (0, 1)."""
        checks.between("p", p, 0, 1, inclusive=False)
        return self.loc + self.scale * float(stats.norm.ppf(p) if math.isinf(self.df) else stats.t.ppf(p, self.df))


class NormalMixture(Shown):
    """Mixture of normal distributions of one location and many variances.

    Args:
        weights: weights `[S]` that sum to 1.
        variances: factors `[S]` on the squared scale.
        loc: locations `[m]`.
        scale: scales `[m]`.
    """

    def __init__(self, weights: Tensor, variances: Tensor, loc: Tensor, scale: Tensor) -> None:
        self.weights, self.variances, self.loc, self.scale = weights, variances, loc, scale

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def stddev(self) -> Tensor:
        return self.scale * (self.weights @ self.variances).sqrt()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density `[m]`."""
        scales = self.scale[..., None] * self.variances.sqrt()
        parts = torch.distributions.Normal(self.loc[..., None], scales).log_prob(value[..., None])
        return torch.logsumexp(parts + self.weights.log(), -1)

    def quantile(self, p: float) -> Tensor:
        """Quantiles `[m]` of a probability in (0, 1): one root, since the points differ in location and scale alone."""
        checks.between("p", p, 0, 1, inclusive=False)
        scales, weights = self.variances.sqrt().numpy(), self.weights.numpy()
        high = float(scales.max()) * 40
        low = -high
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if weights @ stats.norm.cdf(middle / scales) < p else (low, middle)
        return self.loc + self.scale * float(np.float64(middle))
