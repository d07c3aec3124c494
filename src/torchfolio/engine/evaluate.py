"""Loss and accuracy of a network on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchfolio.engine.checks import check_data
from torchfolio.engine.loader import Data, tensors_of
from torchfolio.engine.modes import evaluating
from torchfolio.engine.rules import default_loss

Loss = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss | None = None,
    batch_size: int = 512,
    device: str | torch.device | None = None,
) -> dict[str, float]:
    """Mean loss, and accuracy where the targets are labels, over a data set in evaluation mode.

    Args:
        model: the network; its modes are restored.
        data: a `Dataset`, a `DataLoader` or tensors (x, y).
        loss: criterion with mean reduction; by default cross-entropy for integer targets, else the mean squared
            error.
        batch_size: examples at a time, unless `data` is a `DataLoader`.
        device: where to compute; the model's own device by default, `"auto"` takes an accelerator if there is one.

    Returns:
        `{"loss": ..., "accuracy": ...}`; no accuracy for other targets than labels.

    Raises:
        ValueError: if there are no examples.
    """
    check_data(data, "data")
    if device is not None:
        model.to(resolve_device(device))
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=where)
    correct = torch.zeros((), dtype=torch.long, device=where)
    count, labelled = 0, False
    with evaluating(model):
        for *inputs, target in _batches(data, batch_size):
            target = target.to(where)
            output = model(*(x.to(where) for x in inputs))
            total += (loss or default_loss)(output, target).double() * len(target)
            count += len(target)
            if output.dim() == 2 and target.dim() == 1 and not target.is_floating_point():
                labelled = True
                correct += (output.argmax(1) == target).sum()
    scores = {"loss": total.item() / count}
    return {**scores, "accuracy": correct.item() / count} if labelled else scores


def _batches(data: Data, batch_size: int) -> Iterator[Sequence[Tensor]]:
    tensors = tensors_of(data)
    if tensors is not None:
        yield from zip(*(t.split(batch_size) for t in tensors), strict=True)
    elif isinstance(data, DataLoader):
        yield from data
    else:
        yield from DataLoader(data, batch_size=batch_size)  # pyright: ignore[reportArgumentType]


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; `"auto"` takes an accelerator if there is one."""
    if str(device) != "auto":
        return torch.device(device)
    return (
        torch.accelerator.current_accelerator() or torch.device("cpu")
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
