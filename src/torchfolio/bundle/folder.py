"""A bundle's folder on disk: whole or not there, whatever happens to the process that writes it."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchfolio.bundle.manifest import MANIFEST, WEIGHTS, BundleError
from torchfolio.checks import writable
from torchfolio.engine.lock import held, sync


def check_folder(folder: Path) -> None:
    """Refuse a place where a bundle could not be written, before the work for it begins.

    Raises:
        BundleError: if `folder` is a file, or a folder that holds anything but a bundle, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} exists and is no folder; name another one")
    try:
        writable(folder)
    except OSError as error:
        raise BundleError(str(error)) from error
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists and is no bundle; name another folder")


def write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


def old_of(folder: Path) -> Path:
    """Where the earlier bundle stands for the moment in which another takes its place."""
    return folder.absolute().parent / f".{folder.absolute().name}.old"


def recover(folder: Path) -> None:
    """Clear up after writers that died: put the earlier bundle back, remove what never became one."""
    old = old_of(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.absolute().name)}.new-*"):
        with held(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    if old.exists() and folder.exists():
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """A folder beside another, to be moved in its place; held by this process as long as it is written."""
    place = Path(tempfile.mkdtemp(prefix=f".{folder.absolute().name}.new-", dir=folder.absolute().parent))
    try:
        with held(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def publish(scratch: Path) -> None:
    """Bring the files to the disk, as readable as any file that the user writes."""
    mode = (scratch / MANIFEST).stat().st_mode & 0o666
    (scratch / WEIGHTS).chmod(mode)
    scratch.chmod(mode | 0o700 | (mode & 0o444) >> 2)
    for path in (scratch / WEIGHTS, scratch / MANIFEST, scratch):
        sync(path)


def swap(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place, moving an earlier one out of the way first."""
    old = old_of(folder)
    while True:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        try:
            os.replace(scratch, folder)
            break
        except OSError:
            if not folder.exists():
                raise
            # Another process put a bundle there in between; this one is newer.
    sync(folder.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)
