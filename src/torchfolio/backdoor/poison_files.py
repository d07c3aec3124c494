"""Triggered samples as plain files that say what they are laid over: `meta.json` and `poison.npz`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_poison", "write_poison"]

FORMAT = 2


def write_poison(folder: Path, arrays: dict[str, np.ndarray], meta: dict[str, Any], labels: np.ndarray) -> Path:
    """Write triggered samples with the hashes that `read_poison` compares.

    Args:
        folder: folder for the two files; made where it is missing.
        arrays: `rows`, `index`, `y`, `flags` and images `x`, uint8, of the samples that differ from the base, and tensors of
            triggers.
        meta: JSON values to go with them.
        labels: labels of the base.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = arrays | {name: _narrow(arrays[name]) for name in ("rows", "index", "y")}
    np.savez(folder / "poison.npz", **arrays)  # pyright: ignore[reportArgumentType]
    hashes = {
        "index": _sha256(arrays["index"].tobytes()),
        "x": _sha256(arrays["x"].tobytes()),
        "labels": _sha256(labels.tobytes()),
        "poison.npz": _sha256((folder / "poison.npz").read_bytes()),
    }
    (folder / "meta.json").write_text(json.dumps({"format": FORMAT, **meta, "sha256": hashes}, indent=1))
    return folder


def read_poison(folder: Path, labels: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_poison` wrote, compared with its hashes and with the labels of the base.

    Raises:
        ValueError: if the version is unknown, the base has another length, or a hash differs; names the field.
    """
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT} in {folder / 'meta.json'}, got {meta.get('format')!r}")
    _same_hash("poison.npz", (folder / "poison.npz").read_bytes(), meta, folder)
    with np.load(folder / "poison.npz", allow_pickle=False) as file:
        arrays = dict(file)
    for field in ("index", "x"):
        _same_hash(field, arrays[field].tobytes(), meta, folder)
    if len(labels) != meta["length"]:
        raise ValueError(f"expected a base of length {meta['length']}, got {len(labels)}")
    if _sha256(labels.tobytes()) != meta["sha256"]["labels"]:
        raise ValueError(f"expected the base that {folder} was made from, got one of other labels")
    samples, rows = meta.get("samples"), arrays["rows"]
    if not isinstance(samples, int) or not 0 <= samples <= len(labels) + len(rows) or not _within(rows, samples):
        raise ValueError(f"expected rows below the number of samples in {folder}, {samples}")
    if not _within(arrays["index"], len(labels)) or (arrays["flags"] > 0).sum() != len(arrays["x"]):
        raise ValueError(f"expected an image for every poisoned row in {folder}, and rows of the base")
    return arrays, meta


def _within(values: np.ndarray, end: int) -> bool:
    return values.ndim == 1 and (not len(values) or (int(values.min()) >= 0 and int(values.max()) < end))


def _narrow(values: np.ndarray) -> np.ndarray:
    """The same integers in as few bytes as hold them."""
    if not len(values):
        return values.astype(np.uint8)
    return values.astype(np.result_type(np.min_scalar_type(values.min()), np.min_scalar_type(values.max())))


def _same_hash(field: str, content: bytes, meta: dict[str, Any], folder: Path) -> None:
    if _sha256(content) != meta["sha256"][field]:
        raise ValueError(f"the sha256 of {field} in {folder} differs from meta.json: the file was changed")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
