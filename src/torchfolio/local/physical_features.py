"""Physical blocks trained without labels: data against hybrids of two examples, then a linear readout.

The unsupervised form of physical local learning (Momeni et al., Science 382, 2023), with the negatives of Hinton's
forward-forward algorithm (2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import labels, positive, same_length
from torchfolio.local.physical_blocks import PhysicalBlock
from torchfolio.local.physical_network import LocalNetwork

__all__ = ["PhysicalLocalFeatures", "hybrid_masks"]


class PhysicalLocalFeatures(LocalNetwork):
    """Blocks trained without labels, data against hybrids of two examples, and a ridge readout of their outputs.

    A hybrid is $m \\odot x_a + (1 - m) \\odot x_b$ with a smooth random mask $m$. Labels are used by the readout alone, on
    the outputs of all blocks but the first (of the first, if it is the only one).

    Args:
        blocks: blocks in order; the first takes as many inputs as an example has features.
        num_classes: number of classes of the readout.
        shape: shape of an example, in which masks are smooth: `(H, W)`, `(C, H, W)` or `(D,)`.
        ridge: penalty of the readout on standardised outputs, per example.
        standardize: whether inputs are standardised, see `PhysicalLocalNet`.
    """

    readout: Tensor

    def __init__(
        self,
        blocks: Sequence[PhysicalBlock],
        num_classes: int,
        shape: Sequence[int],
        ridge: float = 1e-3,
        standardize: bool = True,
    ) -> None:
        self.shape, self.ridge = tuple(shape), positive("ridge", ridge)
        n = int(torch.Size(self.shape).numel())
        super().__init__(blocks, num_classes, n, 0, standardize)
        width = sum(block.linear.out_features for block in self.blocks[1:] or self.blocks)
        self.register_buffer("readout", torch.zeros(2 * width + 1, num_classes))

    def features(self, x: Any) -> Tensor:
        """Signed and absolute outputs of the blocks that the readout sees, `[N, F]`."""
        outputs = self.layers(self.scale(x))
        z = torch.cat(outputs[1:] or outputs, 1)
        return torch.cat((z, z.abs()), 1)

    def fit_readout(self, x: Any, y: Tensor) -> Self:
        """Ridge regression of one-hot labels on the features, in float64."""
        y = labels(torch.as_tensor(y), self.num_classes).to(self.low.device)
        z = self.features(x).double()
        same_length(x=z, y=y)
        mean, std = z.mean(0), z.std(0, correction=0).clamp_min(1e-12)
        z, targets = (z - mean) / std, F.one_hot(y, self.num_classes).double()
        gram = z.mT @ z + self.ridge * len(z) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        weight = torch.linalg.solve(gram, z.mT @ (targets - targets.mean(0))) / std[:, None]
        self.readout.copy_(torch.cat((weight, targets.mean(0, keepdim=True) - mean[None] @ weight)))
        return self

    def predict(self, x: Any) -> Tensor:
        """Class of the largest output of the readout."""
        if not self.readout.any():
            raise ValueError("expected a fitted readout; call fit_readout first")
        return (self.features(x) @ self.readout[:-1] + self.readout[-1]).argmax(1)

    def _pairs(self, x: Tensor, y: Tensor | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if len(x) < 2:
            raise ValueError("expected batches of two examples or more for hybrids, got one")
        # A shift of a random order: no example is its own partner.
        order = torch.randperm(len(x), generator=generator)
        partner = torch.empty_like(order).scatter_(0, order, order.roll(1)).to(x.device)
        m = hybrid_masks(len(x), self.shape, generator).flatten(1).to(x)
        return x, m * x + (1 - m) * x[partner]


def hybrid_masks(n: int, shape: Sequence[int], generator: torch.Generator, blurs: int = 6) -> Tensor:
    """Random masks of 0 and 1 with large patches: noise, blurred with (1/4, 1/2, 1/4) along each axis, over 0.5.

    Args:
        n: number of masks.
        shape: shape of an example, `(D,)`, `(H, W)` or `(C, H, W)`, whose channels share a mask.
        generator: source of randomness.
        blurs: number of passes.

    Returns:
        Masks `[n, *shape]`.
    """
    plane = tuple(shape[-2:])
    noise = torch.rand(n, *plane, generator=generator)
    for _ in range(blurs):
        for axis in range(1, noise.dim()):
            size = noise.shape[axis]
            before = noise.index_select(axis, torch.arange(-1, size - 1).clamp_min(0))
            after = noise.index_select(axis, torch.arange(1, size + 1).clamp_max(size - 1))
            noise = before / 4 + noise / 2 + after / 4
    mask = (noise > 0.5).float()
    return mask[:, None].expand(n, *shape) if len(shape) == 3 else mask
