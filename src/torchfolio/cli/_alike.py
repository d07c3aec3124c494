"""Whether networks on disk are of one kind, so that equal entries of their weights mean equal things."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfolio.errors import TorchfolioError
from torchfolio.json_text import plain

if TYPE_CHECKING:
    from torchfolio.bundle import Manifest


def check_alike(
    manifests: Sequence[Manifest], names: Sequence[Path], networks: int, keep: bool, allow: Sequence[str]
) -> None:
    """That equal entries mean equal things: one module, one preparation of inputs, one order of classes.

    Args:
        manifests: those of the networks, then that of the base where there is one; its classes may be others.
        names: their folders.
        networks: number of networks.
        keep: whether each keeps its own head, and so its classes and its width.
        allow: import paths that they may use.
    """
    from torchfolio.bundle.manifest import shown

    first = manifests[0]
    for i, (own, name) in enumerate(zip(manifests, names, strict=True)):
        pairs = [
            ("is built by", own.build, first.build),
            ("takes inputs of shape", tuple(own.input_shape), tuple(first.input_shape)),
            ("normalises its inputs by", (*own.mean, *own.std), (*first.mean, *first.std)),
        ]
        if own.build == first.build:
            known, expected = (_arguments(manifest, keep, allow) for manifest in (own, first))
            pairs += [(f"is built with {key}", known.get(key), expected.get(key)) for key in {**known, **expected}]
        if not keep and i < networks:
            pairs.append(("tells apart", own.classes, first.classes))
        for what, got, wanted in pairs:
            if got != wanted:
                got, wanted = shown(got), shown(wanted)
                raise TorchfolioError(f"{name} is not of the same kind as {names[0]}: it {what} {got}, not {wanted}")


def _arguments(manifest: Manifest, keep: bool, allow: Sequence[str]) -> dict[str, Any]:
    """What its entries mean, by what it is built with; without the number of its classes where each keeps its own."""
    from torchfolio.bundle import resolve

    parameters = inspect.signature(resolve(manifest.build, allow=allow)).parameters
    defaults = {name: plain(p.default) for name, p in parameters.items() if p.default is not p.empty}
    known = {**defaults, **plain(manifest.arguments)}
    # Dropout is over once a network is trained, and changes no entry's meaning.
    return {k: v for k, v in known.items() if "drop" not in k and not (keep and v == len(manifest.classes))}
