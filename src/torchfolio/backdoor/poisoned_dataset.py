"""A data set of which some samples carry a trigger, with the truth about each."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchfolio import checks
from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.poison_files import write_poison
from torchfolio.backdoor.trigger_base import Trigger
from torchfolio.data.examples import whole_tensors
from torchfolio.data.rows import as_tensor
from torchfolio.shown import Shown

__all__ = ["Base", "ImageMap", "PoisonedDataset", "labels_of"]

Base = Dataset | Sequence[Tensor]


ImageMap = Callable[..., Tensor]


class PoisonedDataset(Shown, Dataset):
    """A data set in which some samples carry a trigger.

    Made by `poison`, `poisoned_test` or `load`. The base data set is read when a sample is asked for; triggered
    samples are made once, all together, when the first of them is.

    Attributes:
        y: labels as the victim sees them, numpy `[N']`.
        y_true: true labels `[N']`.
        is_poison: samples with a trigger and the attacker's label `[N']`.
        is_cover: samples with a trigger and their own label `[N']`.
        source_index: sample of the base that each one comes from `[N']`.
        trigger: trigger of the poison; `None` after `load` of a trigger that is no `Trigger`.
        label_map: label map of the attack.
        info: record of how it was made, JSON values.

    Items are `(x, y)`; see `with_meta` and `tensors`.
    """

    def __init__(
        self,
        base: Base,
        source_index: np.ndarray,
        y: np.ndarray,
        y_true: np.ndarray,
        flags: np.ndarray,
        *,
        trigger: ImageMap | None,
        cover_trigger: ImageMap | None,
        label_map: LabelMap,
        info: dict[str, Any],
        transform: Callable[[Tensor], Tensor] | None = None,
        block: Tensor | None = None,
    ) -> None:
        self.base = base
        self.source_index, self.y, self.y_true = source_index, y, y_true
        self.is_poison, self.is_cover = flags == 1, flags == 2
        self.trigger, self.cover_trigger, self.label_map = trigger, cover_trigger, label_map
        self.info, self.transform = info, transform
        self._block = block
        self._row = np.full(len(y), -1)
        touched = np.flatnonzero(flags)
        self._row[touched] = np.arange(len(touched))

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        i = range(len(self))[i]
        x = _images(self.base, self.source_index[[i]])[0] if self._row[i] < 0 else self.block()[int(self._row[i])]
        x = x if self.transform is None else self.transform(x)
        return x, int(self.y[i])

    def block(self) -> Tensor:
        """The triggered samples, poison and cover in the order of the data set, `[M, C, H, W]`."""
        if self._block is None:
            rows = np.flatnonzero(self.is_poison | self.is_cover)
            triggered = _triggered(self.base, self.source_index[rows], self.trigger, self.is_poison[rows])
            if self.is_cover.any():
                cover = self.is_cover[rows]
                triggered[cover] = _triggered(
                    self.base, self.source_index[rows][cover], self.cover_trigger, cover[cover]
                )
            # In place: the images were copied from the base.
            self._block = triggered.mul_(255).round_().div_(255) if self.info["quantize"] else triggered
        return self._block

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All samples at once, x `[N', C, H, W]` and y int64 `[N']`, without `transform`."""
        x = _images(self.base, self.source_index)  # a copy
        touched = torch.from_numpy(np.flatnonzero(self._row >= 0))
        if len(touched):
            x.index_copy_(0, touched.to(x.device), self.block().to(x))
        return x, torch.from_numpy(self.y)

    def with_meta(self) -> Dataset:
        """The same samples as `(x, y, y_true, is_poison, index)`."""
        return _WithMeta(self)

    def clean_view(self) -> PoisonedDataset:
        """The same samples without triggers, with their true labels."""
        return self._like(np.arange(len(self)), y=self.y_true, flags=np.zeros(len(self), np.uint8))

    def subset(self, mask: np.ndarray | Tensor) -> PoisonedDataset:
        """The samples that a boolean mask `[N']` keeps."""
        chosen = np.asarray(mask)
        if chosen.dtype != bool or chosen.shape != (len(self),):
            raise ValueError(
                f"expected a boolean mask of {len(self)} samples, got {chosen.dtype} of shape {chosen.shape}"
            )
        return self._like(np.flatnonzero(chosen))

    def relabelled(self, y: np.ndarray | Tensor) -> PoisonedDataset:
        """The same samples with other labels `[N']`.

        Raises:
            TypeError: if they are no whole numbers.
            ValueError: if there are not as many as samples, or one is negative.
        """
        labels = np.asarray(checks.labels(y)).astype(np.int64)
        if labels.shape != (len(self),):
            raise ValueError(f"expected a label for each of {len(self)} samples, got shape {labels.shape}")
        return self._like(np.arange(len(self)), y=labels)

    def _like(self, rows: np.ndarray, y: np.ndarray | None = None, flags: np.ndarray | None = None) -> PoisonedDataset:
        new_flags = self._flags()[rows] if flags is None else flags[rows]
        block = None
        if self._block is not None and flags is None:
            block = self._block[torch.from_numpy(self._row[rows][new_flags > 0])]
        return PoisonedDataset(
            self.base, self.source_index[rows], (self.y if y is None else y)[rows], self.y_true[rows], new_flags,
            trigger=self.trigger, cover_trigger=self.cover_trigger, label_map=self.label_map,
            info=self.info, transform=self.transform, block=block,
        )  # fmt: skip

    def _flags(self) -> np.ndarray:
        return (self.is_poison + 2 * self.is_cover).astype(np.uint8)

    def save(self, folder: str | Path) -> Path:
        """Write `meta.json` and `poison.npz`: the triggered samples, and of the others those that are not at the place
        or of the label that they have in the base, which `load` lays them over.

        Raises:
            ValueError: if samples are not quantised, which eight bits cannot hold.
        """
        if not self.info["quantize"]:
            raise ValueError("only quantised samples can be saved in eight bits; make them with quantize=True")
        labels, flags = labels_of(self.base), self._flags()
        places = np.arange(len(self)) % len(labels)
        rows = np.flatnonzero((flags > 0) | (self.source_index != places) | (self.y != labels[places]))
        x = (255 * self.block()).round().to(torch.uint8).numpy()
        arrays = {"rows": rows, "index": self.source_index[rows], "y": self.y[rows], "flags": flags[rows], "x": x}
        meta: dict[str, Any] = {"samples": len(self), **self.info, "label_map": self.label_map.spec(), "triggers": {}}
        for name, trigger in (("trigger", self.trigger), ("cover_trigger", self.cover_trigger)):
            if isinstance(trigger, Trigger):
                spec = trigger.spec()
                meta["triggers"][name] = {"kind": spec["kind"], "settings": spec["settings"]}
                arrays |= {f"{name}/{key}": value.cpu().numpy() for key, value in spec["tensors"].items()}
        return write_poison(Path(folder), arrays, meta, labels)


class _WithMeta(Dataset):
    def __init__(self, data: PoisonedDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int, bool, int]:
        x, y = self.data[i]
        return x, y, int(self.data.y_true[i]), bool(self.data.is_poison[i]), int(self.data.source_index[i])


def labels_of(dataset: Base) -> np.ndarray:
    """Labels int64 `[N]` of a data set."""
    pair = whole_tensors(dataset)
    if pair is not None:
        if len(pair) != 2 or len(pair[0]) != len(pair[1]):
            raise ValueError("expected a pair of tensors (images, labels) of equal length")
        _check_images(pair[0])
        y = pair[1]
    elif isinstance(dataset, PoisonedDataset):
        y = torch.from_numpy(dataset.y)
    else:
        items = []
        for i in range(len(cast(Sized, dataset))):
            image, label = dataset[i][:2]
            _check_images(_image(image)[None])
            items.append(label)
        y = torch.as_tensor(np.asarray(items))
    if y.is_floating_point() or y.dim() != 1 or not len(y):
        raise ValueError(f"expected integer labels [N], got {y.dtype} of shape {tuple(y.shape)}")
    return y.cpu().numpy().astype(np.int64)


def _check_images(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
    if x.shape[3] in (1, 3, 4) and x.shape[1] > 4:
        raise ValueError(
            f"expected images [N, C, H, W], got shape {tuple(x.shape)}, whose channels seem to stand last; x.permute(0, 3, 1, 2) "
            "puts them first"
        )
    low, high = map(float, x.aminmax()) if x.numel() else (0.0, 1.0)
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"expected images in [0, 1], got {low:g} to {high:g}: "
            "leave out normalisation here and put it into the network"
        )


def _images(dataset: Base, index: np.ndarray) -> Tensor:
    """Images of some samples, a copy `[len(index), C, H, W]`."""
    pair = whole_tensors(dataset)
    if pair is not None:
        x, rows = pair[0], torch.from_numpy(index)
        if len(rows) == len(x) and torch.equal(rows, torch.arange(len(x))):
            return x.clone()  # twice as fast as taking every row by its number
        return x.index_select(0, rows.to(x.device))
    return torch.stack([_image(dataset[int(i)][0]) for i in index])


def check_triggers(dataset: Base, *triggers: ImageMap | None) -> None:
    """Raise ValueError where images are not of the shape that a trigger is made for."""
    shape = _images(dataset, np.zeros(1, np.int64)).shape[1:]
    for trigger in triggers:
        if isinstance(trigger, Trigger):
            trigger.check_shape(shape)


def _image(value: Any) -> Tensor:
    """An image of a data set as a tensor, a picture of PIL's too."""
    return as_tensor(value, "the data") if type(value).__module__.startswith("PIL.") else torch.as_tensor(value)


@torch.no_grad()
def _triggered(base: Base, index: np.ndarray, trigger: ImageMap | None, which: np.ndarray) -> Tensor:
    """Images of which some carry the trigger; the images themselves where there is none to apply."""
    x = _images(base, index)
    rows = torch.from_numpy(which)
    if trigger is not None and rows.any():
        keys = torch.from_numpy(index)[rows]
        part = x if rows.all() else x[rows]
        triggered = trigger(part, index=keys) if isinstance(trigger, Trigger) else trigger(part.clone())
        low, high = map(float, triggered.aminmax())
        if triggered.shape != part.shape or not (low >= 0 and high <= 1):
            raise ValueError(
                f"expected a trigger to keep images of shape {tuple(part.shape)} in [0, 1], got {tuple(triggered.shape)} from {low:g} "
                f"to {high:g}"
            )
        if part is x:
            x.copy_(triggered)
        else:
            x[rows] = triggered.to(x.dtype)
    return x
