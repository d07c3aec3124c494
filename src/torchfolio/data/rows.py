"""Examples and batches as tuples of tensors, whatever holds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

INPUTS = ("pixel_values", "input_ids", "x", "image", "img", "inputs")


TARGETS = ("labels", "y", "label", "target", "targets")


MASKS = ("attention_mask", "token_type_ids")


Row = tuple[Tensor, ...]


class WholeBatch(Sequence[Row]):
    """The rows of a batch that is whole already, for the `__getitems__` of a data set.

    A `DataLoader` of one's own reads them one by one; `fit` takes the batch as it is.

    Args:
        batch: tensors of equal length.
    """

    def __init__(self, *batch: Tensor) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch[0])

    def __getitem__(self, k: Any) -> Any:
        return tuple(t[k] for t in self.batch)

    def __iter__(self) -> Iterator[Row]:
        return zip(*self.batch, strict=True)


def collate(rows: list[Any] | WholeBatch) -> Any:
    """Rows as one batch.

    Raises:
        ValueError: if they differ in shape.
    """
    if isinstance(rows, WholeBatch):
        return list(rows.batch)
    try:
        return default_collate(rows)
    except RuntimeError as error:
        tensors = [[t for t in row if isinstance(t, Tensor)] for row in rows if isinstance(row, tuple | list)]
        for same in zip(*tensors, strict=False):
            shapes = list(dict.fromkeys(tuple(t.shape) for t in same))
            if len(shapes) > 1:
                raise ValueError(
                    f"expected examples of one shape, got {shapes[0]} and {shapes[1]}; resize, convert or pad them"
                ) from error
        raise


def as_row(row: Any, name: str = "data") -> Row:
    """One example or one batch as tensors (inputs…, target), without target (inputs,).

    Raises:
        TypeError: if it is neither a tensor, a tuple of what tensors can be made of, nor a dict with a known input.
    """
    if isinstance(row, Mapping):
        row = _of_mapping(row, name)
    if isinstance(row, Tensor | np.ndarray):
        return (as_tensor(row, name),)
    if isinstance(row, tuple | list) and row:
        return tuple(as_tensor(value, name) for value in row)
    raise TypeError(f"expected {name} to hold examples (x, y), got {type(row).__name__}")


def as_tensor(value: Any, name: str = "data") -> Tensor:
    """A tensor of a tensor, an array, a number, nested lists of numbers, or a picture (floats in [0, 1], `[C, H, W]`).

    Raises:
        TypeError: if it is none of them.
    """
    if isinstance(value, Tensor):
        return value
    if type(value).__module__.startswith("PIL."):
        pixels = np.asarray(value if value.mode in ("L", "RGB") else value.convert("RGB"))
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy()).float() / 255
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        shown = "text" if array.dtype.kind in "US" else type(value).__name__
        raise TypeError(f"expected {name} to hold tensors, arrays or numbers, got {shown} ({value!r:.60})")
    shared = array.flags.writeable and array.flags.c_contiguous
    tensor = torch.from_numpy(array if shared else np.array(array, order="C"))
    if tensor.dtype == torch.float64:
        return tensor.to(torch.get_default_dtype())
    return tensor.long() if array.dtype.kind in "iu" and array.dtype != np.uint8 else tensor


def _of_mapping(row: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    keys = [key for key in INPUTS if key in row]
    if not keys:
        raise TypeError(
            f"expected an input under {', '.join(INPUTS)} in {name}, got the keys {', '.join(map(str, row))}; "
            "rename one"
        )
    masked = [key for key in MASKS if key in row and not np.all(np.asarray(row[key]) == (key == "attention_mask"))]
    if masked:
        raise TypeError(
            f"{name} comes with {masked[0]}, which a model of one input does not get; give tensors (x, mask, y), which "
            "the model is called with in this order"
        )
    target = next((row[key] for key in TARGETS if key in row), None)
    return (row[keys[0]],) if target is None else (row[keys[0]], target)


class Rows(Dataset):
    """Any indexed data as a data set of tuples of tensors, (x, y) or (x,)."""

    def __init__(self, data: Any, name: str = "data") -> None:
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> Row:
        return as_row(self.data[int(k)], self.name)


class StreamedRows(IterableDataset):
    """A stream of examples as tuples of tensors, (x, y) or (x,)."""

    def __init__(self, data: Iterable[Any], name: str = "data") -> None:
        self.data, self.name = data, name

    def __iter__(self) -> Iterator[Row]:
        return (as_row(row, self.name) for row in self.data)

    def set_epoch(self, epoch: int) -> None:
        """Let the stream, where it shuffles, shuffle anew."""
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
