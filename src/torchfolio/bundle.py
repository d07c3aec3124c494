"""A network on disk: safe weights beside a description of how to build the module.

A bundle is a folder with two files: `model.safetensors`, and `bundle.json`, which holds an import path and its
arguments, what the network takes and tells apart, and the record of its training. Nothing in it is ever
unpickled, and no code is imported that the reader did not ask for.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import shutil
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from torchfolio.catalog import FAMILIES
from torchfolio.errors import TorchfolioError

FORMAT = 1
WEIGHTS, MANIFEST = "model.safetensors", "bundle.json"


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
        std: likewise.
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


@dataclass(frozen=True)
class Bundle:
    """A network read from disk: the module, in evaluation mode, and its manifest."""

    model: nn.Module
    manifest: Manifest


def save_bundle(model: nn.Module, folder: str | Path, manifest: Manifest) -> Path:
    """Write a bundle. The folder appears whole or not at all; an earlier bundle there is replaced.

    Args:
        model: the network; its parameters and buffers are stored.
        folder: where to write.
        manifest: how to build it again.

    Returns:
        The folder.

    Raises:
        BundleError: if the manifest cannot be written as JSON, or `folder` exists and is no bundle.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists and is no bundle; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stored, tied = _unshared(model)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        save_file(stored, scratch / WEIGHTS)
        body = {**asdict(manifest), "tied": tied, "format": FORMAT, "weights_sha256": _sha256(scratch / WEIGHTS)}
        body["digest"] = _digest(body)
        _write(scratch / MANIFEST, json.dumps(body, indent=2, allow_nan=False) + "\n")
        scratch.chmod(0o755)
        _swap(scratch, folder)
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def load_bundle(folder: str | Path, *, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle without running anything it brings.

    Args:
        folder: the bundle.
        allow: import paths besides torchfolio's own modules that may be imported, as `"package.module:name"`.
        device: where the weights go.

    Raises:
        BundleError: if a file is missing, a stranger or a pickle, if weights or manifest were changed, or if the
            import path is not allowed or does not build a module that fits the weights.
    """
    folder = Path(folder)
    manifest, checksum = _read_manifest(folder)
    if _sha256(folder / WEIGHTS) != checksum:
        raise BundleError(f"{folder / WEIGHTS} is not the file that {MANIFEST} was written for (its checksum differs)")
    model = build(manifest.build, manifest.arguments, allow=allow)
    try:
        state = load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    state.update({name: state[source] for name, source in manifest.tied.items() if source in state})
    try:
        model.to(device).load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BundleError(f"the weights in {folder} do not fit {manifest.build}: {detail}") from error
    return Bundle(model.eval(), manifest)


def build(path: str, arguments: Mapping[str, Any], *, allow: Sequence[str] = ()) -> nn.Module:
    """Build a module from an import path and keyword arguments.

    Args:
        path: `"package.module:name"`. Torchfolio's reference networks, module classes, and the functions by which
            its methods convert a network are always allowed.
        arguments: keyword arguments; `{"build": ..., "arguments": {...}}` among them stands for a network.
        allow: further paths that may be imported.

    Raises:
        BundleError: if the path is not allowed, cannot be imported, or does not give an `nn.Module`.
    """
    factory = resolve(path, allow=allow)
    inner = {
        name: build(value["build"], value["arguments"], allow=allow)
        for name, value in arguments.items()
        if isinstance(value, Mapping) and set(value) == {"build", "arguments"}
    }
    try:
        model = factory(**{**arguments, **inner})
    except (TypeError, ValueError) as error:
        raise BundleError(f"{path} cannot be built with the arguments {dict(arguments)}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BundleError(f"{path} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def resolve(path: str, *, allow: Sequence[str] = ()) -> Any:
    """The class or factory behind an import path, if it may be imported. See `build`."""
    module_name, _, name = path.partition(":")
    if not module_name or not name.isidentifier():
        raise BundleError(f"expected an import path of the form package.module:name, got {path!r}")
    ours = module_name == "torchfolio" or module_name.startswith("torchfolio.")
    if path not in allow and not ours:
        raise BundleError(f"{path} is not part of torchfolio; if you trust it, allow it by name: --allow {path}")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise BundleError(f"cannot import {path}: {error}") from error
    is_module = inspect.isclass(target) and issubclass(target, nn.Module)
    # A stranger's manifest must not call whichever of our functions it likes with arguments of its own.
    harmless = is_module or module_name.startswith("torchfolio.models") or _converts_networks(target)
    if ours and path not in allow and not harmless:
        raise BundleError(
            f"{path} is not a network; a bundle may only name classes of modules, reference networks and functions "
            "that convert one"
        )
    if not callable(target):
        raise BundleError(f"{path} is a {type(target).__name__}, expected a class or factory of a torch.nn.Module")
    return target


def _converts_networks(target: Any) -> bool:
    """Whether this is a function of a method's own module, from a network (its first argument) to a network."""
    home = getattr(target, "__module__", "").split(".")
    if not inspect.isfunction(target) or home[0] != "torchfolio" or len(home) < 3 or home[1] not in FAMILIES:
        return False
    try:
        hints = typing.get_type_hints(target)
    except NameError:  # a name known to type checkers alone
        return False
    first = next(iter(inspect.signature(target).parameters), "")
    ends = hints.get(first), hints.get("return")
    return all(inspect.isclass(end) and issubclass(end, nn.Module) for end in ends)


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}")
    if not (folder / WEIGHTS).is_file():
        raise BundleError(f"{folder} is no bundle: it has no {WEIGHTS}")
    strangers = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if strangers:
        raise BundleError(f"{folder} holds {strangers[0]}, which may be a pickle and could run code; it is not read")
    try:
        body = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{folder / MANIFEST} is not JSON: {error}") from error
    expected = {f.name for f in fields(Manifest)} | {"format", "weights_sha256", "digest"}
    if not isinstance(body, dict) or set(body) != expected:
        odd = sorted(expected ^ set(body)) if isinstance(body, dict) else ["the whole"]
        raise BundleError(f"{folder / MANIFEST} does not have the fields of a bundle: {', '.join(odd)}")
    if body["format"] != FORMAT:
        raise BundleError(f"{folder / MANIFEST} has format {body['format']!r}, expected {FORMAT}")
    if body.pop("digest") != _digest(body):
        raise BundleError(f"{folder / MANIFEST} was changed after it was written (its digest differs)")
    body.pop("format")
    checksum = body.pop("weights_sha256")
    for name in ("input_shape", "classes", "mean", "std"):
        body[name] = tuple(body[name])
    return Manifest(**body), checksum


PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".joblib", ".dill"}


def _unshared(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors to store, each once, and the other names of those that go by several."""
    stored: dict[str, torch.Tensor] = {}
    names: dict[tuple[int, tuple[int, ...], int], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.storage_offset())
        if tensor.numel() and key in names:
            tied[name] = names[key]
            continue
        names[key] = name
        stored[name] = tensor.detach().cpu().contiguous().clone()
    return stored, tied


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _swap(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place, moving an earlier one out of the way first."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old / "bundle")
        os.replace(scratch, folder)
        shutil.rmtree(old)
    else:
        os.replace(scratch, folder)
