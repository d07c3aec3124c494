"""Neural stochastic differential equations, and latent ones that are trained by variational inference."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, positive, whole
from torchfolio.dynamics.gradient_base import Gradient
from torchfolio.dynamics.integrate import sdeint
from torchfolio.dynamics.sde import SDE
from torchfolio.dynamics.solver import Solver
from torchfolio.dynamics.vector_fields import VectorField

__all__ = ["LatentSDE", "NeuralSDE"]

LEAST_NOISE = 1e-3  # the divergence divides by the diffusion


class NeuralSDE(nn.Module):
    """Paths of a stochastic equation.

    Args:
        sde: equation, with any modules as drift and diffusion.
        dt: length of the steps, above 0.
        solver: method, as for `sdeint`.
        gradient: way to differentiate, as for `sdeint`.

    Shapes:
        y0: `[..., h]`; ts: `[T]`; output: `[T, ..., h]`.

    Attributes:
        stats: cost of the last solve; None before the first.

    Reference:
        Kidger, arXiv 2202.02435, chapter 4.
    """

    def __init__(self, sde: SDE, dt: float, solver: Solver | None = None, gradient: Gradient | None = None) -> None:
        super().__init__()
        self.sde, self.dt, self.solver, self.gradient = sde, positive("dt", dt), solver, gradient
        self.stats: Any = None

    def forward(self, y0: Tensor, ts: Tensor | Sequence[float], seed: int | None = None) -> Tensor:
        ys, self.stats = sdeint(self.sde, y0, ts, self.solver, self.gradient, dt=self.dt, seed=seed)
        return ys


class LatentSDE(nn.Module):
    """A generative model of series: a latent stochastic equation whose values are decoded at the times observed.

    The prior is dY = h(t, Y) dt + g(Y) ∘ dW. The posterior has the drift f(t, Y, c(t)) in place of h, where the context
    c is that of a recurrent network that reads the series backwards. Both share g, so their divergence is finite:

        -ELBO = -E log p(x | Y) + KL(q(Y_0 | x) ‖ p(Y_0)) + E ∫ ½ |(f - h) / g|² dt

    The integral runs along as one more channel of the state, on the same Brownian motion.

    Args:
        channels: number of channels of the series.
        latent: number of channels of Y.
        context: number of channels of c.
        width: width of the networks.
        dt: length of the steps, above 0.
        noise: standard deviation of the observations around the decoded values, above 0.
        solver: method, as for `sdeint`.
        gradient: way to differentiate, as for `sdeint`.

    Shapes:
        x: `[T, B, channels]`, time first; ts: `[T]`, strictly rising.

    Raises:
        ValueError: if an option is out of range, or a series does not fit the times.

    Reference:
        Li et al., "Scalable Gradients for Stochastic Differential Equations", arXiv 2001.01328.
    """

    def __init__(
        self,
        channels: int,
        latent: int = 4,
        context: int = 16,
        width: int = 32,
        *,
        dt: float = 0.05,
        noise: float = 0.1,
        solver: Solver | None = None,
        gradient: Gradient | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.latent = whole("channels", channels, 1), whole("latent", latent, 1)
        self.dt, self.noise = positive("dt", dt), positive("noise", noise)
        self.solver, self.gradient = solver, gradient
        self.encoder = nn.GRU(channels + 1, whole("width", width, 1))
        self.to_context = nn.Linear(width, whole("context", context, 1))
        self.to_start = nn.Linear(context, 2 * latent)
        self.prior_mean, self.prior_log_std = nn.Parameter(torch.zeros(latent)), nn.Parameter(torch.zeros(latent))
        self.posterior = VectorField(latent + context, width, shape=(latent,), time=True)
        self.prior = VectorField(latent, width, time=True)
        # Each channel's noise depends on that channel alone, as diagonal noise asks.
        self.diffusions = nn.ModuleList(
            nn.Sequential(nn.Linear(1, width // 2 or 1), nn.Softplus(), nn.Linear(width // 2 or 1, 1), nn.Sigmoid())
            for _ in range(latent)
        )
        self.decoder = nn.Linear(latent, channels)

    def diffusion(self, t: Tensor, y: Tensor) -> Tensor:
        """g(y), positive, of the shape of y."""
        return LEAST_NOISE + torch.cat([net(v) for net, v in zip(self.diffusions, y.split(1, -1), strict=True)], -1)

    def loss(self, x: Tensor, ts: Tensor | Sequence[float], kl_weight: float = 1.0, seed: int | None = None) -> Tensor:
        """Negative evidence lower bound, averaged over the series.

        Args:
            x: series `[T, B, channels]`.
            ts: times `[T]`.
            kl_weight: weight of both divergences, at least 0; let it rise to 1 over the first fifth of training.
            seed: number that decides the noise; drawn by torch's global generator if None.
        """
        at_least("kl_weight", kl_weight, 0)
        times = [float(t) for t in ts]
        if x.dim() != 3 or x.shape[0] != len(times) or x.shape[-1] != self.channels:
            raise ValueError(f"expected series [{len(times)}, B, {self.channels}], got shape {tuple(x.shape)}")
        stamps = x.new_tensor(times).view(-1, 1, 1).expand(*x.shape[:2], 1)
        hidden, _ = self.encoder(torch.cat([stamps, x], -1).flip(0))
        context = self.to_context(hidden).flip(0)
        mean, log_std = self.to_start(context[0]).chunk(2, -1)
        start = torch.distributions.Normal(mean, log_std.exp())
        generator = None if seed is None else torch.Generator(x.device).manual_seed(seed)
        y0 = mean + log_std.exp() * torch.randn(mean.shape, generator=generator, dtype=x.dtype, device=x.device)
        ys, divergence = self._infer(y0, context, times, seed)
        prior = torch.distributions.Normal(self.prior_mean, self.prior_log_std.exp())
        divergence = divergence + torch.distributions.kl_divergence(start, prior).sum(-1)
        likelihood = torch.distributions.Normal(self.decoder(ys), self.noise).log_prob(x).sum((0, 2))
        return (kl_weight * divergence - likelihood).mean()

    def _infer(self, y0: Tensor, context: Tensor, times: list[float], seed: int | None) -> tuple[Tensor, Tensor]:
        """Posterior paths `[T, B, latent]`, and the integral of the divergence `[B]`."""

        def drift(t: Tensor, state: Tensor) -> Tensor:
            y = state[..., :-1]
            # What is to come: the context that was read back to the next observation.
            c = context[min(bisect_right(times, float(t)), len(times) - 1)]
            f, h = self.posterior(t, torch.cat([y, c], -1)), self.prior(t, y)
            gap = (f - h) / self.diffusion(t, y)
            return torch.cat([f, gap.square().sum(-1, keepdim=True) / 2], -1)

        def diffusion(t: Tensor, state: Tensor) -> Tensor:
            g = self.diffusion(t, state[..., :-1])
            return torch.cat([g, torch.zeros_like(g[..., :1])], -1)

        parts = (self.posterior, self.prior, self.diffusions)
        params = [context, *itertools.chain.from_iterable(part.parameters() for part in parts)]
        state = torch.cat([y0, torch.zeros_like(y0[..., :1])], -1)
        options: dict[str, Any] = {"dt": self.dt, "seed": seed, "params": params}
        ys, _ = sdeint(SDE(drift, diffusion), state, times, self.solver, self.gradient, **options)
        return ys[..., :-1], ys[-1, ..., -1]

    def sample(self, n: int, ts: Tensor | Sequence[float], seed: int | None = None) -> Tensor:
        """Draw series from the prior, without the noise of observations.

        Args:
            n: number of series, at least 1.
            ts: times `[T]`.
            seed: number that decides them; drawn by torch's global generator if None.

        Returns:
            series `[T, n, channels]`, detached.
        """
        like = self.prior_mean
        generator = None if seed is None else torch.Generator(like.device).manual_seed(seed)
        noise = torch.randn(whole("n", n, 1), self.latent, generator=generator, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            y0 = self.prior_mean + self.prior_log_std.exp() * noise
            sde = SDE(self.prior, self.diffusion)
            return self.decoder(sdeint(sde, y0, ts, self.solver, dt=self.dt, seed=seed).ys)
