"""Train, validation and test examples of a data set, with what one must know of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from torchfolio.data.seen import Marks

PIECE = 1 << 18  # numbers that stay in the cache while they are scaled


@dataclass(frozen=True)
class Raw:
    """A data set as it was read: inputs as stored, images as bytes.

    Attributes:
        name: name of the set.
        train: (x, y).
        test: (x, y), or `None` where the set has no test split of its own.
        val: (x, y), or `None`.
        classes: names of the labels; empty for regression.
        key: digest of the names of its files, where their order decides what a row is.
        vocabulary: words that the numbers of a set of text stand for; the inputs are int64 `[N, length]` then, padded
            with 0.
    """

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor] | None
    val: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]
    key: str = ""
    vocabulary: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataSplits:
    """A data set ready for training.

    Attributes:
        name: name of the set.
        train: examples to train on, (x, y): x float32 `[N, C, H, W]` or `[N, features]`; y int64 labels `[N]`, or
            float32 targets `[N]` or `[N, k]`.
        val: examples held out of the training part; read when they are first asked for, like those of `test`.
        test: examples to report on.
        classes: names of the labels; empty for regression.
        shape: shape of one x.
        mean: per channel or feature, of the training split before normalisation; images are in [0, 1].
        std: standard deviation, likewise; 1 where a feature is constant.
        normalized: whether x has been normalised with them.
        split_digest: tells which examples are held out of a set without a test part of its own; empty for others.
        vocabulary: tokens by number of a set of text, whose x is int64 `[N, length]` and has no mean; empty for others.
        marks: marks of train, val and test: a number for every example that its content has in whatever set it stands.
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
    split_digest: str = ""
    vocabulary: tuple[str, ...] = ()
    marks: Sequence[Tensor] = ()

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

    def text(self, row: Tensor) -> str:
        """The words of one row of a set of text, without its padding."""
        return " ".join(self.vocabulary[int(k)] for k in row if int(k))

    def __str__(self) -> str:
        sizes = f"{len(self.train)} train, {len(self.val)} validation, {len(self.test)} test"
        kind = f"{self.num_classes} classes" if self.classes else "regression"
        return f"{self.name}: {sizes}, {kind}, shape {self.shape}"

    def __repr__(self) -> str:
        return f"DataSplits({self})"


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
    """Cut, scale and normalise what was read. See `torchfolio.data.load` for the arguments.

    Rows are chosen first and read last: what is left out costs nothing.
    """
    _check_labels(raw)
    rest, cut = _cut_test(raw)
    train, held = _cut_val(raw, rest, val)
    # The seed shuffles the training part alone; what is held out is the same for all of them, and in one order.
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))]
    train = _first(train, train_size, "train_size")
    test = _first(cut if raw.test is None else _constant_order(len(raw.test[1])), test_size, "test_size")
    sources = ((raw.train, train), (raw.val or raw.train, held), (raw.test or raw.train, test))
    if raw.vocabulary:
        if image_size is not None:
            raise ValueError(f"image_size is for images, {raw.name} is a set of text")
        mean, std, normalize = Tensor(), Tensor(), False
        sets = [TensorDataset(x[rows], y[rows]) for (x, y), rows in sources]
        x_train = sets[0].tensors[0]
    else:
        x_train = _scaled(raw.train[0], train, image_size)
        mean, std = _statistics(x_train)

        def finished(x: Tensor) -> Tensor:
            return _normalized(x, mean, std).contiguous() if normalize else x.contiguous()

        def later(x: Tensor, y: Tensor, rows: Tensor) -> TensorDataset:
            return _Later(len(rows), lambda: (finished(_scaled(x, rows, image_size)), y[rows]))

        x_train = finished(x_train)
        sets = [TensorDataset(x_train, raw.train[1][train]), *(later(x, y, rows) for (x, y), rows in sources[1:])]
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
        split_digest=_digest(raw, cut) if raw.test is None else "",
        vocabulary=raw.vocabulary,
        marks=Marks([(x, rows) for (x, _), rows in sources]),
    )


def whole(raw: Raw, like: DataSplits, image_size: int | None) -> TensorDataset:
    """All examples of what was read, for a network of another set. See `torchfolio.data.load_whole`."""
    _check_labels(raw)
    parts = [part for part in (raw.train, raw.val, raw.test) if part is not None]
    x = torch.cat([_scaled(x, torch.arange(len(x)), image_size) for x, _ in parts])
    y = torch.cat([y for _, y in parts])
    if tuple(x.shape[1:]) != like.shape:
        raise ValueError(f"{raw.name} has inputs of shape {tuple(x.shape[1:])}, {like.name} of {like.shape}")
    odd = sorted(set(raw.classes) - set(like.classes))
    if odd or bool(raw.classes) != bool(like.classes):
        here, there = (", ".join(names) or "no classes" for names in (odd, like.classes))
        raise ValueError(f"{raw.name} has {here}, expected of the classes of {like.name}: {there}")
    if raw.classes:
        y = torch.tensor([like.classes.index(name) for name in raw.classes])[y]
    elif y.shape[1:] != like.train.tensors[1].shape[1:]:
        raise ValueError(f"{raw.name} has targets of shape {tuple(y.shape[1:])}, {like.name} others")
    return TensorDataset(x.contiguous(), y)


