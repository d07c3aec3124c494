r"""Noise schedules of diffusion models: how much signal and noise there is at each time.

Clean examples $x_0$ are mixed with noise, $x_t = \alpha_t x_0 + \sigma_t \varepsilon$ with
$\alpha_t^2 + \sigma_t^2 = 1$.

Reference:
    Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", ICLR 2021 (linear rate).
    Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", NeurIPS 2020, equation 4 (discrete steps).
    Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", ICML 2021, equation 17 (cosine).
    Lu et al., "DPM-Solver", NeurIPS 2022, arXiv 2206.00927, appendix D (inverses).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import at_least, between, finite, positive, whole
from torchfolio.shown import Shown

__all__ = ["CosineSchedule", "DiscreteSchedule", "LinearSchedule", "Schedule"]


class Schedule(Shown, ABC):
    r"""How much signal and noise there is at each time, from `t_min` (nearly clean) to `t_max` (nearly noise).

    $\alpha_t$ falls with time; $\sigma_t^2 = 1 - \alpha_t^2$, and $\lambda_t = \log(\alpha_t / \sigma_t)$ is half the
    logarithm of the signal-to-noise ratio. All of them map tensors of times to tensors of their shape, in 64 bits.
    """

    t_min: float
    t_max: float

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        r"""$\log \alpha_t$."""

    @abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        r"""The time at which $\lambda_t$ has a value; the exact inverse of `log_snr`."""

    def alpha(self, t: Tensor) -> Tensor:
        r"""$\alpha_t$."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        r"""$\sigma_t = \sqrt{1 - \alpha_t^2}$."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        r"""$\lambda_t = \log(\alpha_t / \sigma_t)$."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """What a network is told of the time."""

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Times `[count]` to train at, uniform over the schedule."""
        u = torch.rand(
            count, generator=generator, dtype=torch.float64, device=generator.device if generator is not None else None
        )
        return self.t_min + (self.t_max - self.t_min) * u

    def times(self, steps: int) -> Tensor:
        """`steps` times to sample at, from `t_max` down to `t_min`, evenly spaced."""
        return torch.linspace(self.t_max, self.t_min, whole("steps", steps, 1), dtype=torch.float64)


class _Continuous(Schedule):
    """Times are real numbers; networks are told `scale * t`."""

    def __init__(self, t_min: float, t_max: float, scale: float) -> None:
        self.t_min, self.t_max, self.scale = (
            positive("t_min", t_min),
            positive("t_max", t_max),
            positive("scale", scale),
        )
        if t_min >= t_max:
            raise ValueError(f"expected t_min below t_max, got {t_min} and {t_max}")

    def model_time(self, t: Tensor) -> Tensor:
        return self.scale * t


class LinearSchedule(_Continuous):
    r"""The variance-preserving process of linear rate, $\log\alpha_t = -\tfrac14 t^2(\beta_1 - \beta_0) - \tfrac12 t\beta_0$.

    Args:
        beta_0: rate at time 0.
        beta_1: rate at time 1, above `beta_0`.
        t_min: time at which sampling ends.
        t_max: time at which sampling begins.
        scale: factor of the times that a network is told; 1,000 suits sinusoidal features, 1 leaves them as they are.
    """

    def __init__(
        self, beta_0: float = 0.1, beta_1: float = 20.0, *, t_min: float = 1e-3, t_max: float = 1.0, scale: float = 1e3
    ) -> None:
        super().__init__(t_min, t_max, scale)
        self.beta_0, self.beta_1 = at_least("beta_0", beta_0, 0), finite("beta_1", beta_1)
        if not beta_0 < beta_1:
            raise ValueError(f"expected beta_0 below beta_1, got {beta_0} and {beta_1}")

    def log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return -0.25 * t.square() * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def time(self, log_snr: Tensor) -> Tensor:
        rise = self.beta_1 - self.beta_0
        s = 2 * rise * F.softplus(-2 * log_snr.double())
        # The usual root of a quadratic loses digits near 0; this form of it does not.
        return s / (((self.beta_0**2 + s).sqrt() + self.beta_0) * rise)

    def __repr__(self) -> str:
        return f"LinearSchedule(beta_0={self.beta_0}, beta_1={self.beta_1}, t_min={self.t_min}, t_max={self.t_max})"


