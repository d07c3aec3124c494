"""`bundle.json`: what it says, and the check that it says nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torchfolio.data.seen import is_sketch
from torchfolio.errors import TorchfolioError

FORMAT = 2
WEIGHTS, MANIFEST = "model.safetensors", "bundle.json"
LARGEST_MANIFEST = 16 * 2**20  # bytes
PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".joblib", ".dill"}


class BundleError(TorchfolioError):
    """A bundle is damaged, has been changed, or asks for something that was not allowed."""


@dataclass(frozen=True)
class Manifest:
    """What `bundle.json` says.

    Attributes:
        build: import path of the class or factory, `"package.module:name"`.
        arguments: its keyword arguments, JSON values. An argument `{"build": ..., "arguments": {...}}` is a network
            of its own, which is built first: so a method that converts networks is written around what it converts.
        input_shape: shape of one input, without the batch.
        classes: names of the outputs; empty for regression.
        mean: constants the inputs are normalised with, per channel or feature; empty when they are not.
        std: standard deviation, likewise.
        training: record of how the weights came about.
        tied: names of parameters that are stored once, by the name they are stored under.
    """

    build: str
    arguments: dict[str, Any] = field(default_factory=dict)
    input_shape: tuple[int, ...] = ()
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    training: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)


_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_path(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 300 and _PATH.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_finite(value: Any) -> bool:
    """Whether a JSON value holds no number that is not finite."""
    if isinstance(value, dict):
        return all(_is_finite(part) for part in value.values())
    if isinstance(value, list):
        return all(_is_finite(part) for part in value)
    return not isinstance(value, int | float) or abs(value) < (2**63 if isinstance(value, int) else math.inf)


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_finite(value):
        return False
    size, seen = value.get("image_size"), value.get("seen", "")
    return (size is None or _is_size(size)) and isinstance(seen, str) and is_sketch(seen)


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, dict) or not all(key.isidentifier() for key in value) or not _is_finite(value):
        return False
    networks = [part for part in value.values() if isinstance(part, dict) and set(part) == {"build", "arguments"}]
    return all(is_path(part["build"]) and _are_arguments(part["arguments"]) for part in networks)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _list_of(check: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(check(part) for part in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "build": (is_path, "an import path package.module:name"),
    "arguments": (_are_arguments, "arguments by name, with finite numbers"),
    "input_shape": (_list_of(_is_size, 8), "up to 8 positive whole numbers"),
    "classes": (_list_of(_is_text, 1_000_000), "a list of names"),
    "mean": (_list_of(_is_number, 1_000_000), "a list of finite numbers"),
    "std": (_list_of(lambda v: _is_number(v) and v > 0, 1_000_000), "a list of positive finite numbers"),
    "training": (_is_record, "a record with finite numbers, image_size a positive whole one, seen hexadecimal"),
    "tied": (lambda v: isinstance(v, dict) and all(map(_is_text, v.values())), "names by name"),
    "format": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    "version": (lambda v: isinstance(v, str) and 0 < len(v) <= 100, "a version of torchfolio"),
    "weights_sha256": (_is_hash, "a SHA-256 sum"),
    "digest": (_is_hash, "a SHA-256 sum"),
}
"""What each field of `bundle.json` must be, and in words."""


def check_manifest(body: Any, where: str) -> None:
    if not isinstance(body, dict) or set(body) != set(_FIELDS):
        odd = sorted(set(_FIELDS) ^ set(body)) if isinstance(body, dict) else ["the whole"]
        raise BundleError(f"{where} does not have the fields of a bundle: {', '.join(map(shown, odd[:5]))}")
    for name, (check, expected) in _FIELDS.items():
        if not check(body[name]):
            raise BundleError(f"{where}: {name} is {shown(body[name])}, expected {expected}")
    channels = len(body["mean"])
    if channels != len(body["std"]):
        raise BundleError(f"{where}: mean has {channels} numbers and std {len(body['std'])}, expected as many")
    if body["input_shape"] and channels > 1 and channels != body["input_shape"][0]:
        raise BundleError(f"{where}: mean has {channels} numbers for inputs of shape {body['input_shape']}")


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    path = folder / MANIFEST
    for file in (path, folder / WEIGHTS):
        if not file.is_file():
            raise BundleError(f"{folder} is no bundle: it has no {file.name}")
    strangers = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if strangers:
        raise BundleError(f"{folder} holds {strangers[0]}, which may be a pickle and could run code; it is not read")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, expected at most {LARGEST_MANIFEST}")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON: {error}") from error
    if isinstance(body, dict) and body.get("format", FORMAT) != FORMAT:
        raise BundleError(f"{path} has format {shown(body['format'])}, expected {FORMAT}")
    check_manifest(body, str(path))
    if body["digest"] != digest(body):
        raise BundleError(f"{path} was changed after it was written (its digest differs)")
    for name in ("input_shape", "classes", "mean", "std"):
        body[name] = tuple(body[name])
    return Manifest(**{f.name: body[f.name] for f in fields(Manifest)}), body["weights_sha256"]


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
