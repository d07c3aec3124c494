"""Named data sets behind one `load`."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import TensorDataset

from torchfolio.data.augment import CropFlip
from torchfolio.data.examples import Examples
from torchfolio.data.sources import DataNotFound, data_folders, embedded_names, find
from torchfolio.data.splits import DataSplits, split, whole
from torchfolio.data.text import LABELLED, labelled

__all__ = ["CropFlip", "DataNotFound", "DataSplits", "Examples", "data_folders", "embedded_names", "load", "load_whole"]


def load(
    name: str,
    *,
    val: float | int = 0.1,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
    image_size: int | None = None,
    normalize: bool = True,
    root: str | Path | None = None,
) -> DataSplits:
    """Load a data set by name.

    A name is looked for among the embedded sets (`digits`, `breast_cancer`, `wine`, `iris`, `diabetes`), then in the
    folders of the environment variable `TORCHFOLIO_DATA`, then on the Hugging Face hub. `folder:PATH` (or any path)
    is a folder of images with a subfolder for each class, with or without a level `train`, `val`, `test` above;
    `hf:owner/name` is a set of the hub. `movie_reviews`, labelled sentences, comes as token numbers.

    Images are decoded once and kept memory-mapped in `TORCHFOLIO_CACHE` (by default in the user's cache folder).

    Args:
        name: name of the set.
        val: share or number of training examples to hold out; a set with a validation split of its own keeps that.
        seed: seed of the order of the training part, and so of the subset that `train_size` takes. What is held out
            for validation and test belongs to the data and is the same for all seeds.
        train_size: number of training examples; all by default.
        test_size: number of test examples, the same ones for all seeds; all by default.
        image_size: side of the images; box-downsampled where it divides theirs, resized otherwise.
        normalize: whether to subtract the mean of the training split and divide by its standard deviation, per channel
            or feature.
        root: a folder to look in first.

    Returns:
        The splits. A set without a test split (the embedded ones) gives a fifth of its examples, class by class.

    Raises:
        DataNotFound: if the set is nowhere; says where it was looked for and how to get it.
        ValueError: on sizes out of range, unreadable images, or labels out of range.

    Example:
        >>> digits = load("digits")
        >>> digits.shape, digits.num_classes
        ((1, 8, 8), 10)
    """
    raw = labelled(name, root=root) if name in LABELLED else find(name, root, image_size)
    return split(
        raw,
        val=val,
        seed=seed,
        train_size=train_size,
        test_size=test_size,
        image_size=image_size,
        normalize=normalize,
    )


def load_whole(
    name: str, *, like: DataSplits, image_size: int | None = None, root: str | Path | None = None
) -> TensorDataset:
    """All examples of a set, whatever splits it has, with the labels of another set.

    Args:
        name: name of the set, as `load` takes it.
        like: set whose shape the examples must have, and whose classes, matched by name.
        image_size: side of the images, as in `load`.
        root: a folder to look in first.

    Returns:
        Inputs, which are not normalised, and targets.

    Raises:
        DataNotFound: if the set is nowhere.
        ValueError: if inputs or classes are others than those of `like`.
    """
    return whole(find(name, root, image_size), like, image_size)
