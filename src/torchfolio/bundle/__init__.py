"""A network on disk: safe weights beside a description of how to build the module.

A bundle is a folder with two files: `model.safetensors`, and `bundle.json`, which holds an import path and its
arguments, what the network takes and tells apart, and the record of its training. A bundle may come from a stranger:
nothing in it is ever unpickled, and it can name no other builders than the reference networks
(`torchfolio.models.BUILDERS`), those that papers offer (`builders` in `papers/SLUG.toml`) and those that the reader
allows by name. A builder evaluates no text, imports nothing by name and opens no path.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchfolio import __version__
from torchfolio.bundle.building import build, builders, outline, resolve
from torchfolio.bundle.folder import check_folder, old_of, publish, recover, scratch_beside, swap, write
from torchfolio.bundle.manifest import (
    FORMAT,
    MANIFEST,
    PICKLES,
    WEIGHTS,
    BundleError,
    Manifest,
    check_manifest,
    digest,
    read_manifest,
    sha256,
    shown,
)
from torchfolio.engine.modes import evaluating
from torchfolio.json_text import plain
from torchfolio.models.chain import recipe_of
from torchfolio.shown import Shown

__all__ = [
    "MANIFEST",
    "WEIGHTS",
    "Bundle",
    "BundleError",
    "Manifest",
    "Outline",
    "build",
    "builders",
    "check_folder",
    "describe",
    "load_bundle",
    "outline_bundle",
    "push_bundle",
    "resolve",
    "save_bundle",
    "write_bundle",
]


@dataclass(frozen=True, repr=False)
class Bundle(Shown):
    """A network read from disk: the module, in evaluation mode, and its manifest."""

    model: nn.Module
    manifest: Manifest


@dataclass(frozen=True, repr=False)
class Outline(Bundle):
    """A network that stays on disk: the module on the meta device, its manifest, and the file of its weights."""

    weights: Path


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
        model: network; its parameters and buffers are stored.
        folder: folder to write to.
        manifest: record of how to build it again. Numbers in `training` that are not finite are stored as `null`.
            Without one it is made of the live network, which must be a reference network or an `nn.Sequential` of
            PyTorch's own layers; one that cannot be built again is refused, and one that was changed since it was
            built.
        example: a batch of inputs `[B, ...]`, for a network without a manifest.
        notes: texts that are kept beside it, by file name; they are never read back.

    Returns:
        The folder.

    Raises:
        BundleError: if the manifest could not be read back, weights are not finite, or `folder` exists and is no
            bundle.
    """
    check_folder(Path(folder))
    if odd := [n for n in notes or () if Path(n).name != n or Path(n).suffix in PICKLES or n in (WEIGHTS, MANIFEST)]:
        raise BundleError(f"expected notes to be named by plain file names of their own, got {odd[0]!r}")
    if manifest is None:
        manifest = describe(model, example)
    stored, tied = _unshared(model)
    _check_finite(model, stored)
    return write_bundle(folder, replace(manifest, tied=tied), lambda path: save_file(stored, path), notes=notes)


