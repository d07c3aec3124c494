"""Decoding images: Parquet files in the `datasets` layout, folders of classes."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


GREY = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N"}
"""Modes of Pillow without colour."""
LEFT_BEHIND = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders that systems put beside the user's."""
MOST_ROWS = 50_000_000
"""Rows of a Parquet file, at most."""


class UnequalSizes(ValueError):
    """Images differ in size."""


class _Colour(Exception):
    """An image has colour where none was expected."""


def decode(items: Sequence[bytes | Path], names: Sequence[str], size: int | None = None) -> np.ndarray:
    """Decode images to bytes `[N, C, H, W]`, as a person sees them.

    They are turned as their EXIF says, and what is transparent shows white. One channel where all images are grey, else
    all are RGB.

    Args:
        items: encoded images or paths.
        names: names in error messages.
        size: side that all are resized to; needed where they differ.

    Raises:
        ValueError: naming an image that cannot be read, or if sizes differ and `size` is not given.
    """
    if not len(items):
        raise ValueError("expected at least one image, got none")
    grey, (width, height) = _first_look(items[0], names[0])
    try:
        return _decoded(items, names, size, (size, size) if size else (width, height), grey)
    except _Colour:
        return _decoded(items, names, size, (size, size) if size else (width, height), False)


def _first_look(item: bytes | Path, name: str) -> tuple[bool, tuple[int, int]]:
    with _named(name), _opened(item) as image:
        return image.mode in GREY, _upright(image).size


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever goes wrong with an image is told with its name, in one sentence."""
    try:
        yield
    except _Colour:
        raise
    except Exception as error:  # decoders fail in many ways
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} cannot be read as an image: {reason[:200]}") from error


def _decoded(
    items: Sequence[bytes | Path], names: Sequence[str], size: int | None, shape: tuple[int, int], grey: bool
) -> np.ndarray:
    width, height = shape
    channels = 1 if grey else 3
    out = np.empty((len(items), height, width, channels), dtype=np.uint8)

    def one(k: int) -> None:
        from PIL import Image

        with _named(names[k]), _opened(items[k]) as image:
            if grey and image.mode not in GREY:
                raise _Colour
            image = _flat(_upright(image)).convert("L" if grey else "RGB")
            if size:
                image = image.resize(
                    (size, size), Image.Resampling.BOX if min(image.size) >= size else Image.Resampling.BILINEAR
                )
        if image.size != shape:
            raise UnequalSizes(
                f"{names[k]} is {image.size[0]}x{image.size[1]}, the first image is {width}x{height}; pass image_size"
            )
        out[k] = np.asarray(image).reshape(height, width, channels)

    if width * height <= 64 * 64:
        # Threads would only wait for each other: a small image is decoded faster than the interpreter's lock changes hands.
        for k in range(len(items)):
            one(k)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(one, range(len(items))))
    return np.ascontiguousarray(out.transpose(0, 3, 1, 2))


def _opened(item: bytes | Path) -> Image.Image:
    from PIL import Image

    if not isinstance(item, bytes | Path):
        raise ValueError(f"expected an encoded image, got {type(item).__name__}")
    return Image.open(_source(item))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _flat(image: Image.Image) -> Image.Image:
    """On white, with eight bits."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows the white")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"expected pixels of 8 or 16 bits, got some from {values.min()} to {values.max()}")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if "transparency" not in image.info and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)


def _source(item: bytes | Path) -> io.BytesIO | Path:
    return io.BytesIO(item) if isinstance(item, bytes) else item


def read_parquet(path: Path, size: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images, labels and class names of one Parquet file in the `datasets` layout.

    Names are those that the file declares, or the labels themselves where they are text; there are none for numbers.

    Args:
        path: file.
        size: side that all images are resized to; needed where they differ.

    Raises:
        ValueError: if it is no Parquet file, has no image and label columns, or has labels that name no class.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        columns, rows = file.schema_arrow.names, file.metadata.num_rows
        image = next((n for n in ("image", "img") if n in columns), None)
        label = next((n for n in ("label", "labels", "fine_label") if n in columns), None)
        if image is None or label is None:
            raise ValueError(f"{path} has the columns {', '.join(columns)[:200]}, expected image and label")
        if not 0 < rows <= MOST_ROWS:
            raise ValueError(f"{path} has {rows} rows, expected 1 to {MOST_ROWS}")
        labels, names = class_labels(file.read([label]).column(label), str(path))
        pictures = file.read([image]).column(image)
        if pa.types.is_struct(pictures.type):
            pictures = pa.chunked_array([chunk.field("bytes") for chunk in pictures.chunks])
        encoded = pictures.to_pylist()
        metadata = file.schema_arrow.metadata
    except (pa.ArrowException, OSError, KeyError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as a Parquet file of images: {reason[:200]}") from error
    x = decode(encoded, [f"image {k} of {path}" for k in range(len(encoded))], size)
    return x, labels, _class_names(metadata, label) or names


def class_labels(column: Any, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of a column of text or whole numbers, and names where they are text, in alphabetical order.

    Args:
        column: an Arrow array, or what makes one.
        where: name in error messages.

    Raises:
        ValueError: naming the first row whose label is missing, negative or no whole number.
    """
    import pyarrow as pa

    if not isinstance(column, pa.Array | pa.ChunkedArray):
        column = pa.array(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if column.null_count:
        row = next(i for i, known in enumerate(column.is_valid().to_pylist()) if not known)
        raise ValueError(f"row {row} of {where} has no label")
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = column.to_pylist()
        if (row := next((k for k, text in enumerate(texts) if not text.strip()), None)) is not None:
            raise ValueError(f"row {row} of {where} has no label")
        names, labels = np.unique(np.asarray(texts, dtype=object), return_inverse=True)
        return labels.astype(np.int64), tuple(names)
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"{where} has labels of type {column.type}, expected text or whole numbers")
    values = np.asarray(column.to_numpy())
    odd = (
        np.nonzero(~((values >= 0) & (values < 2**31) & (values == np.floor(values))))[0]
        if values.dtype != bool
        else []
    )
    if len(odd):
        raise ValueError(
            f"row {odd[0]} of {where} has the label {values[odd[0]]}, expected a whole number of at least 0"
        )
    return values.astype(np.int64), ()


def _class_names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Names from the features that `datasets` writes into a Parquet file, if they are there."""
    try:
        names = json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(n, str) for n in names) else ()


def visible(folder: Path, suffixes: set[str]) -> list[Path]:
    """Files with one of the suffixes at any depth, sorted, but none that systems and editors hide or leave behind."""
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    return sorted(p for p in paths if not any(is_hidden(part) for part in p.relative_to(folder).parts) and p.is_file())


def is_hidden(name: str) -> bool:
    """Whether a file is none of the data: hidden, or left behind by a system."""
    return name.startswith(".") or name in LEFT_BEHIND


def list_folder(folder: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Images of a folder with a subfolder for every class, sorted by name; what is hidden is passed over.

    Raises:
        ValueError: if there are no classes or no images in one.
    """
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    if len(classes) < 2:
        raise ValueError(f"{folder} has {len(classes)} class folder(s), expected a subfolder of images for each class")
    paths: list[Path] = []
    labels: list[int] = []
    for k, name in enumerate(classes):
        images = visible(folder / name, SUFFIXES)
        if not images:
            raise ValueError(f"the class folder {folder / name} holds no images")
        paths += images
        labels += [k] * len(images)
    return paths, labels, tuple(classes)
