"""Fourier neural operators, small reference networks for fields on regular grids.

Reference:
    Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, ICLR 2021 (arXiv 2010.08895).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio import checks

__all__ = ["FNO", "SpectralConv"]


class SpectralConv(nn.Module):
    """Linear map of a field's lowest Fourier modes, $\\hat v_k = W_k \\hat u_k$; other modes become zero.

    Args:
        inputs: number of channels that come in.
        outputs: number of channels that go out.
        modes: number of lowest frequencies along each axis, of either sign.

    Shapes:
        `[B, inputs, *grid]` to `[B, outputs, *grid]`.

    Raises:
        ValueError: if the grid is too coarse for the modes.
    """

    def __init__(self, inputs: int, outputs: int, modes: Sequence[int]) -> None:
        super().__init__()
        self.modes = tuple(checks.whole("modes", m, 1) for m in modes)
        # Frequencies of either sign along every axis but the last, whose transform is half as long.
        corners = 2 ** (len(self.modes) - 1)
        scale = (inputs * outputs) ** -0.5
        self.weight = nn.Parameter(scale * torch.randn(corners, *self.modes, inputs, outputs, 2))

    def forward(self, u: Tensor) -> Tensor:
        grid, dims = u.shape[2:], tuple(range(2, u.dim()))
        if any(2 * m > n for m, n in zip(self.modes, grid, strict=True)):
            raise ValueError(f"expected at least twice as many points as modes {self.modes}, got a grid {tuple(grid)}")
        spectrum = torch.fft.rfftn(u, dim=dims, norm="ortho")
        weight = torch.view_as_complex(self.weight)
        out = spectrum.new_zeros(len(u), weight.shape[-1], *spectrum.shape[2:])
        signs = itertools.product((slice(None, None), slice(-1, None)), repeat=len(grid) - 1)
        for k, corner in enumerate(signs):
            ends = [
                slice(None, m) if s.start is None else slice(-m, None) for s, m in zip(corner, self.modes, strict=False)
            ]
            index = (slice(None), slice(None), *ends, slice(None, self.modes[-1]))
            out[index] = torch.einsum("bi...,...io->bo...", spectrum[index], weight[k])
        return torch.fft.irfftn(out, s=tuple(grid), dim=dims, norm="ortho")


class FNO(nn.Module):
    """Fourier neural operator: layers $v \\leftarrow \\sigma(\\mathrm{Spectral}(v) + W v)$ between two pointwise maps.

    Args:
        inputs: number of fields that come in; their coordinates are not added.
        outputs: number of fields that go out, such as the K basis functions of a constraint layer.
        modes: number of frequencies along each axis; their number is that of the grid's axes.
        width: number of channels.
        depth: number of Fourier layers.
        hidden: width of the last pointwise network.
        activate_last: whether GELU comes after the last Fourier layer too, as the paper has it for constrained models.

    Shapes:
        `[B, *grid, inputs]` to `[B, *grid, outputs]`.

    Example:
        >>> FNO(2, 4, modes=(3, 5), width=8, depth=2)(torch.randn(3, 8, 16, 2)).shape
        torch.Size([3, 8, 16, 4])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        modes: Sequence[int] = (8, 8),
        width: int = 32,
        depth: int = 4,
        hidden: int = 128,
        activate_last: bool = True,
    ) -> None:
        super().__init__()
        checks.whole("width", width, 1)
        checks.whole("depth", depth, 1)
        self.lift = nn.Linear(checks.whole("inputs", inputs, 1), width)
        self.spectral = nn.ModuleList(SpectralConv(width, width, modes) for _ in range(depth))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.project = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))
        self.activate_last = activate_last
        for layer in (m for m in self.modules() if isinstance(m, nn.Linear)):
            # Outputs that hardly vary are useless as basis functions: start wider than is the default.
            nn.init.xavier_normal_(layer.weight, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        v = self.lift(x)
        for k, (spectral, pointwise) in enumerate(zip(self.spectral, self.pointwise, strict=True)):
            v = spectral(v.movedim(-1, 1)).movedim(1, -1) + pointwise(v)
            v = F.gelu(v) if self.activate_last or k + 1 < len(self.spectral) else v
        return self.project(v)
