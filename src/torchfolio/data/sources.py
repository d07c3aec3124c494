"""Where named sets are looked for: embedded, folders of the user, the hub."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchfolio.data import embedded
from torchfolio.data.cache import cached, content_key
from torchfolio.data.images import (
    UnequalSizes,
    class_labels,
    decode,
    is_hidden,
    list_folder,
    read_parquet,
    visible,
)
from torchfolio.data.splits import Raw
from torchfolio.errors import TorchfolioError

HUB_IDS = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100", "mnist": "ylecun/mnist"}
DECODER = 2
"""Number of the way in which images are decoded: arrays kept from another way are made anew."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Splits by the names that they go by, in small letters: those that the `datasets` library knows."""


class DataNotFound(TorchfolioError, FileNotFoundError):
    """A data set is nowhere to be found; the message says where it was looked for."""


def embedded_names() -> list[str]:
    """Names of the sets that need no files."""
    functions = inspect.getmembers(embedded, inspect.isfunction)
    return sorted(n for n, f in functions if not n.startswith("_") and f.__module__ == embedded.__name__)


def data_folders(root: str | Path | None = None) -> list[Path]:
    """Folders that hold named sets: `root`, then those of `TORCHFOLIO_DATA`."""
    listed = os.environ.get("TORCHFOLIO_DATA", "").split(os.pathsep)
    return [Path(p) for p in ([root] if root is not None else []) + [p for p in listed if p]]


