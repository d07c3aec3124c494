"""What a memory network carries through a sequence, what its steps leave behind, and the targets they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import finite
from torchfolio.shown import Shown

__all__ = ["Context", "FastState", "Learned", "Trace", "targets"]


@dataclass(frozen=True, repr=False)
class FastState(Shown):
    """What a network has learned within sequences, one row for each of them. New ones come out, none is changed.

    Attributes:
        memory: rows `[B, S, k]`.
        read: fast weights of the controller that asks `[B, h, k]`; `None` without a fast path, like those below.
        hidden: width of the answering controller's hidden layer `[B, h + k, h]`.
        readout: readout of its read-out `[B, h, out]`.
        write: vectors of the controller that writes `[B, h + out, 3k]`.
    """

    memory: Tensor
    read: Tensor | None = None
    hidden: Tensor | None = None
    readout: Tensor | None = None
    write: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> FastState:
        """A state of changed tensors."""
        return FastState(**{name: change(value) for name, value in self.state_dict().items()})

    def detach(self) -> FastState:
        """The same values without their graph."""
        return self.map(Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> FastState:
        """The state on another device or of another type, as `torch.Tensor.to`."""
        return self.map(lambda value: value.to(*args, **kwargs))

    def state_dict(self) -> dict[str, Tensor]:
        """Its tensors by name; `FastState(**tensors)` makes it again."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


class Context(NamedTuple):
    """What a step leaves for `FastSlowMemoryNetwork.observe`."""

    code: Tensor  # c
    query: Tensor  # q
    joint: Tensor  # [c; m]
    before: Tensor  # p
    spikes: Tensor  # s
    output: Tensor


class Learned(NamedTuple):
    """What an observation gives: the next state, inputs and output of the write controller, the signals."""

    state: FastState
    seen: Tensor
    written: Tensor
    signals: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class Trace(NamedTuple):
    """A whole episode `[B, T, ...]`: outputs, signals of the feedback path and what the true ones follow from."""

    output: Tensor
    error: Tensor
    signals: Tensor  # of q, p and the write controller
    correction: Tensor  # of the output
    hidden: Tensor
    read: Tensor  # m
    memory: Tensor  # before each step
    attention: Tensor


def targets(y: Tensor, task: str, out_dim: int, batch_size: int) -> Tensor:
    """Targets of sequences, checked: `[B, T, out]`, one-hot for classes.

    Args:
        y: labels `[B, T]`, or numbers `[B, T, out]` (`[B, T]` for one).
        task: `"regression"` or `"classification"`.
        out_dim: width of targets, or number of classes.
        batch_size: number of sequences expected.

    Raises:
        ValueError: on NaN, labels out of range, or another shape.
        TypeError: if labels are not whole numbers, or numbers not in floating point.
    """
    finite("y", y)
    if task == "regression":
        if not y.is_floating_point():
            raise TypeError(f"expected targets of a regression in floating point, got {y.dtype}")
        y = y.unsqueeze(2) if y.dim() == 2 and out_dim == 1 else y
        if y.dim() != 3 or y.shape[2] != out_dim or len(y) != batch_size:
            raise ValueError(f"expected targets for {batch_size} sequences with {out_dim} values, got {tuple(y.shape)}")
        return y
    if y.is_floating_point() or y.dtype == torch.bool:
        raise TypeError(f"expected class labels as whole numbers, not one-hot rows, got {y.dtype}")
    if y.dim() != 2 or len(y) != batch_size:
        raise ValueError(f"expected labels for {batch_size} sequences, one a step, got shape {tuple(y.shape)}")
    if int(y.min()) < 0 or int(y.max()) >= out_dim:
        raise ValueError(f"expected labels from 0 to {out_dim - 1}, got {int(y.min())} to {int(y.max())}")
    return F.one_hot(y.long(), out_dim)
