"""Decoded arrays on disk, memory-mapped, keyed by the content of what they were decoded from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]


def cache_folder() -> Path:
    """`TORCHFOLIO_CACHE`, or `torchfolio` in the user's cache folder."""
    if os.environ.get("TORCHFOLIO_CACHE"):
        return Path(os.environ["TORCHFOLIO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchfolio"


def content_key(paths: Sequence[Path], extra: str = "") -> str:
    """A digest of the contents of files, their names, and whatever else decides what is decoded."""
    digest = hashlib.sha256(extra.encode())
    for path in paths:
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def cached(key: str, make: Callable[[], Arrays]) -> Arrays:
    """Arrays from the cache, or made and put there.

    A cache that is damaged or was only half written is noticed by its checksums and made anew. Where the cache
    cannot be written the arrays are returned all the same.

    Args:
        key: of the content.
        make: decodes images `[N, ...]`, labels `[N]` and class names.
    """
    folder = cache_folder() / "images" / key
    found = _read(folder)
    if found is not None:
        return found
    made = make()
    try:
        _write(folder, made)
    except OSError:
        return made
    return _read(folder) or made


def _read(folder: Path) -> Arrays | None:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, checksum in manifest["checksums"].items():
            if _checksum(folder / name) != checksum:
                return None
        x = np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False)
        y = np.load(folder / "y.npy", allow_pickle=False)
        return x, y, tuple(manifest["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".new-", dir=folder.parent))
    try:
        x, y, classes = arrays
        for name, array in (("x.npy", x), ("y.npy", y)):
            with (scratch / name).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        checksums = {name: _checksum(scratch / name) for name in ("x.npy", "y.npy")}
        (scratch / "manifest.json").write_text(json.dumps({"classes": list(classes), "checksums": checksums}))
        if folder.exists():  # damaged, or another process was faster; either way ours is whole
            shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    except OSError:
        if _read(folder) is None:
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