def find(name: str, root: str | Path | None = None, image_size: int | None = None) -> Raw:
    """Read a set by name, path or hub id.

    Raises:
        DataNotFound: if it is nowhere.
    """
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a data set as text, got {type(name).__name__}")
    if not name.removeprefix("folder:").strip():
        raise DataNotFound(f"expected the name of a data set, got {name!r}; embedded are {', '.join(embedded_names())}")
    if name.startswith("hf:") and not re.fullmatch(r"hf:\w[\w.-]*/\w[\w.-]*", name):
        raise DataNotFound(f"expected a set of the hub as hf:owner/name, got {name!r}")
    if name in embedded_names():
        return getattr(embedded, name)()
    if name.startswith("hf:"):
        return from_hub(name.removeprefix("hf:"), name)
    path = Path(name.removeprefix("folder:")).expanduser()
    if name.startswith(("folder:", ".", "~")) or "/" in name or os.sep in name:
        if not path.is_dir():
            raise DataNotFound(f"{path} is no folder" if path.exists() else f"there is no folder {path}")
        return from_folder(path, name, image_size)
    for folder in data_folders(root):
        if (folder / name).is_dir():
            return from_folder(folder / name, name, image_size)
    if name in HUB_IDS:
        return from_hub(HUB_IDS[name], name, looked=data_folders(root))
    known = {*embedded_names(), *HUB_IDS, *(p.name for f in data_folders(root) if f.is_dir() for p in f.iterdir())}
    close = difflib.get_close_matches(name, sorted(known - {name}), n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise DataNotFound(
        f"no data set {name!r}: it is not embedded ({', '.join(embedded_names())}) and not in {_places(data_folders(root))}."
        f"{hint} Point TORCHFOLIO_DATA at a folder that holds {name}/, name an image folder as folder:PATH, or a set of the "
        "hub as hf:owner/name."
    )


def _places(folders: list[Path]) -> str:
    return " or ".join(map(str, folders)) if folders else "any folder of TORCHFOLIO_DATA (which is not set)"


def from_folder(folder: Path, name: str, image_size: int | None = None) -> Raw:
    """A folder of Parquet files, or of images in class folders, with or without a level of splits.

    Raises:
        DataNotFound: if it holds neither.
    """
    parquet = visible(folder, {".parquet"})
    if parquet:
        return _from_parquet(parquet, name, image_size)
    folders = sorted(p for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    parts = _by_split([(p.name, p) for p in folders], folder)
    if "train" not in parts and len(parts) > 1 and len(parts) == len(folders):
        raise ValueError(f"{folder} has the splits {', '.join(parts)}, expected train among them")
    if "train" in parts:
        names_key = _names_key(parts["train"])
        read = {key: _read_images(path, image_size) for key, path in parts.items()}
        names = {key: classes for key, (_, _, classes) in read.items()}
        odd = next((key for key, classes in names.items() if classes != names["train"]), None)
        if odd is not None:
            raise ValueError(f"{folder} has the classes {names['train']} in train and {names[odd]} in {odd}")
        return _raw(name, read, names_key, image_size)
    if not folders:
        raise DataNotFound(f"{folder} holds neither Parquet files nor class folders of images")
    names_key = _names_key(folder)
    return _raw(name, {"train": _read_images(folder, image_size)}, names_key, image_size)


def _by_split(named: Iterable[tuple[str, Any]], where: object) -> dict[str, Any]:
    """What goes by the name of a split, by split.

    Raises:
        ValueError: if two names mean the same one.
    """
    parts: dict[str, tuple[str, Any]] = {}
    for name, found in named:
        split = SPLITS.get(name.lower())
        if split in parts:
            raise ValueError(f"{where} has both {parts[split][0]} and {name}, which mean the same split")
        if split is not None:
            parts[split] = name, found
    return {split: found for split, (_, found) in parts.items()}


def _names_key(folder: Path) -> str:
    """A digest of the images' names, by whose order a row is one image and not another."""
    paths, _, _ = list_folder(folder)
    return hashlib.sha256("\0".join(p.relative_to(folder).as_posix() for p in paths).encode()).hexdigest()[:16]


def _read_images(folder: Path, image_size: int | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    paths, labels, classes = list_folder(folder)
    extra = f"{DECODER} folder {image_size} " + " ".join(f"{p.parent.name}/{p.name}" for p in paths)
    return cached(
        content_key(paths, extra),
        lambda: (decode(paths, [str(p) for p in paths], image_size), np.asarray(labels), classes),
    )


Part = tuple[np.ndarray, np.ndarray, tuple[str, ...]]  # inputs, labels, names of classes where there are any


def _from_parquet(paths: list[Path], name: str, image_size: int | None) -> Raw:
    """Files are of the split that their name, or their folder's, begins with; all are to train on if none has such a name.

    Raises:
        ValueError: if some have and another one has not.
    """
    splits = {path: _split_of(path.stem) or _split_of(path.parent.name) for path in paths}
    if any(splits.values()) and (odd := next((p for p, split in splits.items() if split is None), None)):
        raise ValueError(f"{odd} stands beside files of splits and has the name of none; expected train, val or test")
    try:
        parts = _parquet_parts(splits, None)
    except UnequalSizes:
        if image_size is None:
            raise
        parts = _parquet_parts(splits, image_size)
    return _raw(name, parts, image_size=image_size)


def _parquet_parts(splits: dict[Path, str | None], size: int | None) -> dict[str, Part]:
    """The files of every split as one; images at their own size, or all at one."""
    read: dict[str, dict[str, Part]] = {}
    for path, split in splits.items():
        key = content_key([path], f"{DECODER} parquet" + (f" {size}" if size else ""))
        part = cached(key, lambda path=path: read_parquet(path, size))
        read.setdefault(split or "train", {})[str(path)] = part
    return {split: _joined(parts) for split, parts in read.items()}


def _split_of(name: str) -> str | None:
    return SPLITS.get(re.split(r"[^a-z]", name.lower())[0])


def _joined(parts: dict[str, Part]) -> Part:
    """Files of one split as one."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    agreed, classes = _agreeing(parts)
    _same_size(agreed)
    return np.concatenate([x for x, _ in agreed.values()]), np.concatenate([y for _, y in agreed.values()]), classes


def _agreeing(parts: dict[str, Part]) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Parts with the same channels, grey ones as colour where others have it, and labels of the same classes."""
    channels = {x.shape[1] for x, _, _ in parts.values() if x.ndim == 4}
    classes = max((names for _, _, names in parts.values()), key=len)
    if not all(names == classes[: len(names)] for _, _, names in parts.values()):
        first = next(names for _, _, names in parts.values() if names)
        classes = (*first, *sorted({n for _, _, names in parts.values() for n in names} - set(first)))
    if any(not names for _, _, names in parts.values()) and classes:
        bare = next(where for where, (_, _, names) in parts.items() if not names)
        if any(names for _, _, names in parts.values()) and int(parts[bare][1].max()) >= len(classes):
            raise ValueError(f"{bare} has the label {int(parts[bare][1].max())}, expected 0 to {len(classes) - 1}")
    agreed = {}
    for where, (x, y, names) in parts.items():
        if channels == {1, 3} and x.shape[1] == 1:
            x = np.repeat(x, 3, axis=1)
        if names and names != classes[: len(names)]:
            y = np.asarray([classes.index(n) for n in names])[y]
        agreed[where] = x, y
    return agreed, classes


def _same_size(parts: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """That inputs of all parts have one shape."""
    first, (x, _) = next(iter(parts.items()))
    for where, (other, _) in parts.items():
        if other.shape[1:] != x.shape[1:]:
            kind = "images" if x.ndim == 4 else "inputs"
            raise UnequalSizes(
                f"expected {kind} of one shape, got {tuple(x.shape[1:])} in {first} and {tuple(other.shape[1:])} in {where}"
                + ("; pass image_size" if x.ndim == 4 else "")
            )


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _raw(name: str, read: dict[str, Part], key: str = "", image_size: int | None = None) -> Raw:
    if "train" not in read:
        raise ValueError(f"{name} has the splits {', '.join(read)}, expected train among them")
    agreed, classes = _agreeing({key: read[key] for key in ("train", "val", "test") if key in read})
    if image_size is None:
        _same_size(agreed)
    if not classes:
        classes = _numbered(name, np.unique(np.concatenate([y for _, y in agreed.values()])))
    if len(classes) < 2:
        raise ValueError(
            f"{name} has {', '.join(classes)!r} for the label of all its examples, expected two classes or more"
        )
    if name == "cifar10" and classes == tuple(map(str, range(10))):
        classes = CIFAR10  # files without the features' names keep the usual order
    parts = {k: (_tensor(x), torch.from_numpy(np.array(y, dtype=np.int64))) for k, (x, y) in agreed.items()}
    return Raw(name, parts["train"], parts.get("test"), parts.get("val"), classes, key)


def _numbered(name: str, labels: np.ndarray) -> tuple[str, ...]:
    """Names for labels that are numbers alone, which must be 0, 1, 2, …"""
    if not np.array_equal(labels, np.arange(len(labels))):
        some = ", ".join(map(str, labels[:5])) + (", …" if len(labels) > 5 else "")
        raise ValueError(
            f"{name} has the labels {some}, expected 0 to {len(labels) - 1} without gaps, or names of classes"
        )
    return tuple(map(str, labels))


def _tensor(x: np.ndarray) -> torch.Tensor:
    """A tensor on a memory map: indexing copies what is taken, nothing is written."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(x)


def from_hub(repository: str, name: str, looked: list[Path] | None = None) -> Raw:
    """A set of the Hugging Face hub with images or numbers, and labels.

    Raises:
        DataNotFound: if it cannot be fetched.
    """
    import datasets

    if Path(repository).exists():  # which `datasets` would read in the place of the hub
        raise DataNotFound(
            f"{repository} is a path here; name it as folder:{repository}, or go elsewhere for the hub's"
        )
    try:
        fetched = datasets.load_dataset(repository)
    except Exception as error:
        places = f"not in {_places(looked)}, and " if looked is not None else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataNotFound(
            f"data set {name!r} is {places}not to be had from the hub as {repository} ({type(error).__name__}: {reason}); "
            f"go online once, or put it into a folder of TORCHFOLIO_DATA as {name.removeprefix('hf:').split('/')[-1]}/"
        ) from error
    parts = _by_split(((str(key), part) for key, part in fetched.items()), repository)  # pyright: ignore
    return _raw(name, {split: _from_dataset(part, repository) for split, part in parts.items()})


def _from_dataset(part: Any, repository: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """One split of a `datasets` set: an image column, or all numeric columns, and a label column."""
    import datasets

    features = part.features
    label = next((n for n in ("label", "labels", "fine_label", "target") if n in features), None)
    if label is None:
        raise ValueError(f"{repository} has the columns {', '.join(features)}, expected one named label")
    labels, classes = class_labels(part[label], f"the column {label} of {repository}")
    classes = tuple(getattr(features[label], "names", None) or classes)
    image = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    if image is not None:
        raw = part.cast_column(image, datasets.Image(decode=False))[image]
        items = [row["bytes"] if row["bytes"] else Path(row["path"]) for row in raw]
        return decode(items, [f"image {k} of {repository}" for k in range(len(items))]), labels, classes
    numeric = [n for n, f in features.items() if n != label and getattr(f, "dtype", "").startswith(("float", "int"))]
    if not numeric:
        raise ValueError(f"{repository} has neither an image column nor numeric ones: {', '.join(features)}")
    return np.stack([np.asarray(part[n], dtype=np.float32) for n in numeric], 1), labels, classes
