"""The forms in which data come to a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
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


def gathered(data: Data, device: torch.device | str | None = None) -> Batch:
    """All examples at once, x and y; see `batches`."""
    x, y = zip(*batches(data, 512, device), strict=True)
    return torch.cat(x), torch.cat(y)