class CosineSchedule(_Continuous):
    r"""$\alpha_t = \cos(\tfrac\pi2 \tfrac{t + s}{1 + s}) / \cos(\tfrac\pi2 \tfrac{s}{1 + s})$.

    Args:
        offset: $s$, which keeps the first steps from being too small.
        t_min: time at which sampling ends.
        t_max: time at which sampling begins, below 1, where no signal is left.
        scale: factor of the times that a network is told.
    """

    def __init__(
        self, offset: float = 0.008, *, t_min: float = 1e-3, t_max: float = 0.9946, scale: float = 1e3
    ) -> None:
        super().__init__(t_min, between("t_max", t_max, 0, 1, inclusive=False), scale)
        self.offset = positive("offset", offset)
        self._first = math.log(math.cos(0.5 * math.pi * offset / (1 + offset)))

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log(torch.cos(0.5 * math.pi * (t.double() + self.offset) / (1 + self.offset))) - self._first

    def time(self, log_snr: Tensor) -> Tensor:
        log_alpha = -0.5 * F.softplus(-2 * log_snr.double())
        angle = torch.arccos((log_alpha + self._first).exp())
        return angle * (2 * (1 + self.offset) / math.pi) - self.offset

    def __repr__(self) -> str:
        return f"CosineSchedule(offset={self.offset}, t_min={self.t_min}, t_max={self.t_max})"


class DiscreteSchedule(Schedule):
    r"""The $N$ steps of a discrete model, $\log\alpha_{t_i} = \tfrac12\sum_{j \le i} \log(1 - \beta_j)$ at $t_i = (i+1)/N$.

    Between them $\log\alpha$ is linear in time. Networks are told $i = N t - 1$, from 0 to $N - 1$.

    Args:
        betas: variance of the noise that each step adds `[N]`, in (0, 1); `DiscreteSchedule.linear()` gives the usual
            ones. Of a scheduler of `diffusers`, `scheduler.betas`.

    Raises:
        ValueError: if there are fewer than two, or one is outside (0, 1).
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        if betas.dim() != 1 or len(betas) < 2 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"expected two or more betas in (0, 1), got shape {tuple(betas.shape)}")
        self.betas, self.steps = betas, len(betas)
        self.t_min, self.t_max = 1 / self.steps, 1.0
        self._t = torch.arange(1, self.steps + 1, dtype=torch.float64) / self.steps
        self._log_alpha = 0.5 * torch.log1p(-betas).cumsum(0)

    @classmethod
    def linear(cls, steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> DiscreteSchedule:
        """Betas that rise evenly from `first` to `last`."""
        return cls(torch.linspace(first, last, whole("steps", steps, 2), dtype=torch.float64))

    def log_alpha(self, t: Tensor) -> Tensor:
        return _interpolate(t.double(), self._t, self._log_alpha)

    def time(self, log_snr: Tensor) -> Tensor:
        log_alpha = -0.5 * F.softplus(-2 * log_snr.double())
        return _interpolate(-log_alpha, -self._log_alpha, self._t)

    def model_time(self, t: Tensor) -> Tensor:
        return t * self.steps - 1

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        step = torch.randint(
            self.steps, (count,), generator=generator, device=generator.device if generator is not None else None
        )
        return (step.double() + 1) / self.steps

    def times(self, steps: int) -> Tensor:
        """`steps` of the discrete times, as evenly spaced as they can be, from the last to the first."""
        chosen = torch.linspace(self.steps - 1, 0, whole("steps", steps, 1, self.steps), dtype=torch.float64)
        return (chosen.round() + 1) / self.steps

    def __repr__(self) -> str:
        return f"DiscreteSchedule({self.steps} steps, betas from {self.betas[0]:.3g} to {self.betas[-1]:.3g})"


def _interpolate(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear, the outermost pieces going on."""
    places, values = places.to(x.device), values.to(x.device)
    right = torch.searchsorted(places, x.contiguous()).clamp(1, len(places) - 1)
    share = (x - places[right - 1]) / (places[right] - places[right - 1])
    return torch.lerp(values[right - 1], values[right], share)
