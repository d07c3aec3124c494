"""Files of a run: written whole or not at all, read without pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchfolio.json_text import to_json

ARRAY, TENSOR = "__array__", "__tensor__"
SCRATCH = ".unfinished-"  # how the names of files begin that are being written


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name only when it is complete and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=SCRATCH, dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(scratch)
        raise


def clear_scratch(folder: Path) -> None:
    """Remove what a killed process left half written in a folder that no other process works in."""
    for path in folder.rglob(f"{SCRATCH}*"):
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; numbers that are not finite become null."""
    text = to_json(value, indent=2)
    with atomic(path) as file:
        file.write(text.encode() + b"\n")


def write_result(path: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Store what an arm returned: JSON, with arrays and tensors beside it in an `.npz`.

    A digest covers it and what stands beside it under the same name.

    Returns:
        The result as it will be read back.

    Raises:
        TypeError: naming a value that cannot be stored.
    """
    arrays: dict[str, np.ndarray] = {}
    body = _encode(dict(result), "", arrays)
    if arrays:
        with atomic(path.with_suffix(".npz")) as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    with atomic(path) as file:  # last: its presence says that the arm is done
        file.write(json.dumps({"result": body, "sha256": _digest(path, body)}, indent=2).encode() + b"\n")
    return read_result(path)


def read_result(path: Path) -> dict[str, Any]:
    """Read what `write_result` stored, with the same types.

    Raises:
        ValueError: if it is not as it was written.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        body = stored["result"]
        whole = stored["sha256"] == _digest(path, body)
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged, or a file beside it: its digest is not that of its content")
    beside = path.with_suffix(".npz")
    if not beside.is_file():
        return _decode(body, {})
    with np.load(beside, allow_pickle=False) as arrays:
        return _decode(body, dict(arrays))


BESIDE = (".npz", ".jsonl", ".seconds")
"""How files end that belong to the result of an arm."""


def _digest(path: Path, body: Any) -> str:
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode())
    for beside in map(path.with_suffix, BESIDE):
        digest.update(beside.suffix.encode() + (beside.read_bytes() if beside.is_file() else b""))
    return digest.hexdigest()


def _encode(value: Any, where: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else {"__float__": repr(value)}
    if isinstance(value, np.generic):
        return _encode(value.item(), where, arrays)
    if isinstance(value, Mapping):
        return {str(k): _encode(v, f"{where}.{k}" if where else str(k), arrays) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}[{k}]", arrays) for k, v in enumerate(value)]
    if isinstance(value, np.ndarray):
        kind, array = ARRAY, value
    else:  # a tensor is told by what it can do: this file does not import torch
        kind, array = TENSOR, value.detach().cpu().numpy() if hasattr(value, "detach") else None
    if array is None or array.dtype == object:
        raise TypeError(
            f"an arm's result holds a {type(value).__name__} at {where!r}; expected numbers, text, lists, arrays or tensors"
        )
    name = f"a{len(arrays)}"
    arrays[name] = array
    return {kind: name}


def _decode(value: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if isinstance(value, list):
        return [_decode(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"__float__"}:
        return float(value["__float__"])
    if set(value) == {ARRAY}:
        return arrays[value[ARRAY]]
    if set(value) == {TENSOR}:
        import torch

        return torch.from_numpy(arrays[value[TENSOR]])
    return {k: _decode(v, arrays) for k, v in value.items()}


def write_json_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as a file of JSON lines, atomically."""
    with atomic(path) as file:
        file.writelines(to_json(row).encode() + b"\n" for row in rows)


def append_json_line(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a file of JSON lines, at once on disk as far as the system cares."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = to_json(row)
    needs_break = path.is_file() and path.stat().st_size > 0 and _last_byte(path) != b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if needs_break else "") + line + "\n")


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines; lines torn by a kill are passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
