"""The forms in which data come to a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Batch = tuple[Tensor, Tensor]
Data = Sequence[Tensor] | Dataset | Iterable[Sequence[Tensor]]


def batches(data: Data, batch_size: int | None, device: torch.device | str | None = None) -> Iterator[Batch]:
    """Batches (x, y) of a pair of tensors, a data set, or anything that yields batches.

    Args:
        data: a pair of tensors (x `[N, ...]`, y `[N, ...]`); a map-style data set; or a loader or list of
            batches, which keep their own size.
        batch_size: of tensors and data sets; `None` takes all at once.
        device: where the batches go; `None` leaves them where they are.

    Yields:
        Pairs of tensors of equal length, none of them empty.

    Raises:
        TypeError: if what comes is no pair of tensors.
        ValueError: if x and y are of different length, or there is no example.
    """
    examples = 0
    for batch in _split(data, batch_size):
        if not (isinstance(batch, Sequence) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch)):
            raise TypeError(f"expected batches (x, y) of two tensors, got {_describe(batch)}")
        x, y = batch
        if len(x) != len(y):
            raise ValueError(f"expected as many targets as inputs, got {len(y)} and {len(x)}")
        if len(x):
            examples += len(x)
            yield (x, y) if device is None else (x.to(device), y.to(device))
    if not examples:
        raise ValueError("expected at least one example, got none")


def gathered(data: Data, device: torch.device | str | None = None) -> Batch:
    """All examples at once, x and y; see `batches`."""
    x, y = zip(*batches(data, 512, device), strict=True)
    return torch.cat(x), torch.cat(y)


def _split(data: Any, batch_size: int | None) -> Iterable[Sequence[Tensor]]:
    pair = data.tensors if isinstance(data, TensorDataset) else data
    if isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair):
        x, y = pair
        if len(x) != len(y):
            raise ValueError(f"expected as many targets as inputs, got {len(y)} and {len(x)}")
        size = max(len(x), 1) if batch_size is None else batch_size
        return zip(x.split(size), y.split(size), strict=True)
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size or len(cast(Sized, data)))
    return data


def _describe(batch: object) -> str:
    return f"{len(batch)} items" if isinstance(batch, Sequence) else type(batch).__name__
