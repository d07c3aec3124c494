"""The adapter that is usual: two small matrices and a ReLU behind a layer that stays as it is.

Reference: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

__all__ = ["Bottleneck", "add_bottlenecks"]


class Bottleneck(nn.Module):
    """$x + V \\mathrm{ReLU}(U x)$; V begins at 0."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(d, width), nn.Linear(width, d)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x).relu())


def add_bottlenecks(net: nn.Sequential, layers: Iterable[int], width: int) -> None:
    """Put a bottleneck behind linear layers, in place."""
    for k in layers:
        linear = net[k]
        assert isinstance(linear, nn.Linear)
        net[k] = nn.Sequential(linear, Bottleneck(linear.out_features, width).to(linear.weight.device))
