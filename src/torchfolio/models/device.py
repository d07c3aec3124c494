"""Where a network is."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["device_of"]


def device_of(model: nn.Module, like: Tensor | None = None) -> torch.device:
    """Device of the first parameter or buffer; that of `like`, or the CPU, where a network has neither.

    Args:
        model: network.
        like: tensor whose device a network without tensors works on; on the CPU by default.
    """
    first = next(itertools.chain(model.parameters(), model.buffers()), like)
    return torch.device("cpu") if first is None else first.device
