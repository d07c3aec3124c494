"""Examples: the one way in which data enter a method."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, default_collate

from torchfolio.data.rows import INPUTS, TARGETS, Row, Rows, StreamedRows, as_row, as_tensor, collate
from torchfolio.data.rows import WholeBatch as WholeBatch


class Examples:
    """Examples of whatever holds them: inputs, and targets where there are any.

    Make it once, at the door of a method, and ask it from there on. Taken are

    - a tensor or array of inputs; tensors or arrays (x, y), also with several inputs (x1, x2, y); a dict of them;
    - a `TensorDataset`, a `Subset` of one, any `Dataset` of pairs, a list of pairs;
    - a Hugging Face data set, or any other whose examples are dicts;
    - a `DataLoader`, or a list of batches, which keep their own size; their batches may be dicts.

    In dicts the input is under `pixel_values`, `input_ids`, `x`, `image`, `img` or `inputs`, the target under `labels`,
    `y`, `label`, `target` or `targets`. Arrays of float64 become torch's default dtype, integer arrays int64; tensors
    stay as they are.

    Args:
        data: data of any of these forms, or `Examples`, which are shared.
        name: word for the data in messages.

    Attributes:
        tensors: inputs and target as whole tensors, where they are in memory as such; else `None`.
        source: data in torch's own forms: those tensors, a `Dataset` of tuples, a `DataLoader`, or a list of batches.

    Raises:
        TypeError: if the data have none of these forms; says what they are.
        ValueError: if there is no example, or inputs and targets differ in number.

    Example:
        >>> examples = Examples((torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])))
        >>> len(examples), examples.labels.tolist(), [len(x) for x, y in examples.batches(2)]
        (5, [0, 1, 0, 1, 1], [2, 2, 1])
    """

    def __init__(self, data: Any, name: str = "data") -> None:
        self.name = name
        if isinstance(data, Examples):
            self.tensors, self.source = data.tensors, data.source
            return
        self.tensors: Row | None = whole_tensors(data, name)
        self.source: Any = self.tensors if self.tensors is not None else _source(data, name)
        if self.tensors is not None:
            self._check(self.tensors)
            if not len(self.tensors[0]):
                raise ValueError(f"{name} holds no examples")

    def __len__(self) -> int:
        if self.tensors is not None:
            return len(self.tensors[0])
        whole: Any = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        if isinstance(whole, list):
            return sum(len(as_row(batch, self.name)[0]) for batch in whole)
        try:
            return len(whole)
        except TypeError as error:
            raise TypeError(f"{self.name} is a stream of unknown length") from error

    def __getitem__(self, k: int) -> Row:
        """One example: the tensors of inputs and target, without an axis of the batch."""
        if self.tensors is not None:
            return tuple(t[k] for t in self.tensors)
        whole: Any = self.source.dataset if isinstance(self.source, DataLoader) else self.source
        if isinstance(whole, list) or not hasattr(whole, "__getitem__"):
            raise TypeError(f"{self.name} holds batches, whose single examples have no number")
        return as_row(whole[k], self.name)

    def __repr__(self) -> str:
        first = self.first(1)
        shapes = ", ".join(f"{tuple(t.shape[1:])} {str(t.dtype).removeprefix('torch.')}" for t in first)
        return f"Examples({shapes})"

    def first(self, n: int = 8) -> Row:
        """The first n examples (fewer from a loader whose batches are smaller) as one batch, to look at."""
        if self.tensors is not None:
            return tuple(t[:n] for t in self.tensors)
        return tuple(t[:n] for t in next(self.batches(n)))

    @property
    def supervised(self) -> bool:
        """Whether there are targets."""
        return len(self.first(1)) > 1

    @property
    def targets(self) -> Tensor | None:
        """All targets, on the CPU unless they are in memory elsewhere; `None` without targets."""
        if self.tensors is not None:
            return self.tensors[-1] if len(self.tensors) > 1 else None
        return torch.cat([row[-1].cpu() for row in self.batches()]) if self.supervised else None

    @property
    def labels(self) -> Tensor | None:
        """The targets where they are class labels: one whole number an example; else `None`."""
        targets = self.targets
        if targets is None or targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
            return None
        return targets

    def batches(self, batch_size: int | None = 512, device: torch.device | str | None = None) -> Iterator[Row]:
        """Batches (inputs…, target), in order; without targets (inputs,). None is empty.

        Args:
            batch_size: examples of a batch, unless the data bring batches of their own; `None` takes all at once.
            device: device of the batches; `None` leaves them where they are.

        Raises:
            TypeError: if a batch is not made of tensors.
            ValueError: if inputs and targets of a batch differ in number, or there is no example at all.
        """
        examples = 0
        for batch in self._drawn(batch_size):
            row = as_row(batch, self.name)
            self._check(row)
            if len(row[0]):
                examples += len(row[0])
                yield row if device is None else tuple(t.to(device, non_blocking=True) for t in row)
        if not examples:
            raise ValueError(f"expected at least one example, got none in {self.name}")

    def _drawn(self, batch_size: int | None) -> Iterable[Any]:
        if self.tensors is not None:
            size = len(self.tensors[0]) if batch_size is None else batch_size
            return zip(*(t.split(size) for t in self.tensors), strict=True)
        if isinstance(self.source, DataLoader) or not isinstance(self.source, Dataset):
            return self.source
        return DataLoader(self.source, len(self) if batch_size is None else batch_size, collate_fn=collate)

    def _check(self, row: Row) -> None:
        lengths = [len(t) if t.dim() else 0 for t in row]
        if len(set(lengths)) > 1:
            raise ValueError(f"expected as many targets as inputs in {self.name}, got lengths {lengths}")


def whole_tensors(data: Any, name: str = "data") -> Row | None:
    """The tensors of data that are in memory as a whole, else `None`."""
    if isinstance(data, Examples):
        return data.tensors
    if type(data) is TensorDataset:
        return data.tensors
    if isinstance(data, Tensor | np.ndarray):
        return (as_tensor(data, name),)
    if isinstance(data, Mapping) and all(isinstance(v, Tensor | np.ndarray) for v in data.values()):
        return as_row(data, name)
    if isinstance(data, tuple | list) and data and all(isinstance(t, Tensor | np.ndarray) for t in data):
        return tuple(as_tensor(t, name) for t in data)
    if isinstance(data, list) and data and _is_pair(data[0]) and not _is_batch(data[0]):
        return tuple(default_collate([as_row(pair, name) for pair in data]))
    if type(data) is Subset and (inside := whole_tensors(data.dataset, name)) is not None:
        chosen = torch.as_tensor(list(data.indices), dtype=torch.long)
        return tuple(t[chosen.to(t.device)] for t in inside)
    return None


def _source(data: Any, name: str) -> Any:
    """Data that are no whole tensors, in torch's own forms."""
    if isinstance(data, DataLoader):
        if _length(data) == 0:
            raise ValueError(f"{name} holds no examples")
        return data
    if isinstance(data, tuple | list):
        if data and _is_batch(data[0]):
            return list(data)
        kinds = ", ".join(dict.fromkeys(type(part).__name__ for part in itertools.islice(data, 20)))
        raise TypeError(
            f"expected {name} to be tensors or arrays (x, y), a list of pairs or of batches, got {kinds or 'nothing'}"
        )
    if isinstance(data, Mapping) and data and all(hasattr(part, "features") for part in data.values()):
        raise TypeError(f"expected {name} to be one split of the set, as in data['train'], got all: {', '.join(data)}")
    data = _unformatted(data)
    if isinstance(data, IterableDataset) and _of_hub(data):
        return StreamedRows(data, name)
    if isinstance(data, str | bytes | Mapping):
        what = f"a dict of {', '.join(map(str, data))}" if isinstance(data, Mapping) else f"text {data!r:.40}"
        raise TypeError(f"expected {name} to be tensors (x, y), a Dataset or a DataLoader, got {what}")
    if not isinstance(data, Dataset):
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            data = Rows(data, name)
        elif isinstance(data, Iterable):
            return data
        else:
            raise TypeError(
                f"expected {name} to be a Dataset, a DataLoader or tensors (x, y), got {type(data).__name__}"
            )
    if _length(data) == 0:
        raise ValueError(f"{name} holds no examples")
    return data if isinstance(data, Rows) or _is_plain(data) else Rows(data, name)


