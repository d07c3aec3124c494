"""Checkpoints that are whole or not there, that tell when they were damaged, and that load without unpickling.

A file is what `torch.save` writes, and after it a line with the format and the SHA-256 of all before: `torch.load`
reads it as it is.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from torchfolio.engine.lock import sync

KEEP = 2
FORMAT = 2
MARK = f"\ntorchfolio checkpoint {FORMAT} ".encode()
PLAIN = (Tensor, bool, int, float, complex, str, bytes, torch.dtype, torch.device, type(None))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint atomically and keep the last two.

    The file appears under its name only when all of it is on the disk: a process that dies while writing
    leaves the checkpoints before untouched.

    Args:
        folder: made if it is not there.
        step: names the file.
        state: tensors, plain values, and containers of them.

    Raises:
        TypeError: if the state holds anything else, which could not be loaded safely again.
    """
    _check_plain(state, "checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:09d}.ckpt"
    scratch = path.with_suffix(".tmp")
    with scratch.open("wb") as file:
        written: Any = _Hashing(file)
        torch.save(state, written)
        file.write(MARK + written.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync(folder)
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or `None` where there is none at all. See `readable`."""
    return next((saved for _, saved in readable(folder)), None)


def readable(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Checkpoints of a folder that are whole, newest first; at least one, or none where there are none at all.

    Warns:
        UserWarning: for every other one that is passed over.

    Raises:
        ValueError: at the end, if there are checkpoints and none was the last that was wanted.
    """
    paths = checkpoints(folder)
    for path in reversed(paths):
        try:
            saved = _load(path)
        except Exception as error:  # torch reports foreign content in many ways
            reason = str(error) if isinstance(error, _Damaged) else type(error).__name__
            warnings.warn(f"{path} cannot be read ({reason}); trying the one before", stacklevel=2)
        else:
            yield path, saved
    if paths:
        raise ValueError(
            f"none of the {len(paths)} checkpoint(s) in {folder} can be read; remove the folder to start over"
        )


class _Damaged(ValueError):
    """A file that is not as it was written."""


class _Hashing:
    """A file that is written through a digest."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _load(path: Path) -> dict[str, Any]:
    """The content of a file whose digest is right.

    Raises:
        _Damaged: if it is not, or if there is no digest.
    """
    digest, end = hashlib.sha256(), len(MARK) + 2 * hashlib.sha256().digest_size
    with path.open("rb") as file:
        left = path.stat().st_size - end
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
        last = file.read()
    if not last.startswith(MARK):
        raise _Damaged(f"it is cut, damaged, or no checkpoint of format {FORMAT}")
    if last[len(MARK) :] != digest.hexdigest().encode():
        raise _Damaged("it is damaged: its digest is not that of its content")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise _Damaged(f"it holds a {type(saved).__name__}, not the parts of a training")
    return saved


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*.ckpt")) if folder.is_dir() else []


def clear_checkpoints(folder: Path, *, all: bool = True) -> None:
    """Remove the checkpoints of a folder, or only the halves that a killed process left."""
    if folder.is_dir():
        for path in (*folder.glob("step-*.tmp"), *(checkpoints(folder) if all else ())):
            path.unlink(missing_ok=True)


def _check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _check_plain(part, f"{where}[{key!r}]")
    elif isinstance(value, list | tuple | set):
        for k, part in enumerate(value):
            _check_plain(part, f"{where}[{k}]")
    elif not isinstance(value, PLAIN):
        raise TypeError(
            f"{where} is a {type(value).__name__}; expected tensors, numbers, strings and "
            "containers of them, which load without unpickling"
        )
