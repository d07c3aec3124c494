"""SDE-GAN: a neural stochastic equation trained against a neural controlled one that judges whole paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from torchfolio.checks import positive, whole
from torchfolio.dynamics.controls import LinearControl
from torchfolio.dynamics.integrate import cdeint, sdeint
from torchfolio.dynamics.runge_kutta import Heun
from torchfolio.dynamics.sde import SDE
from torchfolio.dynamics.vector_fields import LipSwish, VectorField

__all__ = ["SDEGAN"]


class _Generator(nn.Module):
    """y_0 = ζ(v), dY = μ(t, Y) dt + σ(t, Y) ∘ dW, x = ℓ(Y)."""

    def __init__(self, channels: int, initial_noise: int, noise: int, hidden: int, width: int, dt: float) -> None:
        super().__init__()
        self.initial_noise, self.dt = initial_noise, dt
        self.initial = nn.Sequential(nn.Linear(initial_noise, width), LipSwish(), nn.Linear(width, hidden))
        drift = VectorField(hidden, width, 1, time=True, activation=LipSwish())
        diffusion = VectorField(hidden, width, 1, (hidden, noise), time=True, activation=LipSwish())
        self.sde = SDE(drift, diffusion, "general")
        self.readout = nn.Linear(hidden, channels)
        # A start that varies and slow fields help the first steps of training (as in the reference implementation).
        with torch.no_grad():
            for p in self.initial.parameters():
                p *= 3
            for p in self.sde.parameters():
                p *= 0.5

    def forward(self, n: int, ts: Sequence[float], seed: int | None = None) -> Tensor:
        like = self.readout.weight
        generator = None if seed is None else torch.Generator(like.device).manual_seed(seed)
        v = torch.randn(n, self.initial_noise, generator=generator, dtype=like.dtype, device=like.device)
        return self.readout(sdeint(self.sde, self.initial(v), ts, dt=self.dt, seed=seed).ys)


class _Discriminator(nn.Module):
    """h_0 = ζ(X_0), dh = f(t, h) dX with X = (t, x), score = ℓ(h_T)."""

    def __init__(self, channels: int, hidden: int, width: int) -> None:
        super().__init__()
        self.initial = nn.Sequential(nn.Linear(channels + 1, width), LipSwish(), nn.Linear(width, hidden))
        self.field = VectorField(hidden, width, 1, (hidden, channels + 1), time=True, activation=LipSwish())
        self.readout = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, ts: Sequence[float]) -> Tensor:
        control = LinearControl(x, ts)
        h0 = self.initial(control.evaluate(control.t0))
        h, _ = cdeint(control, self.field, h0, solver=Heun(), grid=control.knots)
        return self.readout(h[-1]).mean()

    @torch.no_grad()
    def clip(self) -> None:
        """Keep the Lipschitz constant at most 1 per layer: |A|_∞ ≤ 1 if every entry is within ±1 / in_features."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.clamp_(-1 / layer.in_features, 1 / layer.in_features)
        self.field.scale.clamp_(-1, 1)


class SDEGAN(nn.Module):
    """A generator of series without a likelihood: a neural SDE as a Wasserstein GAN.

    The discriminator is a neural CDE; LipSwish activations and clipped weights keep it Lipschitz, with no penalty.

    Args:
        channels: number of channels of the series.
        initial_noise: number of normal variables that decide the start.
        noise: number of Brownian motions.
        hidden: number of channels of both hidden states.
        width: width of the networks.
        dt: length of the generator's steps, above 0.

    Shapes:
        series: `[T, B, channels]`, time first; ts: `[T]`, strictly rising.

    Raises:
        ValueError: if an option is out of range, or series do not fit the times.

    Reference:
        Kidger et al., "Neural SDEs as Infinite-Dimensional GANs", arXiv 2102.03657; "Efficient and Accurate Gradients for
        Neural SDEs", arXiv 2105.13493 (reversible Heun, clipping).
    """

    def __init__(
        self,
        channels: int,
        initial_noise: int = 5,
        noise: int = 3,
        hidden: int = 16,
        width: int = 16,
        dt: float = 1.0,
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "initial_noise": initial_noise, "noise": noise, "hidden": hidden, "width": width}
        for name, size in sizes.items():
            whole(name, size, 1)
        self.generator = _Generator(channels, initial_noise, noise, hidden, width, positive("dt", dt))
        self.discriminator = _Discriminator(channels, hidden, width)
        self.discriminator.clip()

    def sample(self, n: int, ts: Tensor | Sequence[float], seed: int | None = None) -> Tensor:
        """Draw series `[T, n, channels]`, detached."""
        with torch.no_grad():
            return self.generator(whole("n", n, 1), [float(t) for t in ts], seed)

    def fit(
        self,
        data: Tensor,
        ts: Tensor | Sequence[float],
        steps: int = 10_000,
        batch_size: int = 1024,
        *,
        lr: float = 2e-4,
        lr_discriminator: float = 1e-3,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> SDEGAN:
        """Train generator and discriminator at once by Adadelta; weights are averaged over the second half.

        Args:
            data: series `[T, N, channels]`.
            ts: times `[T]`.
            steps: number of steps, at least 1.
            batch_size: number of series a step, at least 1; at most N are used.
            lr: learning rate of the generator, above 0.
            lr_discriminator: learning rate of the discriminator, above 0.
            weight_decay: weight decay of both, at least 0.
            seed: number that decides batches and noise.

        Returns:
            itself, with averaged weights.
        """
        times = [float(t) for t in ts]
        if data.dim() != 3 or len(data) != len(times) or not bool(data.isfinite().all()):
            raise ValueError(f"expected finite series [{len(times)}, N, channels], got shape {tuple(data.shape)}")
        parts = (self.generator, self.discriminator)
        rates = (positive("lr", lr), positive("lr_discriminator", lr_discriminator))
        optimizers = [
            torch.optim.Adadelta(part.parameters(), lr=rate, weight_decay=weight_decay)
            for part, rate in zip(parts, rates, strict=True)
        ]
        averages: list[AveragedModel] = []
        for step, batch in enumerate(
            _batches(data, whole("steps", steps, 1), whole("batch_size", batch_size, 1), seed)
        ):
            fake = self.generator(batch.shape[1], times, seed=seed * 1_000_003 + step)
            score = self.discriminator(fake, times) - self.discriminator(batch, times)
            for optimizer in optimizers:
                optimizer.zero_grad()
            score.backward()
            for p in self.discriminator.parameters():
                if p.grad is not None:
                    p.grad.neg_()  # it maximises the score that the generator minimises
            for optimizer in optimizers:
                optimizer.step()
            self.discriminator.clip()
            if step >= steps // 2:
                averages = averages or [AveragedModel(part) for part in parts]
                for average, part in zip(averages, parts, strict=True):
                    average.update_parameters(part)
        for average, part in zip(averages, parts, strict=True):
            part.load_state_dict(average.module.state_dict())
        return self


def _batches(data: Tensor, steps: int, batch_size: int, seed: int) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randperm(data.shape[1], generator=generator)[:batch_size].to(data.device)
        yield data[:, chosen]
