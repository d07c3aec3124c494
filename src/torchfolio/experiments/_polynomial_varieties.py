"""Dimensions of the sets of functions that small polynomial networks reach, as the paper counts them."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchfolio.layers.quadratic import QuadraticLinear, functional_dimension

__all__ = ["VARIETIES", "dimensions"]

VARIETIES = (
    ((2, 1, 1), 4, 6),
    ((2, 2, 1), 6, 6),
    ((3, 2, 1), 8, 10),
    ((2, 2, 2, 1), 10, 12),
    ((3, 3, 2, 1), 17, 28),
)
"""Widths, and the dimensions with squared activation and with quadratic neurons."""


def dimensions(seed: int) -> dict[str, list[list[int]]]:
    """Dimensions of the functions that five architectures reach, with squared activation and quadratic neurons."""
    generator = torch.Generator().manual_seed(seed)
    return {"dimensions": [[_dimension(w, False, generator), _dimension(w, True, generator)] for w, _, _ in VARIETIES]}


def _dimension(widths: tuple[int, ...], quadratic: bool, generator: torch.Generator) -> int:
    kind = QuadraticLinear if quadratic else nn.Linear
    hidden = nn.ModuleList(kind(a, b, dtype=torch.float64) for a, b in pairwise(widths[:-1]))
    last = nn.Linear(widths[-2], widths[-1], dtype=torch.float64)
    net = nn.ModuleList([*hidden, last])
    params = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in net.named_parameters()}

    def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
        for k, layer in enumerate(net):
            own = {n.partition(".")[2]: p for n, p in params.items() if n.startswith(f"{k}.")}
            x = functional_call(layer, own, x)
            x = x if quadratic or layer is last else x.square()
        return x

    return functional_dimension(function, params, torch.randn(400, widths[0], generator=generator, dtype=torch.float64))  # pyright: ignore
