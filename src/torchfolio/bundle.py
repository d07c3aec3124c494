"""A network on disk: safe weights beside a description of how to build the module.

A bundle is a folder with two files: `model.safetensors`, and `bundle.json`, which holds an import path and its
arguments, what the network takes and tells apart, and the record of its training. A bundle may come from a stranger:
nothing in it is ever unpickled, and it can name no other builders than the reference networks
(`torchfolio.models.BUILDERS`), those that papers offer (`builders` in `papers/SLUG.toml`) and those that the reader
allows by name. A builder evaluates no text, imports nothing by name and opens no path.
"""

from __future__ import annotations

import glob
import hashlib
import importlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules import module as registration
from torch.utils._python_dispatch import TorchDispatchMode

from torchfolio import __version__, catalog, models
from torchfolio.engine.lock import held, sync
from torchfolio.engine.modes import evaluating
from torchfolio.errors import TorchfolioError
from torchfolio.json_text import plain
from torchfolio.models.chain import recipe_of

FORMAT = 2
WEIGHTS, MANIFEST = "model.safetensors", "bundle.json"
LARGEST_MANIFEST = 16 * 2**20  # bytes
DEEPEST = 8  # networks around networks
MOST_MODULES = 10_000


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


def save_bundle(
    model: nn.Module,
    folder: str | Path,
    manifest: Manifest | None = None,
    *,
    example: Tensor | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a bundle. The folder appears whole or not at all; an earlier bundle there is replaced.

    A process that dies in between leaves the earlier bundle or the new one, never neither.

    Args:
        model: the network; its parameters and buffers are stored.
        folder: where to write.
        manifest: how to build it again. Numbers in `training` that are not finite are stored as `null`. Without one it is
            made of the live network, which must be a reference network or an `nn.Sequential` of PyTorch's own layers;
            one that cannot be built again is refused, and one that was changed since it was built.
        example: a batch of inputs `[B, ...]`, for a network without a manifest.
        notes: texts that are kept beside it, by file name; they are never read back.

    Returns:
        The folder.

    Raises:
        BundleError: if the manifest could not be read back, weights are not finite, or `folder` exists and is no
            bundle.
    """
    folder = Path(folder)
    check_folder(folder)
    if odd := [n for n in notes or () if Path(n).name != n or Path(n).suffix in PICKLES or n in (WEIGHTS, MANIFEST)]:
        raise BundleError(f"expected notes to be named by plain file names of their own, got {odd[0]!r}")
    if manifest is None:
        manifest = describe(model, example)
    stored, tied = _unshared(model)
    _check_finite(model, stored)
    body = {**asdict(manifest), "training": plain(manifest.training), "tied": tied}
    body |= {"format": FORMAT, "version": __version__, "weights_sha256": ""}
    try:
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    _recover(folder)
    with _scratch(folder) as scratch:
        save_file(stored, scratch / WEIGHTS)
        body["weights_sha256"] = _sha256(scratch / WEIGHTS)
        body["digest"] = _digest(body)
        _check_manifest(body, "the manifest")
        _write(scratch / MANIFEST, json.dumps(body, indent=2, allow_nan=False) + "\n")
        for name, text in (notes or {}).items():
            _write(scratch / name, text)
        _publish(scratch)
        _swap(scratch, folder)
    return folder


def describe(model: nn.Module, example: Tensor | None) -> Manifest:
    """The manifest of a live network.

    Args:
        model: a reference network, or an `nn.Sequential` of PyTorch's own layers.
        example: a batch of inputs that it takes.

    Raises:
        BundleError: if the network cannot be built again, or its copy is another or gives other outputs.
    """
    if not isinstance(example, Tensor) or example.dim() < 1 or not len(example):
        raise BundleError(f"expected example=x, a batch of inputs of the network, got {_shown(example)}")
    advice = "give a Manifest with the import path of your own factory"
    try:
        factory, arguments = recipe_of(model)
    except ValueError as error:
        raise BundleError(f"the network cannot be built again from values: {error}; {advice}") from error
    path = f"torchfolio.models:{factory.__name__}"
    made = Manifest(path, json.loads(json.dumps(plain(arguments))), tuple(example.shape[1:]))
    again = build(made.build, made.arguments)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if {n: v.shape for n, v in again.state_dict().items()} != {n: v.shape for n, v in state.items()}:
        raise BundleError(f"the network is not the {factory.__name__} that it was built as: it was changed; {advice}")
    again.load_state_dict(state)
    dtype = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    with torch.no_grad(), evaluating(model):
        expected, found = model(example).cpu(), again.to(dtype).eval()(example.cpu())
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
        raise BundleError(f"the {factory.__name__} built again gives other outputs than the network: {advice}")
    classes = tuple(map(str, range(found.shape[1]))) if found.dim() == 2 and found.shape[1] > 1 else ()
    return replace(made, classes=classes)


def check_folder(folder: Path) -> None:
    """Refuse a place where a bundle could not be written, before the work for it begins.

    Raises:
        BundleError: if `folder` is a file, or a folder that holds anything but a bundle, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise BundleError(f"{folder} exists and is no folder; name another one")
    above = next(p for p in (folder.absolute(), *folder.absolute().parents)[1:] if p.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".torchfolio-", dir=above))
    except OSError as error:
        raise BundleError(f"{folder} cannot be written: {error.strerror} in {above}") from error
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} exists and is no bundle; name another folder")


