"""A network read from disk: its module is built, and its weights are compared entry by entry."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from torchfolio.bundle.building import build, check_finite, outline
from torchfolio.bundle.folder import old_of
from torchfolio.bundle.manifest import (
    MANIFEST,
    WEIGHTS,
    BundleError,
    Manifest,
    read_manifest,
    sha256,
    shown,
)
from torchfolio.engine.modes import undisturbed
from torchfolio.shown import Shown

__all__ = ["Bundle", "Outline", "load_bundle", "outline_bundle"]


@dataclass(frozen=True, repr=False)
class Bundle(Shown):
    """A network read from disk: the module, in evaluation mode, and its manifest."""

    model: nn.Module
    manifest: Manifest


@dataclass(frozen=True, repr=False)
class Outline(Bundle):
    """A network that stays on disk: the module on the meta device, its manifest, and the file of its weights."""

    weights: Path


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
    with undisturbed():  # what the builder draws is overwritten
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
    check_finite(model, state)
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
