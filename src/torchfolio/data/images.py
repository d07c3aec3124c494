"""Decoding images: Parquet files in the `datasets` layout, folders of classes."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def decode(items: Sequence[bytes | Path], names: Sequence[str], size: int | None = None) -> np.ndarray:
    """Decode images to bytes `[N, C, H, W]`; grey stays one channel, anything else becomes RGB.

    Args:
        items: encoded images or paths.
        names: what to call them in an error.
        size: side that all are resized to; needed where they differ.

    Raises:
        ValueError: naming an image that cannot be read, or if sizes differ and `size` is not given.
    """
    from PIL import Image

    with Image.open(_source(items[0])) as first:
        grey = first.mode in ("1", "L", "I;16")
        width, height = (size, size) if size else first.size
    channels = 1 if grey else 3
    out = np.empty((len(items), height, width, channels), dtype=np.uint8)

    def one(k: int) -> None:
        try:
            with Image.open(_source(items[k])) as image:
                image = image.convert("L" if grey else "RGB")
                if size:
                    image = image.resize(
                        (size, size), Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BILINEAR
                    )
                if image.size != (width, height):
                    raise ValueError(
                        f"{names[k]} is {image.size[0]}x{image.size[1]}, the first image is {width}x{height}; pass image_size"
                    )
                out[k] = np.asarray(image).reshape(height, width, channels)
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"{names[k]} cannot be read as an image: {error}") from error

    if width * height <= 64 * 64:
        # Threads would only wait for each other: a small image is decoded faster than the interpreter's lock changes hands.
        for k in range(len(items)):
            one(k)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, range(len(items))))
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _source(item: bytes | Path) -> io.BytesIO | Path:
    return io.BytesIO(item) if isinstance(item, bytes) else item


def read_parquet(path: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, labels and class names of one Parquet file in the `datasets` layout.

    Raises:
        ValueError: if it has no image and label columns.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    image = next((n for n in ("image", "img") if n in table.column_names), None)
    label = next((n for n in ("label", "labels", "fine_label") if n in table.column_names), None)
    if image is None or label is None:
        raise ValueError(f"{path} has the columns {', '.join(table.column_names)}, expected image and label")
    encoded = table.column(image).combine_chunks().field("bytes").to_pylist()
    labels = table.column(label).to_numpy().astype(np.int64)
    names = _class_names(table.schema.metadata, label) or tuple(str(k) for k in range(int(labels.max()) + 1))
    return decode(encoded, [f"image {k} of {path}" for k in range(len(encoded))]), labels, names


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Names from the features that `datasets` writes into a Parquet file, if they are there."""
    try:
        info = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]
        return tuple(info["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def list_folder(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Images of a folder with a subfolder for every class, sorted by name.

    Raises:
        ValueError: if there are no classes or no images in one.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{folder} has {len(classes)} class folder(s), expected a subfolder of images for each class")
    paths: list[Path] = []
    labels: list[int] = []
    for k, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"the class folder {folder / name} holds no images")
        paths += found
        labels += [k] * len(found)
    return paths, labels, tuple(classes)
