"""Light through a multiple-scattering medium."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.local.physical_system import PhysicalSystem
from torchfolio.measure.similarity import at_least_float32

__all__ = ["MultimodeOptics"]


class MultimodeOptics(PhysicalSystem):
    """Light through a multiple-scattering medium onto a camera, $y = |T x|$, $T$ complex Gaussian $/\\sqrt{n_{in}}$.

    Args: see `PhysicalSystem`.
    """

    transmission: Tensor

    def response(self, x: Tensor) -> Tensor:
        """$|Tx|$; real and imaginary parts apart, which is faster than a complex product on a CPU."""
        T = at_least_float32(self.transmission)  # half precision has no complex numbers
        parts = x.to(T) @ T.permute(1, 2, 0).flatten(1)
        real, imaginary = parts.chunk(2, 1)
        # The hypotenuse has no derivative at 0, where a silent input ends.
        return (real.square() + imaginary.square()).clamp_min(1e-24).sqrt().to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        T = torch.randn(self.n_out, self.n_in, 2, generator=generator)
        return {"transmission": T / math.sqrt(2 * self.n_in)}
