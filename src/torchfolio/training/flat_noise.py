"""Normal numbers on all gradients of a network by one draw for each device and type."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

__all__ = ["add_normal_"]


def add_normal_(parameters: Any, std: float, generator: torch.Generator | None, buffers: dict[Any, Tensor]) -> None:
    """Add normal numbers of a standard deviation to all gradients; `buffers` are used again where they fit."""
    gradients: dict[Any, list[Tensor]] = {}
    for k, parameter in enumerate(_unique(parameters)):
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.layout is not torch.strided or isinstance(gradient, DTensor):
            kind = "sharded" if isinstance(gradient, DTensor) else "sparse"
            raise NotImplementedError(
                f"the gradient of parameter {k}, of shape {tuple(parameter.shape)}, is {kind}; expected a dense one"
            )
        is_complex = gradient.is_complex()
        real = torch.view_as_real(gradient) if is_complex else gradient
        gradients.setdefault((real.device, real.dtype, is_complex), []).append(real)
    if std == 0:
        return
    with torch.no_grad():
        for (device, dtype, is_complex), group in gradients.items():
            # A draw in 16 bits would have few distinct values.
            draw = dtype if dtype in (torch.float32, torch.float64) else torch.float32
            source = generator.device if generator is not None else device
            sizes = [gradient.numel() for gradient in group]
            key = (source, draw)
            if key not in buffers or len(buffers[key]) < sum(sizes):
                buffers[key] = torch.empty(sum(sizes), device=source, dtype=draw)
            flat = buffers[key][: sum(sizes)].normal_(generator=generator).to(device)
            views = [v.view_as(g) for v, g in zip(flat.split(sizes), group, strict=True)]
            torch._foreach_add_(group, views, alpha=std * math.sqrt(0.5) if is_complex else std)


def _unique(parameters: Any) -> Iterator[Tensor]:
    """Parameters one by one, out of groups too, each once."""
    seen: set[int] = set()
    for entry in [parameters] if isinstance(parameters, Tensor) else parameters:
        for parameter in entry["params"] if isinstance(entry, Mapping) else [entry]:
            if not isinstance(parameter, Tensor):
                raise TypeError(f"expected parameters or groups of them, got {type(parameter).__name__}")
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
