"""The base of systems that can be measured but not differentiated."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import Tensor, nn

from torchfolio.checks import at_least, between, whole

__all__ = ["PhysicalSystem"]


class PhysicalSystem(nn.Module):
    """A system of `n_in` inputs and `n_out` outputs that is measured, `[B, n_in] -> [B, n_out]`.

    A subclass gives `response`, and in `_draw` the random quantities that make one specimen. They are buffers in real
    numbers (complex ones with a last axis of 2, which survives a change of dtype).

    Args:
        n_in: number of inputs.
        n_out: number of outputs.
        noise_std: standard deviation of Gaussian noise on each output, fresh in each call; 0 or more.
        seed: seed of the specimen, its noise and its drift.

    Attributes:
        calls: number of measurements, of a batch each.
        samples: number of examples measured.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, n_in: int, n_out: int, *, noise_std: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.n_in, self.n_out = whole("n_in", n_in, 1), whole("n_out", n_out, 1)
        self.noise_std, self.seed = at_least("noise_std", noise_std, 0), whole("seed", seed, 0)
        self.calls = self.samples = self._streams = 0
        for name, value in self._draw(self._generator()).items():
            self.register_buffer(name, value)

    def response(self, x: Tensor) -> Tensor:
        """Outputs without noise, as a formula in $x$."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Measure a batch.

        Raises:
            ValueError: if the input is not `[B, n_in]`.
        """
        if x.dim() != 2 or x.shape[1] != self.n_in:
            raise ValueError(f"expected inputs [B, {self.n_in}], got shape {tuple(x.shape)}")
        self.calls, self.samples = self.calls + 1, self.samples + len(x)
        with torch.no_grad():
            y = self.response(x.detach())
            if self.noise_std:
                y = y + self.noise_std * torch.randn(y.shape, generator=self._generator()).to(y)
        return y

    def reset_calls(self) -> None:
        """Count measurements from 0 again."""
        self.calls = self.samples = 0

    def drift(self, step: float) -> None:
        """Move the specimen $T$ to $\\sqrt{1 - s^2}\\, T + s T'$ with a fresh draw $T'$.

        Args:
            step: size $s$ in [0, 1]; 1 is another specimen.

        Raises:
            ValueError: if it is outside.
        """
        step = float(between("step", step, 0, 1))
        self._blend(math.sqrt(1 - step**2), step, self._generator())

    def twin(self, error: float = 0.0, seed: int = 0) -> Self:
        """A digital model of the system with a relative error, $T + \\varepsilon T'$; noiseless, with its own counts.

        Args:
            error: relative error $\\varepsilon$, 0 or more.
            seed: seed of the error.
        """
        at_least("error", error, 0)
        twin = copy.deepcopy(self)
        twin.reset_calls()
        twin.noise_std = 0.0
        twin._blend(1.0, error, torch.Generator().manual_seed(whole("seed", seed, 0)))
        return twin

    def extra_repr(self) -> str:
        """Sizes and noise."""
        return f"{self.n_in}, {self.n_out}, noise_std={self.noise_std}"

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A specimen's random quantities by the name of their buffer."""
        return {}

    def _blend(self, old: float, new: float, generator: torch.Generator) -> None:
        for name, fresh in self._draw(generator).items():
            buffer = getattr(self, name)
            with torch.no_grad():
                buffer.mul_(old).add_(fresh.to(buffer), alpha=new)

    def _generator(self) -> torch.Generator:
        # A number beside the seed, not a generator as an attribute: the system stays easy to copy and to pickle.
        self._streams += 1
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self._streams)