SPLIT_SEED = 0  # of what is held out: the split belongs to the data, not to a training
TEST_SHARE = 0.2


def _constant_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))


def _cut_test(raw: Raw) -> tuple[Tensor, Tensor]:
    """Rows of the training source that are left to train on, and those held out for a set without a test part.

    A fifth of every class is held out, and at least one example of a class of two.
    """
    labels = raw.train[1]
    order = _constant_order(len(labels))
    if raw.test is not None:
        return order, order[:0]
    held = torch.zeros(len(order), dtype=torch.bool)
    groups = labels[order] if raw.classes else torch.zeros(len(order), dtype=torch.long)
    for group in groups.unique():
        where = (groups == group).nonzero().flatten()
        held[where[: max(round(TEST_SHARE * len(where)), int(len(where) > 1))]] = True
    if not held.any():
        raise ValueError(
            f"{raw.name} has {len(order)} examples of {len(raw.classes)} classes, too few to hold a test part out; "
            "expected two or more of a class, or a test split of its own (folders train/ and test/)"
        )
    return order[~held], order[held]


def _cut_val(raw: Raw, rest: Tensor, val: float | int) -> tuple[Tensor, Tensor]:
    """Rows to train on, and rows to validate on: of the validation source where there is one."""
    if raw.val is not None:
        return rest, torch.arange(len(raw.val[1]))
    n = len(rest)
    if isinstance(val, float) and not 0 <= val < 1:
        raise ValueError(f"expected the validation share to be at least 0 and below 1, got {val}")
    count = max(round(val * n), int(val > 0 and n > 1)) if isinstance(val, float) else val
    if not 0 <= count < n:
        raise ValueError(f"expected to hold out between 0 and {n - 1} of {n} training examples, got {count}")
    order = rest[_constant_order(n)]
    return order[count:], order[:count]


def _first(rows: Tensor, size: int | None, name: str) -> Tensor:
    if size is None:
        return rows
    if not 1 <= size <= len(rows):
        raise ValueError(f"expected {name} between 1 and {len(rows)}, the examples there are, got {size}")
    return rows[:size]


def _digest(raw: Raw, cut: Tensor) -> str:
    """What tells one cut of a set from another: which rows of what."""
    digest = hashlib.sha256(f"{raw.key} {len(raw.train[1])} {TEST_SHARE}".encode())
    digest.update(cut.sort().values.numpy().tobytes())
    digest.update(raw.train[1].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Later(TensorDataset):
    """Examples that are read when they are first asked for."""

    def __init__(self, length: int, read: Callable[[], tuple[Tensor, Tensor]]) -> None:
        self._length, self._read = length, read

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._read()

    def __len__(self) -> int:
        return self._length

    def __reduce__(self) -> Any:
        return TensorDataset, self.tensors


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Rows little by little."""
    return x.split(max(1, PIECE // max(1, x[:1].numel())))


def _scaled(x: Tensor, rows: Tensor, image_size: int | None) -> Tensor:
    """Rows of what was read, bytes as numbers in [0, 1], images of the side asked for; a copy."""
    if x.dtype == torch.uint8:
        scaled = torch.empty(len(rows), *x.shape[1:])
        pieces = _pieces(scaled)
        for piece, chosen in zip(pieces, rows.split(len(pieces[0])) if len(rows) else (), strict=False):
            piece.copy_(x.index_select(0, chosen)).div_(255)
        x = scaled
    else:
        x = x.index_select(0, rows).float()
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
    positions = tuple(range(2, x.dim()))
    count = x.numel() / x.shape[1]
    mean = sum((piece.double().sum((0, *positions)) for piece in _pieces(x)), torch.zeros(())) / count
    # A second pass over small chunks: no copy of the whole set in double precision, and no cancellation. Pixels are in
    # [0, 1], where squares in single precision will do; what the mean lost to it is taken off again.
    centre = mean.float().double() if positions else mean
    square = torch.zeros_like(mean)
    for chunk in _pieces(x):
        deviation = (chunk if positions else chunk.double()) - centre.to(chunk if positions else mean).view(
            1, -1, *[1] * len(positions)
        )
        square += (deviation.square_().sum(positions) if positions else deviation.square_()).sum(0, dtype=torch.float64)
    std = (square / count - (mean - centre) ** 2).clamp_min(0).sqrt()
    # A feature is constant where its spread is rounding.
    std[std <= 1e-12 * mean.abs().clamp_min(1)] = 1
    return mean.float(), std.float()


def _normalized(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """In place."""
    shape = (1, -1, *[1] * (x.dim() - 2))
    for piece in _pieces(x):
        piece.sub_(mean.view(shape)).div_(std.view(shape))
    return x


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
