"""A nonlinear scattering cavity."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchfolio.local.physical_system import PhysicalSystem
from torchfolio.measure.similarity import at_least_float32

__all__ = ["KerrCavity"]


class KerrCavity(PhysicalSystem):
    """A nonlinear scattering cavity: $u \\leftarrow x + S\\,(u\\,e^{2i|u|^2/(1+|u|^2)})$, six times; $y = |u|$.

    $S$ is complex Gaussian of spectral norm 0.7; it has as many modes as the larger of inputs and outputs.

    Args: see `PhysicalSystem`.
    """

    scattering: Tensor

    def response(self, x: Tensor) -> Tensor:
        """Amplitudes of the first `n_out` modes after six passes."""
        S = torch.view_as_complex(at_least_float32(self.scattering))
        S = S * (0.7 / torch.linalg.matrix_norm(S, 2))  # drift changes the norm
        e = nn.functional.pad(x.to(S.real.dtype), (0, len(S) - self.n_in)).to(S.dtype)
        u = e
        for _ in range(6):
            power = u.real.square() + u.imag.square()
            u = e + (u * torch.polar(torch.ones_like(power), 2 * power / (1 + power))) @ S
        return (u.real.square() + u.imag.square()).clamp_min(1e-24).sqrt()[:, : self.n_out].to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        modes = max(self.n_in, self.n_out)
        return {"scattering": torch.randn(modes, modes, 2, generator=generator) / math.sqrt(2 * modes)}
