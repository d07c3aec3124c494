"""The forms in which data come to a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchfolio.data.examples import Examples

Batch = tuple[Tensor, Tensor]
Data = Sequence[Tensor] | Dataset | Iterable[Sequence[Tensor]]


def batches(data: Data, batch_size: int | None, device: torch.device | str | None = None) -> Iterator[Batch]:
    """Batches (x, y) of a pair of tensors, a data set, or anything that yields batches.

    Args:
        data: whatever `torchfolio.data.Examples` takes; a loader or list of batches keeps its own size.
        batch_size: batch size of tensors and data sets; `None` takes all at once.
        device: device of the batches; `None` leaves them where they are.

    Yields:
        Pairs of tensors of equal length, none of them empty.

    Raises:
        TypeError: if what comes is no pair of tensors.
        ValueError: if x and y are of different length, or there is no example.
    """
    for row in Examples(data).batches(batch_size, device):
        if len(row) != 2:
            raise TypeError(f"expected batches (x, y) of two tensors, got {len(row)} items")
        yield row[0], row[1]


@contextmanager
def taking(model: nn.Module, *batch: Tensor) -> Iterator[None]:
    """Say in one sentence which batch a network, or the loss of its outputs, cannot take.

    Raises:
        ValueError: where torch raises a `RuntimeError`, as on a batch of another dtype than the weights.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        given = " and ".join(f"{tuple(t.shape)} {t.dtype}" for t in batch)
        weights = next((f" (its weights are {p.dtype})" for p in model.parameters() if p.is_floating_point()), "")
        raise ValueError(f"the network{weights} or its loss cannot take a batch of {given}: {first}") from error


def gathered(data: Data, device: torch.device | str | None = None) -> Batch:
    """All examples at once, x and y; see `batches`."""
    x, y = zip(*batches(data, 512, device), strict=True)
    return torch.cat(x), torch.cat(y)
