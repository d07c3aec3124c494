"""Synthetic gradients: a small network that says what gradient a layer would get, before anybody goes backward.

Max Jaderberg, Wojciech Marian Czarnecki, Simon Osindero, Oriol Vinyals, Alex Graves, David Silver, Koray Kavukcuoglu,
"Decoupled Neural Interfaces using Synthetic Gradients", ICML 2017, https://arxiv.org/abs/1608.05343.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchfolio.checks import whole

__all__ = ["FeedbackPath", "SyntheticGradient"]


class SyntheticGradient(nn.Module):
    """A model of gradients: from a layer's output and the target to the gradient of the loss by that output.

    Args:
        in_dim: width of the layer's output.
        target_dim: width of what is known besides (targets, errors); 0 for nothing.
        out_dim: width of the gradient; `in_dim` by default.
        hidden: units of the hidden layer; 0 makes the model linear.

    Shapes:
        `[B, in_dim]` and `[B, target_dim]` to `[B, out_dim]`.

    Reference:
        Jaderberg et al., ICML 2017, section 2.1; on labels, section 3.1.
    """

    def __init__(self, in_dim: int, target_dim: int = 0, out_dim: int | None = None, hidden: int = 0) -> None:
        super().__init__()
        self.in_dim, self.target_dim = whole("in_dim", in_dim, 1), whole("target_dim", target_dim, 0)
        out_dim = in_dim if out_dim is None else whole("out_dim", out_dim, 1)
        size = in_dim + target_dim
        self.net: nn.Module = nn.Linear(size, out_dim)
        if whole("hidden", hidden, 0):
            self.net = nn.Sequential(nn.Linear(size, hidden), nn.Tanh(), nn.Linear(hidden, out_dim))

    def forward(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        return self.net(output if target is None else torch.cat((output, target), -1))

    @staticmethod
    def loss(predicted: Tensor, true: Tensor) -> Tensor:
        """The regression that trains it: squared distance to the true gradient, a mean over examples.

        Args:
            predicted: `[..., D]`, of this module.
            true: the loss's gradient for each example; its graph is cut.
        """
        if predicted.shape != true.shape:
            raise ValueError(f"expected gradients of shape {tuple(predicted.shape)}, got {tuple(true.shape)}")
        return (predicted - true.detach()).square().sum(-1).mean()


class FeedbackPath(nn.Module):
    """The synthetic gradients of all controllers of a memory network, from what they did, the error and the label.

    One object may serve several networks: its gradients come from all of them. It never sees a network's weights.
    The read-out's signal is the error itself with a learned correction, $\\hat\\delta = \\varepsilon + 0.1\\, G([\\hat
    y; y])$.

    Args:
        sizes: width of each controller's output, in order.
        out_dim: width of predictions, errors and (one-hot) targets.
        hidden: units of the hidden layer.

    Shapes:
        activities `[B, size]`, output, error and target `[B, out_dim]`; returns gradients `[B, sum(sizes)]` of the
        controllers and `[B, out_dim]` of the read-out.
    """

    def __init__(self, sizes: tuple[int, ...], out_dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.sizes, self.out_dim = tuple(whole("a size", size, 1) for size in sizes), whole("out_dim", out_dim, 1)
        self.controllers = SyntheticGradient(sum(self.sizes), 2 * out_dim, hidden=whole("hidden", hidden, 1))
        self.readout = SyntheticGradient(out_dim, out_dim)

    def forward(
        self, activities: Sequence[Tensor], output: Tensor, error: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor]:
        controllers = self.controllers(torch.cat((*activities, error, target), -1))
        return controllers, torch.add(error, self.readout(output, target), alpha=0.1)
