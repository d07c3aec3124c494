"""A network in place of a system, fitted to measured pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.checks import finite, positive, same_length, whole
from torchfolio.engine import seeded
from torchfolio.local.physical_system import PhysicalSystem

__all__ = ["MeasuredSurrogate"]


class MeasuredSurrogate(PhysicalSystem):
    """A network (20-100-200-100-20 for 20 inputs and outputs, SiLU) fitted to measured pairs of a real system.

    Args:
        x: measured inputs `[N, n_in]`, N of 20 or more.
        y: measured outputs `[N, n_out]`.
        epochs: passes over the pairs.
        lr: learning rate of Adam.
        batch_size: number of pairs of a step.
        noise_std: standard deviation of the noise, see `PhysicalSystem`.
        seed: seed, see `PhysicalSystem`.

    Attributes:
        error: root mean squared error on the last tenth of the pairs, which is not fitted, over their standard
            deviation.

    Raises:
        ValueError: if the pairs are not finite, differ in number, or are fewer than 20.
    """

    error: Tensor

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        epochs: int = 300,
        lr: float = 1e-4,
        batch_size: int = 256,
        noise_std: float = 0.0,
        seed: int = 0,
    ) -> None:
        if x.dim() != 2 or y.dim() != 2 or same_length(x=x, y=y) < 20:
            raise ValueError(
                f"expected 20 pairs [N, n_in] and [N, n_out] or more, got {list(x.shape)}, {list(y.shape)}"
            )
        finite("x", x)
        finite("y", y)
        positive("lr", lr)
        whole("epochs", epochs, 1)
        whole("batch_size", batch_size, 1)
        super().__init__(x.shape[1], y.shape[1], noise_std=noise_std, seed=seed)
        held = max(len(x) // 10, 1)
        with seeded(seed):
            sizes = (self.n_in, 100, 200, 100, self.n_out)
            layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), nn.SiLU())][:-1]
            self.network = nn.Sequential(*layers).to(x)
            self._fit(x[:-held], y[:-held], epochs, lr, batch_size)
        self.network.requires_grad_(False)
        residual = self.response(x[-held:]) - y[-held:]
        self.register_buffer("error", residual.square().mean().sqrt() / y[-held:].std())

    def response(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        return self.network(x.to(next(self.network.parameters()))).to(x.dtype)

    def _fit(self, x: Tensor, y: Tensor, epochs: int, lr: float, batch_size: int) -> None:
        optimizer = torch.optim.Adam(self.network.parameters(), lr=lr)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).to(x.device).split(batch_size):
                optimizer.zero_grad()
                (self.network(x[rows]) - y[rows]).square().mean().sqrt().backward()
                optimizer.step()

    def _blend(self, old: float, new: float, generator: torch.Generator) -> None:
        for p in self.network.parameters():
            scale = float(p.std(unbiased=False))
            with torch.no_grad():
                p.mul_(old).add_(torch.randn(p.shape, generator=generator).to(p), alpha=new * scale)