def _of_hub(data: Any) -> bool:
    return type(data).__module__.startswith("datasets.")


def _unformatted(data: Any) -> Any:
    """A Hugging Face set of pictures without a format of tensors or arrays, which would give bytes in another order."""
    features = getattr(data, "features", None) if _of_hub(data) else None
    pictures = features is not None and any(type(feature).__name__ == "Image" for feature in features.values())
    if not pictures or (hasattr(data, "format") and data.format["type"] in (None, "custom")):
        return data
    return data.with_format(None)


def _is_plain(data: Any) -> bool:
    """Whether torch's own collation makes batches of a data set: not of dicts, arrays and pictures.

    Rows that are no tuples (graphs) are left to it too.
    """
    from torchfolio.engine.modes import undisturbed

    if _length(data) is None:
        return True
    with undisturbed():  # examples may be augmented at random
        row = data[0]
    if isinstance(row, tuple | list):
        return all(isinstance(value, Tensor | bool | int | float | np.integer) for value in row)
    return not isinstance(row, Mapping | np.ndarray)


def _is_pair(row: Any) -> bool:
    return isinstance(row, tuple | list | Mapping) and len(row) > 1


def _is_batch(row: Any) -> bool:
    """Whether a pair is a batch: its target has an axis as long as the input's."""
    if isinstance(row, Mapping):
        row = [row[key] for keys in (INPUTS, TARGETS) for key in keys if key in row]
    if not isinstance(row, tuple | list) or not row or not all(isinstance(v, Tensor | np.ndarray) for v in row):
        return False
    return all(v.ndim > 0 for v in row) and len({len(v) for v in row}) == 1


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None
