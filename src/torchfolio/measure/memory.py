"""Memory that a computation holds for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


@dataclass(frozen=True)
class SavedBytes:
    """Bytes saved for backward: the most held at one time, and all that was ever saved."""

    peak: int
    total: int


class _Held:
    """What autograd holds in the place of a saved tensor; its death says that the graph was freed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Meter:
    def __init__(self, excluded: set[int]) -> None:
        self.excluded = excluded
        self.holders: dict[int, int] = {}
        self.live = self.peak = self.total = 0

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor.detach())
        storage = tensor.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        if size and key not in self.excluded:
            if self.holders.get(key, 0) == 0:
                self.live += size
                self.total += size
                self.peak = max(self.peak, self.live)
            self.holders[key] = self.holders.get(key, 0) + 1
            weakref.finalize(held, self.release, key, size)
        return held

    def release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            self.live -= size


def saved_bytes(fn: Callable[[], object], *, exclude: nn.Module | Iterable[Tensor] = ()) -> SavedBytes:
    """Measure the tensors that autograd saves while `fn` runs.

    Counts storages, each once however many operations save it, from when the first graph node saves it until the
    last one that did is freed. It works on every device and counts what a training step must hold beyond weights.

    Args:
        fn: runs forward, and backward where that belongs to it. A graph that outlives the call counts to the end.
        exclude: a module whose parameters and buffers are not counted, or tensors that are not.

    Returns:
        Peak and total in bytes.
    """
    tensors = [*exclude.parameters(), *exclude.buffers()] if isinstance(exclude, nn.Module) else list(exclude)
    meter = _Meter({t.untyped_storage().data_ptr() for t in tensors})
    with torch.enable_grad(), saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        result = fn()
    peak = SavedBytes(meter.peak, meter.total)
    del result
    return peak
