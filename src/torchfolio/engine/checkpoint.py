"""Checkpoints that are whole or not there, and that load without unpickling."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEEP = 2
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
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync_folder(folder)
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or `None` where there is none at all.

    Warns:
        UserWarning: for every unreadable one that is passed over.

    Raises:
        ValueError: if there are checkpoints and none can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch reports damage in many ways
            warnings.warn(f"{path} cannot be read ({type(error).__name__}); trying the one before", stacklevel=2)
    if found:
        raise ValueError(
            f"none of the {len(found)} checkpoint(s) in {folder} can be read; remove the folder to start over"
        )
    return None


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


def _sync_folder(folder: Path) -> None:
    """A rename is durable only when the folder is."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
