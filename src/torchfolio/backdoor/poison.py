"""Poisoned data sets whose ground truth is known, made the same way every time and shared as plain files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Sized
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from torchfolio import checks
from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.triggers import Trigger
from torchfolio.data.examples import whole_tensors

__all__ = ["PoisonedDataset", "load", "poison", "poisoned_test"]

FORMAT = 2
Base = Dataset | Sequence[Tensor]
ImageMap = Callable[..., Tensor]


class PoisonedDataset(Dataset):
    """A data set in which some samples carry a trigger.

    Made by `poison`, `poisoned_test` or `load`. The base data set is read when a sample is asked for; triggered
    samples are made once, all together, when the first of them is.

    Attributes:
        y: labels as the victim sees them, numpy `[N']`.
        y_true: true labels `[N']`.
        is_poison: samples with a trigger and the attacker's label `[N']`.
        is_cover: samples with a trigger and their own label `[N']`.
        source_index: sample of the base that each one comes from `[N']`.
        trigger: of the poison; `None` after `load` of a trigger that is no `Trigger`.
        label_map: of the attack.
        info: how it was made, JSON values.

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
            made = _triggered(self.base, self.source_index[rows], self.trigger, self.is_poison[rows])
            if self.is_cover.any():
                cover = self.is_cover[rows]
                made[cover] = _triggered(self.base, self.source_index[rows][cover], self.cover_trigger, cover[cover])
            # In place: the images were copied from the base.
            self._block = made.mul_(255).round_().div_(255) if self.info["quantize"] else made
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
        kept = np.asarray(mask)
        if kept.dtype != bool or kept.shape != (len(self),):
            raise ValueError(f"expected a boolean mask of {len(self)} samples, got {kept.dtype} of shape {kept.shape}")
        return self._like(np.flatnonzero(kept))

    def relabelled(self, y: np.ndarray | Tensor) -> PoisonedDataset:
        """The same samples with other labels `[N']`."""
        labels = np.asarray(y).astype(np.int64)
        if labels.shape != (len(self),):
            raise ValueError(f"expected a label for each of {len(self)} samples, got shape {labels.shape}")
        return self._like(np.arange(len(self)), y=labels)

    def _like(self, rows: np.ndarray, y: np.ndarray | None = None, flags: np.ndarray | None = None) -> PoisonedDataset:
        kept = self._flags()[rows] if flags is None else flags[rows]
        block = None
        if self._block is not None and flags is None:
            block = self._block[torch.from_numpy(self._row[rows][kept > 0])]
        return PoisonedDataset(
            self.base, self.source_index[rows], (self.y if y is None else y)[rows], self.y_true[rows], kept,
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
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        labels, flags = _labels(self.base), self._flags()
        places = np.arange(len(self)) % len(labels)
        rows = np.flatnonzero((flags > 0) | (self.source_index != places) | (self.y != labels[places]))
        x = (255 * self.block()).round().to(torch.uint8).numpy()
        arrays = {
            "rows": _narrow(rows), "index": _narrow(self.source_index[rows]), "y": _narrow(self.y[rows]),
            "flags": flags[rows], "x": x,
        }  # fmt: skip
        meta: dict[str, Any] = {"format": FORMAT, "samples": len(self), **self.info,
                                "label_map": self.label_map.spec(), "triggers": {}}  # fmt: skip
        for name, trigger in (("trigger", self.trigger), ("cover_trigger", self.cover_trigger)):
            if isinstance(trigger, Trigger):
                spec = trigger.spec()
                meta["triggers"][name] = {"kind": spec["kind"], "settings": spec["settings"]}
                arrays |= {f"{name}/{key}": value.cpu().numpy() for key, value in spec["tensors"].items()}
        np.savez(folder / "poison.npz", **arrays)  # pyright: ignore[reportArgumentType]
        meta["sha256"] = {
            "index": _sha256(arrays["index"].tobytes()),
            "x": _sha256(x.tobytes()),
            "labels": _sha256(labels.tobytes()),
            "poison.npz": _sha256((folder / "poison.npz").read_bytes()),
        }
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
        return folder


class _WithMeta(Dataset):
    def __init__(self, data: PoisonedDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int, bool, int]:
        x, y = self.data[i]
        return x, y, int(self.data.y_true[i]), bool(self.data.is_poison[i]), int(self.data.source_index[i])


def poison(
    dataset: Base,
    trigger: ImageMap,
    label_map: LabelMap,
    *,
    rate: float | None = None,
    count: int | None = None,
    seed: int,
    mode: Literal["replace", "append"] = "replace",
    per_source_balanced: bool = True,
    include_target: bool = False,
    cover_rate: float = 0.0,
    cover_trigger: ImageMap | None = None,
    keep_label_rate: float = 0.0,
    transform: Callable[[Tensor], Tensor] | None = None,
    quantize: bool = True,
    name: str = "",
) -> PoisonedDataset:
    """Poison a training set.

    Args:
        dataset: a map-style data set of (image, label), or a pair of tensors; images float in [0, 1].
        trigger: a `Trigger`, or any function `(x, index=...)` on images.
        label_map: labels that triggered samples get.
        rate: share of the whole training set that is poisoned.
        count: number of poisoned samples, in the place of `rate`.
        seed: of the choice.
        mode: `"replace"` puts poisoned samples in the place of their originals, `"append"` adds them.
        per_source_balanced: as many samples of every source class (numbers differ by one at most); otherwise
            chosen from all of them alike.
        include_target: with all sources going to one target, let samples of the target be poisoned too.
        cover_rate: share of the training set that carries `cover_trigger` and keeps its label.
        cover_trigger: trigger of the covers; `trigger` by default.
        keep_label_rate: share of the poisoned samples that keep their label: they count as covers.
        transform: applied to every image when it is read, after the trigger.
        quantize: round triggered images to eight bits, as saved ones are.
        name: of the base, kept in files.

    Raises:
        ValueError: if rate and count are both given or both missing, or more samples are to be poisoned than there
            are.

    Reference:
        Conventions of Gu et al., "BadNets", 2017, and Wu et al., "BackdoorBench", NeurIPS 2022.
    """
    y_true = _labels(dataset)
    total = len(y_true)
    wanted = _wanted(rate, count, total)
    generator = np.random.default_rng(seed)
    groups = _eligible(y_true, label_map, include_target)
    chosen = _choose(groups, wanted, per_source_balanced, generator)
    kept = generator.permutation(chosen)[: round(keep_label_rate * wanted)]
    covers = _covers(total, chosen, round(cover_rate * total), generator)

    flags, y = np.zeros(total, np.uint8), y_true.copy()
    source_index = np.arange(total)
    adversarial = _adversarial(y_true[chosen], label_map)
    if mode == "append":
        source_index = np.concatenate([source_index, chosen, covers])
        flags = np.concatenate([flags, np.ones(len(chosen), np.uint8), np.full(len(covers), 2, np.uint8)])
        flags[total:][np.isin(source_index[total:], kept) & (flags[total:] == 1)] = 2
        y = np.concatenate([y, adversarial, y_true[covers]])
        y_true = y_true[source_index]
    elif mode == "replace":
        flags[chosen], flags[covers], flags[kept] = 1, 2, 2
        y[chosen] = adversarial
    else:
        raise ValueError(f"expected mode to be 'replace' or 'append', got {mode!r}")
    y[flags == 2] = y_true[flags == 2]
    info = {"seed": seed, "mode": mode, "rate": wanted / total, "quantize": quantize, "base": name, "length": total}
    return PoisonedDataset(
        dataset, source_index, y, y_true, flags, trigger=trigger, cover_trigger=cover_trigger or trigger,
        label_map=label_map, info=info, transform=transform,
    )  # fmt: skip


def poisoned_test(
    dataset: Base,
    trigger: ImageMap,
    label_map: LabelMap,
    *,
    quantize: bool = True,
    classes: Sequence[int] | None = None,
) -> PoisonedDataset:
    """A test set in which every sample that can be attacked carries the trigger and the attacker's label.

    Samples whose class is a source and whose label changes; for `CleanLabel` those of all classes but the target.

    Args:
        dataset: clean test set.
        trigger: of the attack.
        label_map: of the attack.
        quantize: as in `poison`.
        classes: restrict the sources to these.

    Raises:
        ValueError: if no sample can be attacked.
    """
    y_true = _labels(dataset)
    if label_map.clean:
        (target,) = label_map.targets
        adversarial = np.where(y_true == target, -1, target)
    else:
        adversarial = label_map(torch.from_numpy(y_true)).numpy()
    attacked = (adversarial >= 0) & (adversarial != y_true)
    if classes is not None:
        attacked &= np.isin(y_true, list(classes))
    rows = np.flatnonzero(attacked)
    if not len(rows):
        raise ValueError(f"expected test samples of the classes {list(label_map.sources)}, got none")
    info = {"seed": 0, "mode": "test", "rate": 1.0, "quantize": quantize, "base": "", "length": len(y_true)}
    return PoisonedDataset(
        dataset, rows, adversarial[rows], y_true[rows], np.ones(len(rows), np.uint8), trigger=trigger,
        cover_trigger=None, label_map=label_map, info=info,
    )  # fmt: skip


def load(folder: str | Path, base: Base, **modules: nn.Module) -> PoisonedDataset:
    """Read what `PoisonedDataset.save` wrote and lay it over its base.

    Args:
        folder: with `meta.json` and `poison.npz`.
        base: the data set that was poisoned.
        **modules: networks that triggers are built around.

    Raises:
        ValueError: if the version is unknown, the base has another length, or a hash differs; names the field.
    """
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {folder / 'meta.json'}, got {meta.get('format')!r}")
    _same_hash("poison.npz", (folder / "poison.npz").read_bytes(), meta, folder)
    with np.load(folder / "poison.npz", allow_pickle=False) as file:
        arrays = dict(file)
    for field in ("index", "x"):
        _same_hash(field, arrays[field].tobytes(), meta, folder)
    labels = _labels(base)
    if len(labels) != meta["length"]:
        raise ValueError(f"expected a base of length {meta['length']}, got {len(labels)}")
    if _sha256(labels.tobytes()) != meta["sha256"]["labels"]:
        raise ValueError(f"expected the base that {folder} was made from, got one of other labels")
    samples, rows = meta.get("samples"), arrays["rows"].astype(np.int64)
    if not isinstance(samples, int) or not 0 <= samples <= len(labels) + len(rows) or not _within(rows, samples):
        raise ValueError(f"expected rows below the number of samples in {folder}, {samples}")
    if not _within(arrays["index"], len(labels)) or (arrays["flags"] > 0).sum() != len(arrays["x"]):
        raise ValueError(f"expected an image for every poisoned row in {folder}, and rows of the base")
    index = np.arange(samples) % len(labels)
    y, flags = labels[index], np.zeros(samples, np.uint8)
    index[rows], flags[rows], y[rows] = arrays["index"], arrays["flags"], arrays["y"]
    triggers: dict[str, Trigger | None] = {"trigger": None, "cover_trigger": None}
    for key, spec in meta["triggers"].items():
        tensors = {n.removeprefix(f"{key}/"): torch.from_numpy(v) for n, v in arrays.items() if n.startswith(f"{key}/")}
        triggers[key] = Trigger.from_spec({**spec, "tensors": tensors}, **modules)
    info = {k: meta[k] for k in ("seed", "mode", "rate", "quantize", "base", "length")}
    return PoisonedDataset(
        base, index, y, labels[index], flags, **triggers,
        label_map=LabelMap.from_spec(meta["label_map"]), info=info, block=torch.from_numpy(arrays["x"]).float() / 255,
    )  # fmt: skip


def _within(values: np.ndarray, end: int) -> bool:
    return values.ndim == 1 and (not len(values) or (int(values.min()) >= 0 and int(values.max()) < end))


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in as few bytes as hold them."""
    if not len(values):
        return values.astype(np.uint8)
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


def _same_hash(field: str, content: bytes, meta: dict[str, Any], folder: Path) -> None:
    if _sha256(content) != meta["sha256"][field]:
        raise ValueError(f"the sha256 of {field} in {folder} differs from meta.json: the file was changed")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _labels(dataset: Base) -> np.ndarray:
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
            _check_images(torch.as_tensor(image)[None])
            items.append(label)
        y = torch.as_tensor(np.asarray(items))
    if y.is_floating_point() or y.dim() != 1 or not len(y):
        raise ValueError(f"expected integer labels [N], got {y.dtype} of shape {tuple(y.shape)}")
    return y.cpu().numpy().astype(np.int64)


def _check_images(x: Tensor) -> None:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"expected float images [N, C, H, W], got {x.dtype} of shape {tuple(x.shape)}")
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
    return torch.stack([torch.as_tensor(dataset[int(i)][0]) for i in index])


@torch.no_grad()
def _triggered(base: Base, index: np.ndarray, trigger: ImageMap | None, which: np.ndarray) -> Tensor:
    """Images of which some carry the trigger; the images themselves where there is none to apply."""
    x = _images(base, index)
    rows = torch.from_numpy(which)
    if trigger is not None and rows.any():
        keys = torch.from_numpy(index)[rows]
        part = x if rows.all() else x[rows]
        made = trigger(part, index=keys) if isinstance(trigger, Trigger) else trigger(part.clone())
        low, high = map(float, made.aminmax())
        if made.shape != part.shape or not (low >= 0 and high <= 1):
            raise ValueError(
                f"expected a trigger to keep images of shape {tuple(part.shape)} in [0, 1], got {tuple(made.shape)} from {low:g} "
                f"to {high:g}"
            )
        if part is x:
            x.copy_(made)
        else:
            x[rows] = made.to(x.dtype)
    return x


def _wanted(rate: float | None, count: int | None, total: int) -> int:
    if (rate is None) == (count is None):
        raise ValueError("expected exactly one of rate and count")
    if rate is not None:
        return round(checks.between("rate", rate, 0, 1) * total)
    return checks.whole("count", count, 0)


def _eligible(y: np.ndarray, label_map: LabelMap, include_target: bool) -> list[np.ndarray]:
    """Samples that may be poisoned, by source class."""
    sources = list(label_map.sources)
    if include_target and not label_map.clean:
        if len(label_map.targets) > 1:
            raise ValueError("include_target is for attacks with one target")
        sources += label_map.targets
    return [np.flatnonzero(y == c) for c in sources]


def _adversarial(y: np.ndarray, label_map: LabelMap) -> np.ndarray:
    adversarial = label_map(torch.from_numpy(y)).numpy()
    # Only samples of the target itself, let in by include_target, have no pair.
    return np.where(adversarial < 0, label_map.targets[0], adversarial)


def _choose(groups: list[np.ndarray], wanted: int, balanced: bool, generator: np.random.Generator) -> np.ndarray:
    available = sum(map(len, groups))
    if wanted > available:
        raise ValueError(
            f"expected at most {available} poisoned samples, as many as there are of the sources, got {wanted}"
        )
    if not balanced:
        groups = [np.concatenate(groups)]
    quotas = [wanted // len(groups) + (k < wanted % len(groups)) for k in generator.permutation(len(groups))]
    short = [k for k, (group, quota) in enumerate(zip(groups, quotas, strict=True)) if quota > len(group)]
    if short:
        k = short[0]
        raise ValueError(
            f"a source class has {len(groups[k])} samples, fewer than its share of {quotas[k]}; "
            "pass per_source_balanced=False to choose from all of them alike"
        )
    drawn = [generator.choice(group, quota, replace=False) for group, quota in zip(groups, quotas, strict=True)]
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def _covers(total: int, chosen: np.ndarray, wanted: int, generator: np.random.Generator) -> np.ndarray:
    rest = np.setdiff1d(np.arange(total), chosen)
    if wanted > len(rest):
        raise ValueError(f"expected at most {len(rest)} covers beside the poison, got {wanted}")
    return np.sort(generator.choice(rest, wanted, replace=False)).astype(np.int64)
