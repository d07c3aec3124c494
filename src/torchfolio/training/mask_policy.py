"""A network from an example to a Beta distribution for each cell of its mask.

Mehmet Can Yavuz, Yang Yang, "Policy Gradient-Driven Noise Mask", 2024, https://arxiv.org/abs/2406.14568.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from torchfolio.checks import between, whole

__all__ = ["BetaMaskPolicy", "default_policy"]

LOGITS = (-4.0, 6.0)  # concentrations beyond them give samples of 0 and 1, and infinite densities


class BetaMaskPolicy(nn.Module):
    """A network from an example to a Beta distribution for each cell of its mask.

    $$A = \\mu\\,\\bar a + (1 - \\mu)\\,a(e(x)), \\qquad B = \\mu\\,\\bar b + (1 - \\mu)\\,b(e(x)), \\qquad
      m \\sim \\mathrm{Beta}(e^A, e^B),$$

    with features $e$, two heads $a, b$ and running base logits $\\bar a, \\bar b$. In training mode the base then moves,
    without a gradient: $\\bar a \\leftarrow \\rho\\,\\bar a + (1 - \\rho)\\,\\mathrm{mean}_{\\text{batch}}\\, a(e(x))$. The
    features are computed once a call.

    Args:
        features: network from the inputs to features `[B, feature_dim]`.
        feature_dim: width of the features.
        grid: cells of the mask: side of a square grid, or (rows, columns); for inputs without a picture (rows of a
            table, signals `[B, C, L]`) the length of their last axis as a tuple of one.
        hidden_layers: linear layers with batch norm and ReLU in each head, before the last.
        mix: share $\\mu$ of the base in the logits, in [0, 1].
        ema: decay $\\rho$ of the base, in [0, 1].

    Shapes:
        Inputs as `features` takes them; the distribution's are `[B, cells]`.

    Raises:
        ValueError: on settings out of range; in the call, if the features have another shape, or on one example in
            training mode, of which batch norm knows no variance.

    Reference:
        Section 3 of the paper; sizes and decays are the released code's.
    """

    base: Tensor

    def __init__(
        self,
        features: nn.Module,
        feature_dim: int,
        grid: int | tuple[int, ...],
        *,
        hidden_layers: int = 2,
        mix: float = 0.9,
        ema: float = 0.99,
    ) -> None:
        super().__init__()
        sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(sides) not in (1, 2):
            raise ValueError(f"expected a grid of one or two sides, got {grid!r}")
        self.grid = tuple(whole("a side of the grid", side, 1) for side in sides)
        self.features, self.feature_dim = features, whole("feature_dim", feature_dim, 1)
        self.mix, self.ema = between("mix", mix, 0, 1), between("ema", ema, 0, 1)
        whole("hidden_layers", hidden_layers, 0)
        cells = math.prod(self.grid)
        self.a = _head(feature_dim, cells, hidden_layers)
        self.b = _head(feature_dim, cells, hidden_layers)
        self.register_buffer("base", torch.rand(2, cells))

    def forward(self, x: Tensor) -> Beta:
        """The distribution of the cells of every example's mask."""
        features = self.features(x)
        if not isinstance(features, Tensor):
            raise ValueError(f"expected features of shape {(len(x), self.feature_dim)}, got {type(features).__name__}")
        if features.shape != (len(x), self.feature_dim):
            raise ValueError(
                f"expected features of shape {(len(x), self.feature_dim)}, got {tuple(features.shape)}; pool or "
                "flatten them, or give their feature_dim"
            )
        if self.training and len(x) < 2 and any(isinstance(m, nn.BatchNorm1d) for m in self.a):
            raise ValueError("expected a batch of at least two examples, as the heads have batch norm, got 1")
        logits = torch.stack([self.a(features), self.b(features)], dim=1)
        # Densities and their gradients need single precision whatever the network has.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        mixed = self.mix * self.base.to(logits) + (1 - self.mix) * logits
        if self.training:
            with torch.no_grad():
                self.base.lerp_(logits.mean(0).to(self.base), 1 - self.ema)
        return _beta(mixed)

    def base_distribution(self) -> Beta:
        """What the policy would draw of the base alone, `[1, cells]`."""
        return _beta(self.base[None] if self.base.dtype == torch.float64 else self.base[None].float())

    def extra_repr(self) -> str:
        return f"grid={self.grid}, mix={self.mix}, ema={self.ema}"


def _head(width: int, cells: int, hidden: int) -> nn.Sequential:
    layers = [part for _ in range(hidden) for part in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, cells))


def _beta(logits: Tensor) -> Beta:
    a, b = logits.clamp(*LOGITS).exp().unbind(1)
    return Beta(a, b, validate_args=False)


def default_policy(x: Tensor) -> BetaMaskPolicy:
    """A small policy for inputs like these: three convolutions for images and signals, one linear layer for rows."""
    if x.dim() == 2:
        return BetaMaskPolicy(nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU()), 32, (x.shape[1],))
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d(2)) if x.dim() == 4 else (nn.Conv1d, nn.AdaptiveAvgPool1d(2))
    widths = (x.shape[1], 8, 16, 16)
    layers = [
        part for k in range(3) for part in (conv(widths[k], widths[k + 1], 3, 1 if k == 0 else 2, padding=1), nn.ReLU())
    ]
    features = nn.Sequential(*layers, pool, nn.Flatten())
    grid = tuple(max(1, round(0.29 * side)) for side in x.shape[2:]) if x.dim() == 4 else (x.shape[2],)
    return BetaMaskPolicy(features, 16 * 2 ** (x.dim() - 2), grid)
