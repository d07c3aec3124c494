"""Checks of arguments: one sentence each, what was expected and what was got.

Each returns the value, so that it can stand in an assignment. NaN passes none of them. Errors in the kind of a value
are `TypeError`, all others `ValueError`. Torch is not imported here.
"""

from __future__ import annotations

import difflib
import math
import numbers
import os
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any, TypeVar

__all__ = [
    "at_least",
    "between",
    "finite",
    "images",
    "labels",
    "network",
    "number",
    "one_of",
    "positive",
    "same_length",
    "whole",
    "writable",
]

T = TypeVar("T")
SHOWN = 80  # characters of a value in a message


def number(name: str, value: Any) -> Any:
    """Refuse what is no real number: text, `None`, a bool, NaN.

    Args:
        name: word for the value in the message.
        value: a Python or NumPy number, or a tensor or array of one element.

    Returns:
        The value as given.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is NaN.
    """
    _real(name, value, "a number")
    return value


def at_least(name: str, value: T, low: float) -> T:
    """Refuse a number below `low`, or an infinite one.

    Raises:
        TypeError: if the value is no number.
        ValueError: if it is smaller, infinite or NaN.
    """
    number = _real(name, value, f"a number of at least {low}")
    if not low <= number < math.inf:
        finite_too = " and finite" if number == math.inf else ""
        raise ValueError(f"expected {name} of at least {low}{finite_too}, got {_shown(value)}")
    return value


def positive(name: str, value: T) -> T:
    """Refuse a number that is not above 0.

    Raises:
        TypeError: if the value is no number.
        ValueError: if it is 0, negative, infinite or NaN.
    """
    if not 0 < _real(name, value, "a positive number") < math.inf:
        raise ValueError(f"expected {name} to be positive and finite, got {_shown(value)}")
    return value