def write_bundle(
    folder: str | Path,
    manifest: Manifest,
    fill: Callable[[Path], object],
    *,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a bundle whose weights need not be in memory; see `save_bundle`.

    Args:
        folder: folder to write to.
        manifest: record of how to build the network, names of tied weights included.
        fill: writes the safetensors file, given its path. Weights are not looked at: they must be finite.
        notes: texts that are kept beside it, by file name.

    Returns:
        The folder.
    """
    folder = Path(folder)
    check_folder(folder)
    body = {**asdict(manifest), "training": plain(manifest.training)}
    body |= {"format": FORMAT, "version": __version__, "weights_sha256": ""}
    try:
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    with scratch_beside(folder) as scratch:
        fill(scratch / WEIGHTS)
        body["weights_sha256"] = sha256(scratch / WEIGHTS)
        body["digest"] = digest(body)
        check_manifest(body, "the manifest")
        write(scratch / MANIFEST, json.dumps(body, indent=2, allow_nan=False) + "\n")
        for name, text in (notes or {}).items():
            write(scratch / name, text)
        publish(scratch)
        swap(scratch, folder)
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
        raise BundleError(f"expected example=x, a batch of inputs of the network, got {shown(example)}")
    advice = "give a Manifest with the import path of your own factory"
    try:
        factory, arguments = recipe_of(model)
    except ValueError as error:
        raise BundleError(f"the network cannot be built again from values: {error}; {advice}") from error
    path = f"torchfolio.models:{factory.__name__}"
    manifest = Manifest(path, json.loads(json.dumps(plain(arguments))), tuple(example.shape[1:]))
    again = build(manifest.build, manifest.arguments)
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    if {n: v.shape for n, v in again.state_dict().items()} != {n: v.shape for n, v in state.items()}:
        raise BundleError(f"the network is not the {factory.__name__} that it was built as: it was changed; {advice}")
    again.load_state_dict(state)
    dtype = next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    with torch.no_grad(), evaluating(model):
        expected, rebuilt = model(example).cpu(), again.to(dtype).eval()(example.cpu())
    if rebuilt.shape != expected.shape or not torch.allclose(rebuilt, expected, rtol=1e-3, atol=1e-4):
        raise BundleError(f"the {factory.__name__} built again gives other outputs than the network: {advice}")
    classes = tuple(map(str, range(rebuilt.shape[1]))) if rebuilt.dim() == 2 and rebuilt.shape[1] > 1 else ()
    return replace(manifest, classes=classes)


def load_bundle(folder: str | Path, *, allow: Sequence[str] = (), device: str | torch.device = "cpu") -> Bundle:
    """Read a bundle without running anything it brings.

    Args:
        folder: bundle; or `"hf:owner/name"`, one of the Hugging Face hub, `"hf:owner/name@revision"`.
        allow: import paths that the bundle may name besides the known builders, as `"package.module:name"`.
        device: device of the weights.

    Raises:
        BundleError: if a file is missing, a stranger or a pickle, if weights or manifest were changed or are not
            finite, or if the import path is not allowed or does not build a module that fits the weights.
    """
    folder, manifest = _located(folder)
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    model = build(manifest.build, manifest.arguments, allow=allow, limit=_largest(folder))
    missing = [source for source in manifest.tied.values() if source not in state]
    if missing:
        raise BundleError(f"{folder / MANIFEST}: tied names {shown(missing[0])}, which {WEIGHTS} does not hold")
    state.update({name: state[source] for name, source in manifest.tied.items()})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise BundleError(f"the weights in {folder} do not fit {manifest.build}: {detail}") from error
    _check_finite(model, state)
    return Bundle(model.to(device).eval(), manifest)


def outline_bundle(folder: str | Path, *, allow: Sequence[str] = ()) -> Outline | None:
    """A bundle whose weights stay on disk; they are not looked at.

    Args:
        folder: bundle, as `load_bundle` takes it.
        allow: import paths that the bundle may name besides the known builders.

    Returns:
        The outline; `None` where the file is not entry by entry what the module holds (of another type, or tied in another
        way), or the module cannot be built without values.

    Raises:
        BundleError: as `load_bundle` does.
    """
    folder, manifest = _located(folder)
    model = outline(manifest.build, manifest.arguments, allow=allow, limit=_largest(folder))
    if model is None:
        return None
    names: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    tied = {name: names[id(value)] for name, value in state.items() if names.setdefault(id(value), name) != name}
    wanted = {name: (value.dtype, value.shape) for name, value in state.items() if name not in tied}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            stored = {}
            for name in file.keys():  # noqa: SIM118
                value = file.get_tensor(name)  # mapped from the file: nothing of it is read
                stored[name] = value.dtype, value.shape
    except SafetensorError as error:
        raise BundleError(f"{folder / WEIGHTS} is not a readable safetensors file: {error}") from error
    same = tied == manifest.tied and wanted == stored
    return Outline(model, manifest, folder / WEIGHTS) if same else None


def push_bundle(folder: str | Path, name: str, *, private: bool = False, message: str | None = None) -> str:
    """Send a bundle to the Hugging Face hub, which must know you (`hf auth login`).

    Args:
        folder: folder of the bundle; of other files only `history.csv` is sent.
        name: `"owner/name"`; made if there is none.
        private: whether a new one is hidden from others.
        message: message of the change.

    Returns:
        Address of the bundle, which `load_bundle("hf:owner/name")` reads.

    Raises:
        BundleError: if the folder is no whole bundle.
        HubError: if the name is none, or the hub refuses.
    """
    from torchfolio.hub import send_bundle

    _, checksum = read_manifest(Path(folder))
    if sha256(Path(folder) / WEIGHTS) != checksum:
        raise BundleError(f"{Path(folder) / WEIGHTS} is not the file that {MANIFEST} was written for: it is not sent")
    return send_bundle(Path(folder), name, (MANIFEST, WEIGHTS, "history.csv"), private=private, message=message)


def _located(folder: str | Path) -> tuple[Path, Manifest]:
    """Where a bundle lies on this machine, and its manifest, which belongs to the weights beside it."""
    if str(folder).startswith("hf:"):
        from torchfolio.hub import fetch_bundle

        folder = fetch_bundle(str(folder), (MANIFEST, WEIGHTS))
    folder = Path(folder)
    if not folder.exists() and (old_of(folder) / MANIFEST).is_file():
        warnings.warn(f"{folder} was being replaced when its writer died; reading the one before", stacklevel=3)
        folder = old_of(folder)
    manifest, checksum = read_manifest(folder)
    if sha256(folder / WEIGHTS) != checksum:
        raise BundleError(f"{folder / WEIGHTS} is not the file that {MANIFEST} was written for (its checksum differs)")
    return folder, manifest


def _largest(folder: Path) -> int:
    """Most elements that the network of a bundle may have."""
    # Packed weights hold a bit for what is built as a float, and a method may convert a network several times.
    return 64 * (folder / WEIGHTS).stat().st_size + 2**20


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
