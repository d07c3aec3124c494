"""What is wrong with an input, said before training starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from torchfolio.engine.loader import Data, tensors_of
from torchfolio.engine.modes import evaluating


def check_data(data: Data, name: str) -> None:
    """Refuse data without examples, of unequal lengths, or with NaN.

    Raises:
        ValueError: saying which.
        TypeError: if it is no data set at all.
    """
    tensors = tensors_of(data)
    if tensors is None:
        if not hasattr(data, "__getitem__") and not isinstance(data, DataLoader) and not hasattr(data, "__iter__"):
            raise TypeError(
                f"expected {name} to be a Dataset, a DataLoader or tensors (x, y), got {type(data).__name__}"
            )
        if hasattr(data, "__len__") and len(data) == 0:  # pyright: ignore[reportArgumentType]
            raise ValueError(f"{name} holds no examples")
        return
    lengths = [len(t) for t in tensors]
    if len(tensors) < 2:
        raise ValueError(f"expected {name} to hold inputs and targets, got {len(tensors)} tensor(s)")
    if len(set(lengths)) > 1:
        raise ValueError(f"expected as many targets as inputs in {name}, got lengths {lengths}")
    if not lengths[0]:
        raise ValueError(f"{name} holds no examples")
    for tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor.flatten(1) if tensor.dim() > 1 else tensor[:, None])).any(1).sum())
            raise ValueError(f"{name} has NaN or infinite values in {bad} of {len(tensor)} examples")


def check_fits(model: nn.Module, example: Sequence[Tensor], data: Data) -> None:
    """Run the model on an example and compare its output with the targets.

    Raises:
        ValueError: if the model cannot take the inputs, or labels are outside the model's classes.
    """
    *inputs, target = example
    try:
        with torch.no_grad(), evaluating(model):
            output = model(*(x[:2] for x in inputs))
    except Exception as error:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(f"the model cannot take a batch of {shapes}: {type(error).__name__}: {error}") from error
    if not isinstance(output, Tensor) or output.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return
    tensors = tensors_of(data)
    labels = target if tensors is None else tensors[-1]
    low, high = int(labels.min()), int(labels.max())
    if labels.dtype == torch.bool or low < 0 or high >= output.shape[1]:
        got = "booleans" if labels.dtype == torch.bool else f"{low} to {high}"
        raise ValueError(
            f"expected labels from 0 to {output.shape[1] - 1}, the model's {output.shape[1]} outputs, got {got}"
        )


def check_positive(**values: int | None) -> None:
    """Refuse numbers below 1.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in values.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"expected {name} to be a whole number of at least 1, got {value!r}")
