"""A network written to disk or sent to the hub, with what it takes to build it again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from torchfolio import __version__
from torchfolio.bundle.building import build, builders, check_finite, outline
from torchfolio.bundle.folder import check_folder, publish, recover, scratch_beside, swap, write
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
from torchfolio.engine.modes import evaluating, undisturbed
from torchfolio.json_text import plain
from torchfolio.models.chain import recipe_of
from torchfolio.models.wrappers import unwrapped

__all__ = ["describe", "push_bundle", "save_bundle", "write_bundle"]


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
        model: network; its parameters and buffers are stored. Of one that is compiled or wrapped for several devices,
            the network inside.
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
        BundleError: if the manifest could not be read back or builds another network, weights are not finite, or
            `folder` exists and is no bundle.
    """
    check_folder(Path(folder))
    model = unwrapped(model)
    if odd := [n for n in notes or () if Path(n).name != n or Path(n).suffix in PICKLES or n in (WEIGHTS, MANIFEST)]:
        raise BundleError(f"expected notes to be named by plain file names of their own, got {odd[0]!r}")
    if manifest is None:
        manifest = describe(model, example)
    else:
        _check_recipe(manifest, model)
    stored, tied = _unshared(model)
    check_finite(model, stored)
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
    body = _as_json(body)
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


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as they will be read back."""
    try:
        return json.loads(json.dumps(values, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise BundleError(f"the manifest cannot be written as JSON: {error}") from error


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
    with undisturbed():
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


def _check_recipe(manifest: Manifest, model: nn.Module) -> None:
    """Refuse a manifest whose network does not take the weights; builders that are not known are not called.

    Raises:
        BundleError: at the first entry that one of the two lacks or that differs in shape.
    """
    arguments = _as_json(manifest.arguments)
    if not _is_known(manifest.build, arguments):
        return
    state: dict[str, Tensor] = model.state_dict()
    limit = 64 * sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, Tensor)) + 2**20
    with undisturbed():
        built = outline(manifest.build, arguments, limit=limit) or build(manifest.build, arguments)
    there, here = ({n: tuple(v.shape) for n, v in s.items()} for s in (built.state_dict(), state))
    odd = next((name for name in [*there, *here] if there.get(name) != here.get(name)), None)
    if odd is not None:
        raise BundleError(
            f"the manifest builds another network by {manifest.build}: {odd} is {there.get(odd, 'not there')} in it and "
            f"{here.get(odd, 'not there')} in the network; a network that was converted or packed needs the recipe of that"
        )


def _is_known(path: str, arguments: Mapping[str, Any]) -> bool:
    """Whether a network, and those within it, are built by known builders alone."""
    inner = [v for v in arguments.values() if isinstance(v, Mapping) and set(v) == {"build", "arguments"}]
    return path in builders() and all(_is_known(part["build"], part["arguments"]) for part in inner)


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
