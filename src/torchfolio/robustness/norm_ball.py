"""The points that an attack may reach from an input: where it starts, how it steps, how it is projected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from torchfolio.robustness.attack_base import Clip, Norm, lengths, wide

__all__ = ["Ball", "Start"]

Start = Literal["uniform", "zero"]


@dataclass(frozen=True)
class Ball:
    """The points that an attack may reach from an input."""

    eps: float
    norm: Norm
    clip: Clip

    def start(self, x: Tensor, start: Start, generator: torch.Generator | None) -> Tensor:
        if start == "zero":
            return self.clipped(x)
        source = x.device if generator is None else generator.device
        shape = (len(x), *x.shape[1:])
        if self.norm == "inf":
            low, high = x - self.eps, x + self.eps
            if self.clip is not None:
                low, high = low.clamp(*self.clip), high.clamp(*self.clip)
            u = torch.rand(shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
            return self.project(x, low + u * (high - low))
        direction = torch.randn(shape, generator=generator, device=source, dtype=x.dtype).to(x.device)
        radius = torch.rand(len(x), generator=generator, device=source, dtype=x.dtype).to(x.device)
        radius = self.eps * radius ** (1 / max(1, x[0].numel()))
        return self.project(x, x + direction / wide(lengths(direction), x) * wide(radius, x))

    def step(self, x: Tensor, current: Tensor, gradient: Tensor, size: float) -> Tensor:
        if self.norm == "inf":
            return self.project(x, current + size * gradient.sign())
        return self.project(x, current + size * gradient / wide(lengths(gradient), x))

    def project(self, x: Tensor, point: Tensor) -> Tensor:
        if self.norm == "inf":
            return self.clipped(torch.minimum(torch.maximum(point, x - self.eps), x + self.eps))
        change = point - x
        factor = (self.eps / lengths(change)).clamp(max=1)
        return self.clipped(x + change * wide(factor, x))

    def clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(*self.clip)