def load_bundle(folder: str | Path, *, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle without running anything it brings.

    Args:
        folder: the bundle; or `"hf:owner/name"`, one of the Hugging Face hub, `"hf:owner/name@revision"`.
        allow: import paths that the bundle may name besides the known builders, as `"package.module:name"`.
        device: where the weights go.

    Raises:
        BundleError: if a file is missing, a stranger or a pickle, if weights or manifest were changed or are not
            finite, or if the import path is not allowed or does not build a module that fits the weights.
    """
    if str(folder).startswith("hf:"):
        from torchfolio.hub import fetch_bundle

        folder = fetch_bundle(str(folder), (MANIFEST, WEIGHTS))
    folder = Path(folder)
    if not folder.exists() and (_old(folder) / MANIFEST).is_file():
        warnings.warn(f"{folder} was being replaced when its writer died; reading the one before", stacklevel=2)
        folder = _old(folder)
    manifest, checksum = _read_manifest(folder)
    if _sha256(folder / WEIGHTS) != checksum:
        raise BundleError(f"{folder / WEIGHTS} is not the file that {MANIFEST} was written for (its checksum differs)")
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    # Packed weights hold a bit for what is built as a float, and a method may convert a network several times.
    limit = 64 * (folder / WEIGHTS).stat().st_size + 2**20
    model = build(manifest.build, manifest.arguments, allow=allow, limit=limit)
    missing = [source for source in manifest.tied.values() if source not in state]
    if missing:
        raise BundleError(f"{folder / MANIFEST}: tied names {_shown(missing[0])}, which {WEIGHTS} does not hold")
    state.update({name: state[source] for name, source in manifest.tied.items()})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BundleError(f"the weights in {folder} do not fit {manifest.build}: {detail}") from error
    _check_finite(model, state)
    return Bundle(model.to(device).eval(), manifest)


def push_bundle(folder: str | Path, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Send a bundle to the Hugging Face hub, which must know you (`hf auth login`).

    Args:
        folder: of the bundle; of other files only `history.csv` is sent.
        name: `"owner/name"`; made if there is none.
        private: whether a new one is hidden from others.
        message: of the change.

    Returns:
        Address of the bundle, which `load_bundle("hf:owner/name")` reads.

    Raises:
        BundleError: if the folder is no whole bundle.
        HubError: if the name is none, or the hub refuses.
    """
    from torchfolio.hub import send_bundle

    _, checksum = _read_manifest(Path(folder))
    if _sha256(Path(folder) / WEIGHTS) != checksum:
        raise BundleError(f"{Path(folder) / WEIGHTS} is not the file that {MANIFEST} was written for: it is not sent")
    return send_bundle(Path(folder), name, (MANIFEST, WEIGHTS, "history.csv"), private=private, message=message)


def build(path: str, arguments: Mapping[str, Any], *, allow: Sequence[str] = (), limit: int | None = None) -> nn.Module:
    """Build a module from an import path and keyword arguments.

    Args:
        path: `"package.module:name"`, one of `builders()` or of `allow`.
        arguments: keyword arguments; `{"build": ..., "arguments": {...}}` among them stands for a network.
        allow: further paths that may be imported.
        limit: most elements that the module's tensors may have together; by default as many as it asks for.

    Raises:
        BundleError: if the path is not allowed, cannot be imported, or does not give an `nn.Module`, or a larger one.
    """
    if limit is None:
        return _build(path, arguments, allow)
    # On the meta device nothing is allocated. Builders that read values fail there, and are only bounded below.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with _Bounded(limit), torch.device("meta"):
                _build(path, arguments, allow)
        except BundleError as error:
            if isinstance(error.__cause__, _TooLarge) or error.__cause__ is None:
                raise
    with _bounded_registration(limit):
        return _build(path, arguments, allow)


def _build(path: str, arguments: Mapping[str, Any], allow: Sequence[str], depth: int = 1) -> nn.Module:
    if depth > DEEPEST:
        raise BundleError(f"the network is made of more than {DEEPEST} networks around one another")
    factory = resolve(path, allow=allow)
    inner = {
        name: _build(value["build"], value["arguments"], allow, depth + 1)
        for name, value in arguments.items()
        if isinstance(value, Mapping) and set(value) == {"build", "arguments"}
    }
    if path not in allow:
        _check_arguments(path, factory, {**arguments, **inner})
    try:
        model = factory(**{**arguments, **inner})
    except TorchfolioError:
        raise
    except Exception as error:  # of arguments that nobody foresaw, in as many ways as there are builders
        kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
        shown = _shown(dict(arguments))
        raise BundleError(f"{path} cannot be built with the arguments {shown}: {kind}{error}") from error
    if not isinstance(model, nn.Module):
        raise BundleError(f"{path} gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _check_arguments(path: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Check arguments against the annotations of a builder: text where it counts, say, could do anything there."""
    known = _parameters(factory)
    for name, value in arguments.items():
        if name not in known:
            raise BundleError(f"{path} has no argument {_shown(name)}")
        if not _is_a(value, known[name].annotation):
            expected = str(known[name].annotation).replace("typing.", "").replace("collections.abc.", "")
            raise BundleError(f"{path} cannot be built with {name}={_shown(value)}, expected {expected}")


@cache
def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a builder takes by name; one that passes `**kwargs` on takes what the class takes that it returns."""
    signature = inspect.signature(factory, eval_str=True)
    known = dict(signature.parameters)
    if any(p.kind is p.VAR_KEYWORD for p in known.values()) and inspect.isclass(signature.return_annotation):
        known |= inspect.signature(signature.return_annotation, eval_str=True).parameters
    return {name: p for name, p in known.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _is_a(value: Any, annotation: Any) -> bool:
    """Whether a JSON value, or a network, is of an annotated type. Of types that JSON does not have nothing is."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, part) for part in parts)
    if origin is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, Sequence):
        many = isinstance(value, list | tuple) and len(value) <= MOST_MODULES
        return many and all(_is_a(part, parts[0]) for part in value)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    if annotation in (str, bool) or (inspect.isclass(annotation) and issubclass(annotation, nn.Module)):
        return isinstance(value, annotation)
    return False


class _TooLarge(ValueError):
    """A module is larger than its weights can be."""


class _Count:
    """Elements and modules of what is being built, against their limits."""

    def __init__(self, limit: int) -> None:
        self.limit, self.elements, self.modules, self.operations = limit, 0, 0, 0

    def tensor(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        self.elements += 0 if value is None else value.numel()
        self.check(self.elements)

    def module(self, parent: nn.Module, name: str, value: nn.Module | None) -> None:
        self.modules += 1
        if self.modules > MOST_MODULES:
            raise _TooLarge(f"it has more than {MOST_MODULES} modules")

    def operation(self) -> None:
        self.operations += 1
        if self.operations > 3 * MOST_MODULES:
            raise _TooLarge(f"its construction takes more than {3 * MOST_MODULES} operations")

    def check(self, elements: int) -> None:
        if elements > self.limit:
            raise _TooLarge(f"it needs at least {elements} numbers, more than its file of weights can hold")


@contextmanager
def _bounded_registration(limit: int) -> Iterator[None]:
    """Raise `_TooLarge` as soon as modules have registered more than they may."""
    count = _Count(limit)
    handles = [
        registration.register_module_parameter_registration_hook(count.tensor),  # pyright: ignore[reportArgumentType]
        registration.register_module_buffer_registration_hook(count.tensor),  # pyright: ignore[reportArgumentType]
        registration.register_module_module_registration_hook(count.module),  # pyright: ignore[reportArgumentType]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Bounded(TorchDispatchMode):
    """`_bounded_registration`, no tensor larger than the limit, and an end to building."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.count, self.registration = _Count(limit), _bounded_registration(limit)

    def __enter__(self) -> _Bounded:
        self.registration.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.registration.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count.operation()
        if isinstance(result, Tensor):
            self.count.check(result.numel())
        return result


@cache
def builders() -> frozenset[str]:
    """The import paths that a bundle may name: the reference networks, and what papers offer as `builders`."""
    own = [f"torchfolio.models:{name}" for name in models.BUILDERS]
    ready = [paper for paper in catalog.papers().values() if paper.is_in]
    offered = [(paper.module, name) for paper in ready for name in paper.offers.get("builders", ())]
    return frozenset([*own, *(name if ":" in name else f"{module}:{name}" for module, name in offered)])


def resolve(path: str, *, allow: Sequence[str] = ()) -> Any:
    """The class or factory behind an import path, if it may be imported. See `build`."""
    if not _is_path(path):
        raise BundleError(f"expected an import path of the form package.module:name, got {_shown(path)}")
    if path not in allow and path not in builders():
        ours = path.startswith(("torchfolio.", "torchfolio:"))
        what = "is not a network that a bundle may name" if ours else "is not part of torchfolio"
        raise BundleError(f"{path} {what}; if you trust it, allow it by name: --allow {path}")
    module_name, _, name = path.partition(":")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise BundleError(f"cannot import {path}: {error}") from error
    if not callable(target):
        raise BundleError(f"{path} is a {type(target).__name__}, expected a class or factory of a torch.nn.Module")
    return target


# The manifest

_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def _is_path(value: Any) -> bool:
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
    size = value.get("image_size")
    return size is None or _is_size(size)


def _are_arguments(value: Any) -> bool:
    if not isinstance(value, dict) or not all(key.isidentifier() for key in value) or not _is_finite(value):
        return False
    networks = [part for part in value.values() if isinstance(part, dict) and set(part) == {"build", "arguments"}]
    return all(_is_path(part["build"]) and _are_arguments(part["arguments"]) for part in networks)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _list_of(check: Callable[[Any], bool], most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= most and all(check(part) for part in value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "build": (_is_path, "an import path package.module:name"),
    "arguments": (_are_arguments, "arguments by name, with finite numbers"),
    "input_shape": (_list_of(_is_size, 8), "up to 8 positive whole numbers"),
    "classes": (_list_of(_is_text, 1_000_000), "a list of names"),
    "mean": (_list_of(_is_number, 1_000_000), "a list of finite numbers"),
    "std": (_list_of(lambda v: _is_number(v) and v > 0, 1_000_000), "a list of positive finite numbers"),
    "training": (_is_record, "a record with finite numbers, image_size a positive whole one"),
    "tied": (lambda v: isinstance(v, dict) and all(map(_is_text, v.values())), "names by name"),
    "format": (lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    "version": (lambda v: isinstance(v, str) and 0 < len(v) <= 100, "a version of torchfolio"),
    "weights_sha256": (_is_hash, "a SHA-256 sum"),
    "digest": (_is_hash, "a SHA-256 sum"),
}
"""What each field of `bundle.json` must be, and in words."""


def _check_manifest(body: Any, where: str) -> None:
    if not isinstance(body, dict) or set(body) != set(_FIELDS):
        odd = sorted(set(_FIELDS) ^ set(body)) if isinstance(body, dict) else ["the whole"]
        raise BundleError(f"{where} does not have the fields of a bundle: {', '.join(map(_shown, odd[:5]))}")
    for name, (check, expected) in _FIELDS.items():
        if not check(body[name]):
            raise BundleError(f"{where}: {name} is {_shown(body[name])}, expected {expected}")
    channels = len(body["mean"])
    if channels != len(body["std"]):
        raise BundleError(f"{where}: mean has {channels} numbers and std {len(body['std'])}, expected as many")
    if body["input_shape"] and channels > 1 and channels != body["input_shape"][0]:
        raise BundleError(f"{where}: mean has {channels} numbers for inputs of shape {body['input_shape']}")


def _read_manifest(folder: Path) -> tuple[Manifest, str]:
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
        raise BundleError(f"{path} has format {_shown(body['format'])}, expected {FORMAT}")
    _check_manifest(body, str(path))
    if body["digest"] != _digest(body):
        raise BundleError(f"{path} was changed after it was written (its digest differs)")
    for name in ("input_shape", "classes", "mean", "std"):
        body[name] = tuple(body[name])
    return Manifest(**{f.name: body[f.name] for f in fields(Manifest)}), body["weights_sha256"]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


# The files

PICKLES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".joblib", ".dill"}


def _unshared(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors to store, each once, and the other names of those that go by several."""
    stored: dict[str, Tensor] = {}
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


def _check_finite(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuse NaN anywhere, and infinity in parameters; a buffer may hold it, as masks of attention do."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        if bool(tensor.isnan().any()) or (name in parameters and not bool(tensor.isfinite().all())):
            raise BundleError(f"the weights hold numbers that are not finite, first in {name}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(body: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "digest"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)


def _old(folder: Path) -> Path:
    """Where the earlier bundle stands for the moment in which another takes its place."""
    return folder.absolute().parent / f".{folder.absolute().name}.old"


def _recover(folder: Path) -> None:
    """Clear up after writers that died: put the earlier bundle back, remove what never became one."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for left in folder.absolute().parent.glob(f".{glob.escape(folder.absolute().name)}.new-*"):
        with held(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    if old.exists() and folder.exists():
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder beside another, to be moved in its place; held by this process as long as it is written."""
    place = Path(tempfile.mkdtemp(prefix=f".{folder.absolute().name}.new-", dir=folder.absolute().parent))
    try:
        with held(place):
            yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _publish(scratch: Path) -> None:
    """Bring the files to the disk, as readable as any file that the user writes."""
    mode = (scratch / MANIFEST).stat().st_mode & 0o666
    (scratch / WEIGHTS).chmod(mode)
    scratch.chmod(mode | 0o700 | (mode & 0o444) >> 2)
    for path in (scratch / WEIGHTS, scratch / MANIFEST, scratch):
        sync(path)


def _swap(scratch: Path, folder: Path) -> None:
    """Put a finished folder in place, moving an earlier one out of the way first."""
    old = _old(folder)
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
