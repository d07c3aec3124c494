"""Poisoned data sets whose ground truth is known, made the same way every time and shared as plain files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.backdoor.labels import LabelMap
from torchfolio.backdoor.poison_files import read_poison
from torchfolio.backdoor.poisoned_dataset import Base, ImageMap, PoisonedDataset, check_triggers, labels_of
from torchfolio.backdoor.trigger_base import Trigger

__all__ = ["PoisonedDataset", "load", "poison", "poisoned_test"]


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
        count: number of poisoned samples, in place of `rate`.
        seed: seed of the choice.
        mode: `"replace"` puts poisoned samples in place of their originals, `"append"` adds them.
        per_source_balanced: whether to take as many samples of every source class (numbers differ by one at most);
            otherwise chosen from all of them alike.
        include_target: whether samples of the target may be poisoned too, where all sources go to one target.
        cover_rate: share of the training set that carries `cover_trigger` and keeps its label.
        cover_trigger: trigger of the covers; `trigger` by default.
        keep_label_rate: share of the poisoned samples that keep their label: they count as covers.
        transform: function that is applied to every image when it is read, after the trigger.
        quantize: whether to round triggered images to eight bits, as saved ones are.
        name: name of the base, kept in files.

    Raises:
        ValueError: if rate and count are both given or both missing, or more samples are to be poisoned than there
            are.

    Reference:
        Conventions of Gu et al., "BadNets", 2017, and Wu et al., "BackdoorBench", NeurIPS 2022.
    """
    y_true = labels_of(dataset)
    check_triggers(dataset, trigger, cover_trigger)
    total = len(y_true)
    number = _wanted(rate, count, total)
    generator = np.random.default_rng(seed)
    groups = _eligible(y_true, label_map, include_target)
    chosen = _choose(groups, number, per_source_balanced, generator)
    own_label = generator.permutation(chosen)[: round(keep_label_rate * number)]
    covers = _covers(total, chosen, round(cover_rate * total), generator)

    flags, y = np.zeros(total, np.uint8), y_true.copy()
    source_index = np.arange(total)
    adversarial = _adversarial(y_true[chosen], label_map)
    if mode == "append":
        source_index = np.concatenate([source_index, chosen, covers])
        flags = np.concatenate([flags, np.ones(len(chosen), np.uint8), np.full(len(covers), 2, np.uint8)])
        flags[total:][np.isin(source_index[total:], own_label) & (flags[total:] == 1)] = 2
        y = np.concatenate([y, adversarial, y_true[covers]])
        y_true = y_true[source_index]
    elif mode == "replace":
        flags[chosen], flags[covers], flags[own_label] = 1, 2, 2
        y[chosen] = adversarial
    else:
        raise ValueError(f"expected mode to be 'replace' or 'append', got {mode!r}")
    y[flags == 2] = y_true[flags == 2]
    info = {"seed": seed, "mode": mode, "rate": number / total, "quantize": quantize, "base": name, "length": total}
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
        trigger: trigger of the attack.
        label_map: label map of the attack.
        quantize: whether to round to grey levels, as in `poison`.
        classes: source classes; all by default.

    Raises:
        ValueError: if no sample can be attacked.
    """
    y_true = labels_of(dataset)
    check_triggers(dataset, trigger)
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
        folder: folder with `meta.json` and `poison.npz`.
        base: data set that was poisoned.
        **modules: networks that triggers are built around.

    Raises:
        ValueError: if the version is unknown, the base has another length, or a hash differs; names the field.
    """
    labels = labels_of(base)
    arrays, meta = read_poison(Path(folder), labels)
    samples, rows = meta["samples"], arrays["rows"].astype(np.int64)
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
