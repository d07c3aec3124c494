"""Networks inside the wrappers of compilation and of several devices, and their own names of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

from torch import nn

__all__ = ["own_names", "unwrapped"]

T = TypeVar("T")


def unwrapped(model: nn.Module) -> nn.Module:
    """The network that `torch.compile`, `nn.DataParallel` or `DistributedDataParallel` is wrapped around, or itself."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def own_names(state: Mapping[str, T], known: Collection[str]) -> dict[str, T]:
    """Entries of a state dict without the names that wrappers put before every other.

    Args:
        state: entries by name.
        known: names that the network has itself.
    """
    entries = dict(state)
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if entries and all(n.startswith(prefix) for n in entries) and not any(n.startswith(prefix) for n in known):
            entries = {name.removeprefix(prefix): value for name, value in entries.items()}
    return entries