def between(name: str, value: T, low: float, high: float, *, inclusive: bool | tuple[bool, bool] = True) -> T:
    """Refuse a number outside an interval.

    Args:
        name: word for the value in the message.
        value: number to check.
        low: lower end.
        high: upper end.
        inclusive: whether the ends belong to it; a pair for each of them.

    Raises:
        TypeError: if the value is no number.
        ValueError: if it is outside, or NaN.
    """
    lower, upper = inclusive if isinstance(inclusive, tuple) else (inclusive, inclusive)
    interval = f"{'[' if lower else '('}{low}, {high}{']' if upper else ')'}"
    x = _real(name, value, f"a number in {interval}")
    if not ((low <= x if lower else low < x) and (x <= high if upper else x < high)):
        raise ValueError(f"expected {name} in {interval}, got {_shown(value)}")
    return value


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Refuse what is no whole number, or one below `low` or above `high`.

    Args:
        name: word for the value in the message.
        value: a Python or NumPy integer; a bool is none, neither is 3.0.
        low: least value, if there is one.
        high: largest value, if there is one.

    Returns:
        The value as an `int`.

    Raises:
        TypeError: if it is no whole number.
        ValueError: if it is out of range.
    """
    limits = f" of at least {low}" if high is None else f" from {low} to {high}"
    limits = "" if low is None and high is None else f" of at most {high}" if low is None else limits
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be a whole number{limits}, got {_shown(value)}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"expected {name} to be a whole number{limits}, got {number}")
    return number


def one_of(name: str, value: T, options: Iterable[Any]) -> T:
    """Refuse what is not among the options, with the ones that are spelled alike.

    Raises:
        ValueError: if it is not.
    """
    options = list(options)
    # An equal value of another type is another one: True is not 1.
    if not any(type(value) is type(option) and value == option for option in options):
        close = difflib.get_close_matches(str(value), [o for o in options if isinstance(o, str)], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"expected {name} to be {_either(options)}, got {_shown(value)}{hint}")
    return value


def finite(name: str, value: T) -> T:
    """Refuse a tensor, array or number with NaN or infinite entries.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if an entry is NaN or infinite; says how many are.
    """
    given: Any = value
    if _is_tensor(given):
        import torch

        tensor = given.detach()
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return value
        # A sum is finite only if its terms are, and is one cheap pass; it may overflow where they are finite.
        if bool(torch.isfinite(tensor.sum())):
            return value
        bad, size = int((~torch.isfinite(tensor)).sum()), tensor.numel()
    else:
        import numpy as np

        array = np.asarray(value)
        if array.dtype.kind not in "biufc":
            raise TypeError(f"expected {name} to hold numbers, got {_shown(value)}")
        bad, size = int(array.size - np.isfinite(array).sum()), array.size
    if bad:
        what = f"got {_shown(value)}" if size == 1 else f"{bad} of {size} entries are NaN or infinite"
        raise ValueError(f"expected {name} to be finite, {what}")
    return value


def network(model: T, name: str = "the network") -> T:
    """Refuse a network that holds NaN, or infinity in a parameter; a buffer may hold it, as masks of attention do.

    Args:
        model: an `nn.Module`.
        name: word for it in the message.

    Raises:
        ValueError: naming the first such tensor.
    """
    from torch.nn.parameter import is_lazy

    given: Any = model
    parameters = dict(given.named_parameters())
    for key, tensor in [*parameters.items(), *given.named_buffers()]:
        if is_lazy(tensor) or tensor.is_meta:
            continue  # holds nothing yet
        values = tensor.detach()
        values = values.to_local() if hasattr(values, "to_local") else values  # of a sharded network
        if not (values.is_floating_point() or values.is_complex()) or bool(values.sum().isfinite()):
            continue  # a sum is finite only if its terms are
        if bool(values.isnan().any()) or (key in parameters and not bool(values.isfinite().all())):
            raise ValueError(f"{name} holds NaN or infinity in {key}")
    return model


def labels(y: T, num_classes: int | None = None, *, name: str = "y", ignore_index: int | None = None) -> T:
    """Refuse what are no class labels: whole numbers from 0, one an example.

    Args:
        y: tensor or array of labels `[N]`.
        num_classes: number of classes, if it is known.
        name: word for them in the message.
        ignore_index: label that is allowed besides, if there is one.

    Raises:
        TypeError: if they are no tensor or array of whole numbers.
        ValueError: if there are none, they are not one-dimensional, or one is out of range.
    """
    if not hasattr(y, "shape") or not hasattr(y, "dtype"):
        raise TypeError(f"expected {name} to be a tensor or array of labels, got {type(y).__name__}")
    array: Any = y
    integral = _integral(array)
    if not integral:
        raise TypeError(f"expected {name} to be whole numbers (class labels), got {array.dtype}")
    if array.ndim != 1 or not len(array):
        raise ValueError(f"expected {name} to be labels [N] of one example or more, got shape {tuple(array.shape)}")
    if ignore_index is not None:
        array = array[array != ignore_index]
        if not len(array):
            return y
    low, high = int(array.min()), int(array.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        until = f"0 to {num_classes - 1}" if num_classes is not None else "0 upwards"
        raise ValueError(f"expected {name} to be labels from {until}, got {low} to {high}")
    return y


def images(x: T, *, name: str = "x", unit: bool = False) -> T:
    """Refuse what is no batch of images `[N, C, H, W]` in floating point.

    Args:
        x: tensor of images.
        name: word for them in the message.
        unit: whether their values must be in [0, 1].

    Raises:
        TypeError: if it is no tensor in floating point.
        ValueError: if it has another number of axes, one is empty, or values are NaN, infinite or out of range.
    """
    if not _is_tensor(x):
        raise TypeError(f"expected {name} to be a tensor of images [N, C, H, W], got {type(x).__name__}")
    tensor: Any = x
    if tensor.dim() != 4 or not tensor.numel():
        raise ValueError(f"expected {name} to be images [N, C, H, W], got shape {tuple(tensor.shape)}")
    if not tensor.is_floating_point():
        raise TypeError(f"expected {name} to be images in floating point, got {tensor.dtype}")
    finite(name, tensor)
    if unit:
        low, high = tensor.detach().aminmax()
        if low < 0 or high > 1:
            raise ValueError(f"expected {name} to be images in [0, 1], got values from {low:.4g} to {high:.4g}")
    return x


def same_length(**values: Sized) -> int:
    """Refuse values that differ in length.

    Args:
        **values: values to compare, by name.

    Returns:
        Their length.

    Raises:
        ValueError: if they differ; with every length.
    """
    lengths = {name: len(value) for name, value in values.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"expected {' and '.join(lengths)} of the same length, {got}")
    return next(iter(lengths.values()), 0)


def writable(path: Path) -> Path:
    """Refuse a place where no file or folder can be made, found by trying: before the work for it begins.

    Args:
        path: file or folder that will be made or replaced; folders above it need not be there.

    Raises:
        OSError: naming it, and the folder that cannot be written.
    """
    import tempfile  # slow to import for the commands that write nothing

    whole = path.absolute()
    above = next(folder for folder in whole.parents if folder.exists())
    for folder in [above, whole] if whole.is_dir() else [above]:
        try:
            os.rmdir(tempfile.mkdtemp(prefix=".torchfolio-", dir=folder))
        except OSError as error:
            raise OSError(f"{path} cannot be written: {error.strerror} in {folder}") from error
    return path


def _real(name: str, value: Any, expected: str) -> float:
    """The value as a float, for comparing."""
    item = value
    if hasattr(value, "item") and hasattr(value, "shape"):
        if math.prod(value.shape) != 1:
            raise TypeError(f"expected {name} to be {expected}, got shape {tuple(value.shape)}")
        item = value.item()
    if isinstance(item, bool) or not isinstance(item, numbers.Real):
        raise TypeError(f"expected {name} to be {expected}, got {_shown(value)}")
    if item != item:
        raise ValueError(f"expected {name} to be {expected}, got nan")
    return item  # pyright: ignore[reportReturnType]


def _integral(array: Any) -> bool:
    if _is_tensor(array):
        return not (array.is_floating_point() or array.is_complex() or str(array.dtype) == "torch.bool")
    return getattr(array.dtype, "kind", "") in "iu"


def _is_tensor(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("is_floating_point", "dim", "detach"))


def _either(options: list[Any]) -> str:
    shown = [repr(option) for option in options]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}" if shown else "nothing"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
