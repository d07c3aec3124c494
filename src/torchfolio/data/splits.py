"""Train, validation and test examples of a data set, with what one must know of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset


@dataclass(frozen=True)
class Raw:
    """A data set as it was read: inputs as stored, images as bytes.

    Attributes:
        name: of the set.
        train: (x, y).
        test: (x, y), or `None` where the set has no test split of its own.
        val: (x, y), or `None`.
        classes: names of the labels; empty for regression.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    val: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for training.

    Attributes:
        name: of the set.
        train: examples to train on, (x, y): x float32 `[N, C, H, W]` or `[N, features]`; y int64 labels `[N]`, or
            float32 targets `[N]` or `[N, k]`.
        val: examples held out of the training part.
        test: examples to report on.
        classes: names of the labels; empty for regression.
        shape: of one x.
        mean: per channel or feature, of the training split before normalisation; images are in [0, 1].
        std: likewise; 1 where a feature is constant.
        normalized: whether x has been normalised with them.
    """

    name: str
    train: TensorDataset
    val: TensorDataset
    test: TensorDataset
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    mean: Tensor
    std: Tensor
    normalized: bool

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 for regression."""
        return len(self.classes)

    @property
    def task(self) -> str:
        """`"classification"` or `"regression"`."""
        return "classification" if self.classes else "regression"

    def denormalize(self, x: Tensor) -> Tensor:
        """Inputs in the units of the data (images in [0, 1]), if they are normalised."""
        if not self.normalized:
            return x
        shape = (-1, *[1] * (len(self.shape) - 1))
        return x * self.std.to(x).view(shape) + self.mean.to(x).view(shape)

    def __str__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        kind = f"{self.num_classes} classes" if self.classes else "regression"
        return f"{self.name}: {sizes}, {kind}, shape {self.shape}"


def split(
    raw: Raw,
    *,
    val: float | int,
    seed: int,
    train_size: int | None,
    test_size: int | None,
    image_size: int | None,
    normalize: bool,
) -> DataSplits:
    """Cut, scale and normalise what was read. See `torchfolio.data.load` for the arguments."""
    generator = torch.Generator().manual_seed(seed)
    _check_labels(raw)
    train, test = raw.train, raw.test
    if test is None:
        train, test = _cut_by_class(train, 0.2, generator) if raw.classes else _cut(train, 0.2, generator)
    if raw.val is not None:
        held, train = raw.val, _take(train, torch.randperm(len(train[1]), generator=generator))
    else:
        train, held = _cut(train, val, generator)
    test = _take(test, torch.randperm(len(test[1]), generator=generator))
    train, test = _first(train, train_size, "train_size"), _first(test, test_size, "test_size")
    parts = [(_scaled(x, image_size), y) for x, y in (train, held, test)]
    mean, std = _statistics(parts[0][0])
    if normalize:
        shape = (1, -1, *[1] * (parts[0][0].dim() - 2))
        parts = [((x - mean.view(shape)) / std.view(shape), y) for x, y in parts]
    x_train = parts[0][0]
    sets = [TensorDataset(x.contiguous(), y) for x, y in parts]
    return DataSplits(
        name=raw.name,
        train=sets[0],
        val=sets[1],
        test=sets[2],
        classes=raw.classes,
        shape=tuple(x_train.shape[1:]),
        mean=mean,
        std=std,
        normalized=normalize,
    )


def _take(part: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    return part[0][index], part[1][index]


def _first(part: tuple[Tensor, Tensor], size: int | None, name: str) -> tuple[Tensor, Tensor]:
    if size is None:
        return part
    if not 1 <= size <= len(part[1]):
        raise ValueError(f"expected {name} between 1 and {len(part[1])}, the examples there are, got {size}")
    return part[0][:size], part[1][:size]


def _cut(
    part: tuple[Tensor, Tensor], held: float | int, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Shuffle and hold a share or number of examples out."""
    n = len(part[1])
    if isinstance(held, float) and not 0 <= held < 1:
        raise ValueError(f"expected the validation share to be at least 0 and below 1, got {held}")
    count = round(held * n) if isinstance(held, float) else held
    if not 0 <= count < n:
        raise ValueError(f"expected to hold out between 0 and {n - 1} of {n} training examples, got {count}")
    order = torch.randperm(n, generator=generator)
    return _take(part, order[count:]), _take(part, order[:count])


def _cut_by_class(
    part: tuple[Tensor, Tensor], share: float, generator: torch.Generator
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Shuffle and hold the same share of every class out."""
    order = torch.randperm(len(part[1]), generator=generator)
    labels = part[1][order]
    held = torch.zeros(len(order), dtype=torch.bool)
    for label in labels.unique():
        where = (labels == label).nonzero().flatten()
        held[where[: round(share * len(where))]] = True
    return _take(part, order[~held]), _take(part, order[held])


def _scaled(x: Tensor, image_size: int | None) -> Tensor:
    """Bytes to [0, 1], images to the side asked for."""
    x = x.float().div_(255) if x.dtype == torch.uint8 else x.float()
    if image_size is None:
        return x
    if x.dim() != 4:
        raise ValueError(f"image_size is for images, this set has inputs of shape {tuple(x.shape[1:])}")
    if not isinstance(image_size, int) or image_size < 1:
        raise ValueError(f"expected image_size to be a whole number of at least 1, got {image_size!r}")
    if x.shape[-2:] == (image_size, image_size) or not len(x):
        return x
    if x.shape[-1] % image_size == 0 and x.shape[-2] % image_size == 0:
        return F.avg_pool2d(x, (x.shape[-2] // image_size, x.shape[-1] // image_size))
    return F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True).clamp(0, 1)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel or feature, summed in float64."""
    axes = [0, *range(2, x.dim())]
    count = x.numel() / x.shape[1]
    mean = x.sum(axes, dtype=torch.float64) / count
    # A second pass over chunks: no copy of the whole set in double precision, and no cancellation.
    shape = (1, -1, *[1] * (x.dim() - 2))
    square = sum((chunk.double() - mean.view(shape)).square().sum(axes) for chunk in x.split(4096))
    std = (torch.as_tensor(square) / count).sqrt()
    # A feature is constant where its spread is rounding.
    std[std <= 1e-12 * mean.abs().clamp_min(1)] = 1
    return mean.float(), std.float()


def _check_labels(raw: Raw) -> None:
    for part in (raw.train, raw.val, raw.test):
        if part is None:
            continue
        x, y = part
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{raw.name} has {len(x)} inputs and {len(y)} targets in a split")
        if raw.classes and (int(y.min()) < 0 or int(y.max()) >= len(raw.classes)):
            raise ValueError(
                f"{raw.name} has labels from {int(y.min())} to {int(y.max())}, expected 0 to {len(raw.classes) - 1}"
            )
