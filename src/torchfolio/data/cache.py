"""Decoded arrays on disk, memory-mapped, keyed by the content of what they were decoded from.

Contents are read through once. What was found is kept with the size and the times of the files, and holds until one of
those changes; files that were written a moment ago are read again, since a second change need not show in their times.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...]]

SCRATCH = ".new-"  # how the names of what is being written begin
SETTLED = 2.0  # seconds after which a change of a file shows in its times on any usual file system


def cache_folder() -> Path:
    """`TORCHFOLIO_CACHE`, or `torchfolio` in the user's cache folder."""
    if os.environ.get("TORCHFOLIO_CACHE"):
        return Path(os.environ["TORCHFOLIO_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torchfolio"


def content_key(paths: Sequence[Path], extra: str = "") -> str:
    """A digest of the contents of files, their names, and whatever else decides what is decoded."""
    named = hashlib.sha256("\0".join([extra, *(str(p.resolve()) for p in paths)]).encode()).hexdigest()[:32]
    note = cache_folder() / "keys" / f"{named}.json"
    stamp = _stamp(paths)
    if stamp is not None and (known := _noted(note, stamp)) is not None:
        return known
    key = _content_key(paths, extra)
    if stamp is not None and stamp == _stamp(paths):
        _note(note, stamp, key)
    return key


def _content_key(paths: Sequence[Path], extra: str) -> str:
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
        key: key of the content.
        make: decodes images `[N, ...]`, labels `[N]` and class names.
    """
    folder = cache_folder() / "images" / key
    stored = _read(folder)
    if stored is not None:
        return stored
    arrays = make()
    try:
        _write(folder, arrays)
    except OSError:
        return arrays
    return _read(folder) or arrays


def _read(folder: Path) -> Arrays | None:
    try:
        text = (folder / "manifest.json").read_text()
        manifest = json.loads(text)
        if not _verified(folder, text, manifest["checksums"]):
            return None
        x = np.load(folder / "x.npy", mmap_mode="r", allow_pickle=False)
        y = np.load(folder / "y.npy", allow_pickle=False)
        return x, y, tuple(manifest["classes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _verified(folder: Path, manifest: str, checksums: dict[str, str]) -> bool:
    """Whether the arrays have the checksums of the manifest."""
    stamp = _stamp([folder / name for name in checksums])
    digest = hashlib.sha256(manifest.encode()).hexdigest()[:32]
    if stamp is not None and _noted(folder / "verified.json", stamp) == digest:
        return True
    if any(_checksum(folder / name) != checksum for name, checksum in checksums.items()):
        return False
    if stamp is not None:
        _note(folder / "verified.json", stamp, digest)
    return True


def _stamp(paths: Sequence[Path]) -> str | None:
    """Sizes and times of files in short; `None` where one of them is too young to tell a change by them."""
    digest = hashlib.sha256()
    youngest = 0.0
    for path in paths:
        status = path.stat()
        youngest = max(youngest, status.st_mtime, status.st_ctime)
        digest.update(f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\0".encode())
    return digest.hexdigest()[:32] if youngest < time.time() - SETTLED else None


def _noted(note: Path, stamp: str) -> str | None:
    """What was found when the files had this stamp."""
    try:
        known = json.loads(note.read_text())
        return str(known["found"]) if known["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _note(note: Path, stamp: str, found: str) -> None:
    """Keep what was found; without a word where that cannot be written."""
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, prefix=SCRATCH, delete=False) as file:
            json.dump({"stamp": stamp, "found": found}, file)
        os.replace(file.name, note)
    except OSError:
        return


def _write(folder: Path, arrays: Arrays) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_scratch(folder.parent)
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder.parent))
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


def _clear_scratch(place: Path) -> None:
    """Remove what killed processes left half written; what is younger than a day may be somebody's who still writes."""
    for left in place.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 86_400:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]
