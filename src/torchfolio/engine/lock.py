"""Which process holds a folder, and writes that are on the disk when they are said to be."""

from __future__ import annotations

import json
import os
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; there folders are not guarded
    fcntl = None

__all__ = ["LOCK", "FolderInUse", "exclusive", "held", "sync", "user_of"]

LOCK = ".in-use"
"""Name of the file by which a process holds a folder of its work; it says who that is."""

_mine: dict[Path, int] = {}  # folders that this process holds, with the thread that does
_guard = threading.Lock()


class FolderInUse(ValueError):
    """Another process works in the folder."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Work in a folder alone, or be told who does. The folder is made, and removed again if it stays empty.

    A process that dies lets go, and so do its children, whatever they inherited. The thread that holds a folder may
    hold it once more inside. On Windows folders are not guarded.

    Raises:
        FolderInUse: naming process, host and time, if another process or thread works there.
        OSError: if the folder cannot be made or written.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    with _guard:
        holder = _mine.get(key)
        if holder is None:
            # Record locks are not inherited by forked workers, which may outlive a killed process for a while.
            descriptor = _lock(folder)
            _mine[key] = threading.get_ident()
    if holder is not None:
        if holder != threading.get_ident():
            raise FolderInUse(f"{folder} is in use by another thread of this process; name another folder")
        yield
        return
    try:
        yield
    finally:
        with _guard:
            del _mine[key]
            with suppress(FileNotFoundError):
                (folder / LOCK).unlink()
            os.close(descriptor)
            if is_new:
                with suppress(OSError):  # it holds something, or is gone
                    folder.rmdir()


def user_of(folder: Path) -> str | None:
    """Who works in a folder, in words; `None` if nobody does."""
    if not (folder / LOCK).is_file():
        return None
    try:
        with exclusive(folder):
            return None
    except FolderInUse as error:
        return str(error)


def _lock(folder: Path) -> int:
    """A descriptor of the folder's lock file that holds the lock."""
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            who = _who(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise FolderInUse(f"{folder} is in use by {who}; wait until it is done, or name another folder") from error
        except OSError as error:
            warnings.warn(f"{folder} cannot be guarded against a second process ({error.strerror})", stacklevel=4)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)  # the one before removed the file in between
    now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())
    return descriptor


def _who(text: bytes) -> str:
    try:
        holder = json.loads(text)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:80]} since {str(holder['since'])[:40]}"
    except (ValueError, TypeError, KeyError):  # it has not been written yet
        return "another process"


@contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Hold a folder while the block runs, if no other process does. The lock goes with the process that dies.

    Yields:
        Whether this process holds it.
    """
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
