"""An LSTM that learns within an episode, by inputs with the targets before them: what memory networks are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LSTMLearner", "sequence_loss"]


class LSTMLearner(nn.Module):
    """An LSTM that gets an input with the target before it."""

    def __init__(self, inputs: int, out: int, hidden: int) -> None:
        super().__init__()
        self.cell, self.head, self.out = nn.LSTM(inputs + out, hidden, batch_first=True), nn.Linear(hidden, out), out

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = y if y.is_floating_point() else F.one_hot(y, self.out).to(x.dtype)
        before = F.pad(y[:, :-1], (0, 0, 1, 0))
        return self.head(self.cell(torch.cat((x, before), 2))[0])


def sequence_loss(output: Tensor, y: Tensor) -> Tensor:
    """The mean loss of all steps."""
    return F.mse_loss(output, y) if y.is_floating_point() else F.cross_entropy(output.flatten(0, 1), y.flatten())
