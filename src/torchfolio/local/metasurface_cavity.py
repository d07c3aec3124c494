"""A microwave cavity that is programmed by its walls."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.local.physical_system import PhysicalSystem
from torchfolio.measure.similarity import at_least_float32

__all__ = ["MetasurfaceCavity"]


class MetasurfaceCavity(PhysicalSystem):
    """A microwave cavity whose input sets the states of meta-atoms: the scatterer changes, not the wave.

    $y_f = |H_f + g_f^\\top (A(x) - W_f)^{-1} t_f|$ for `n_out` frequencies, by an exact solve of coupled dipoles;
    $W_f$ complex symmetric of spectral norm 0.8, $A = \\operatorname{diag}(1 + 0.2i + 0.8\\,[x_j / \\max x > 0.3])$.
    The states are two-level, so that the response has no slope in $x$.

    Args: see `PhysicalSystem`.
    """

    coupling: Tensor
    antennas: Tensor
    direct: Tensor

    def response(self, x: Tensor) -> Tensor:
        """Transmission at each frequency."""
        W, ports, H = (torch.view_as_complex(at_least_float32(b)) for b in (self.coupling, self.antennas, self.direct))
        W = W + W.mT
        W = W * (0.8 / torch.linalg.matrix_norm(W, 2, keepdim=True))
        top = x.amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        states = 1 + 0.2j + 0.8 * (x / top > 0.3).to(W.dtype)
        system = torch.diag_embed(states)[:, None] - W  # [B, F, n, n]
        source, receiver = ports[0, :, :, None].expand(len(x), -1, -1, -1), ports[1]
        field = torch.linalg.solve(system, source)[..., 0]
        return (H + (receiver * field).sum(-1)).abs().to(x.dtype)

    def _draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        n, scale = self.n_in, 1 / math.sqrt(2 * self.n_in)
        return {
            "coupling": torch.randn(self.n_out, n, n, 2, generator=generator) * scale,
            "antennas": torch.randn(2, self.n_out, n, 2, generator=generator) * scale,
            "direct": torch.randn(self.n_out, 2, generator=generator) * scale,
        }
