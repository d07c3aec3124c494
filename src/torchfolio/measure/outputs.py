"""What a network answers, asked in one way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.data.examples import Examples
from torchfolio.measure.untouched import untouched


@torch.no_grad()
def outputs(model: nn.Module, data: Any, *, batch_size: int = 512) -> Tensor:
    """Outputs of a network for many examples, in evaluation mode and without gradients.

    The network is left as it was, modules with state (spiking neurons) start every batch afresh. Inputs go to the
    device of the weights, those in floating point in their precision.

    Args:
        model: network from the inputs to one tensor; for a rule that answers in its own way, `rule.predictor(net)`.
        data: whatever `torchfolio.data.Examples` takes, with targets, which are left out, or without.
        batch_size: examples at a time, unless the data bring batches of their own.

    Returns:
        Outputs `[N, ...]` on the CPU.

    Raises:
        TypeError: if the network returns something else than a tensor.
        ValueError: if there is no example.

    Example:
        >>> labels = outputs(net, x_test).argmax(1)
    """
    examples = Examples(data)
    inputs_part = slice(None, -1) if examples.supervised else slice(None)
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    parts: list[Tensor] = []
    with untouched(model, training=False):
        for row in examples.batches(batch_size):
            answer = model(*(_like(x, weight) for x in row[inputs_part]))
            if not isinstance(answer, Tensor):
                raise TypeError(f"expected {type(model).__name__} to return a tensor, got {type(answer).__name__}")
            parts.append(answer.cpu())
    return torch.cat(parts)


def _like(x: Tensor, weight: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return x.to(weight.device, weight.dtype if x.is_floating_point() else None)
