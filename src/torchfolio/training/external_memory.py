"""A memory outside the network: rows that are read and written by attention.

Tsendsuren Munkhdalai, Hong Yu, "Neural Semantic Encoders", EACL 2017, https://arxiv.org/abs/1607.04315; erasing and
adding as in Alex Graves, Greg Wayne, Ivo Danihelka, "Neural Turing Machines", https://arxiv.org/abs/1410.5401.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchfolio.checks import positive, whole

__all__ = ["ExternalMemory"]


class ExternalMemory(nn.Module):
    """A learned first memory, and how a memory is read and written. The memory itself is a tensor that you carry:

    $$a = \\mathrm{softmax}(\\beta M q / \\sqrt k), \\qquad m = M^\\top a, \\qquad
      M \\leftarrow M \\odot (1 - w g^\\top) + w v^\\top .$$

    Args:
        slots: number of rows S.
        width: width of a row, k.
        sharpness: $\\beta > 0$ of the attention.

    Shapes:
        memory `[B, S, k]`, queries `[B, Q, k]`, attention `[B, Q, S]`; $w$ `[B, S]`, $v$ and $g$ `[B, k]`.
    """

    def __init__(self, slots: int, width: int, sharpness: float = 3.0) -> None:
        super().__init__()
        self.slots, self.width = whole("slots", slots, 1), whole("width", width, 1)
        self.sharpness = positive("sharpness", sharpness)
        # Equal rows would get equal attention for ever: they start at random.
        self.initial = nn.Parameter(0.3 * torch.randn(slots, width))

    def init_state(self, batch_size: int) -> Tensor:
        """The first memory of so many sequences."""
        return self.initial.expand(batch_size, -1, -1)

    def attend(self, memory: Tensor, queries: Tensor) -> Tensor:
        """Attention of queries over the rows."""
        nothing, scale = queries.new_zeros(()), self.sharpness / math.sqrt(self.width)
        return torch.softmax(torch.baddbmm(nothing, queries, memory.mT, beta=0, alpha=scale), -1)

    def write(self, memory: Tensor, attention: Tensor, value: Tensor, erase: Tensor) -> Tensor:
        """The memory after writing; a new one, the old stays."""
        change = torch.addcmul(value.unsqueeze(1), erase.unsqueeze(1), memory, value=-1)
        return torch.addcmul(memory, attention.unsqueeze(2), change)

    def extra_repr(self) -> str:
        return f"slots={self.slots}, width={self.width}, sharpness={self.sharpness:g}"
