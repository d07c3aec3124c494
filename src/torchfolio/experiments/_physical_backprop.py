"""Physical blocks trained by backprop through digital twins: in silico, or with the hardware in the loop.

Reference: Wright et al., "Deep physical neural networks trained with backpropagation", Nature 601, 2022: physics-aware
training takes values from the hardware and gradients from the twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.local.physical_ff import PhysicalBlock

__all__ = ["train_through_twins"]


def train_through_twins(
    blocks: Sequence[PhysicalBlock],
    split: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    error: float,
    aware: bool,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> dict[str, Any]:
    """Train the blocks' linear layers and a softmax head; accuracy on the true systems, and their calls until then.

    Args:
        blocks: blocks whose inputs have room for ten labels in front, which is left at 0.
        split: examples and labels to train and to test.
        error: relative error of the twins.
        aware: whether values come from the hardware in training; gradients come from the twins either way.
        epochs: passes over the examples.
        lr: learning rate of Adam.
        batch_size: examples of a batch.
        seed: seed of the twins' errors and of the batches.
    """
    x, y, x_test, y_test = split
    inputs, tests = F.pad(x, (10, 0)), F.pad(x_test, (10, 0))
    twins = [block.physical.twin(error, seed=seed + k) for k, block in enumerate(blocks)]
    head = nn.Linear(blocks[-1].linear.out_features, 10).to(x.device)
    weights = [*(p for block in blocks for p in block.linear.parameters()), *head.parameters()]

    def logits(h: Tensor, real: bool, model: bool) -> Tensor:
        for block, twin in zip(blocks, twins, strict=True):
            e = block.encode(h)
            r = twin.response(e) if model else block.physical(e)
            r = r + (block.physical(e) - r).detach() if real and model else r
            h = block.linear(torch.cat((r, h), 1) if block.skip else r)
        return head(h)

    optimizer, generator = torch.optim.Adam(weights, lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(logits(inputs[rows], aware, True), y[rows]).backward()
            optimizer.step()
    calls = sum(block.physical.calls for block in blocks)
    with torch.no_grad():
        right = logits(tests, True, False).argmax(1) == y_test
    return {"accuracy": 100 * float(right.float().mean()), "calls": calls}
