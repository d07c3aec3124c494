"""Memory that a computation holds for its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Autograd calls the innermost hook alone, so ours reports to every meter that is running.
_RUNNING: list[_Meter] = []


@dataclass(frozen=True)
class SavedBytes:
    """Bytes saved for the backward pass.

    Attributes:
        peak: largest number of bytes that was held at one time.
        total: all that was ever saved; a storage that was released and is saved again counts again.
    """

    peak: int
    total: int


class _Held:
    """What autograd holds in place of a saved tensor; its death says that the graph was freed."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Meter:
    """Counts the storages that something holds, each once however many hold it."""

    def __init__(self, excluded: Iterable[Tensor]) -> None:
        # The storages are kept alive: the address of a freed one could be given to an activation.
        self.excluded = {_key(t): t.untyped_storage() for t in excluded}
        self.holders: dict[int, int] = {}
        self.live = self.peak = self.total = 0

    def hold(self, tensor: Tensor, holder: object) -> None:
        """Count the tensor's storage until `holder` dies."""
        key, size = _key(tensor), tensor.untyped_storage().nbytes()
        if key in self.excluded:
            return
        if key not in self.holders:
            self.holders[key] = 0
            self.live += size
            self.total += size
            self.peak = max(self.peak, self.live)
        self.holders[key] += 1
        weakref.finalize(holder, self._release, key, size).atexit = False

    def _release(self, key: int, size: int) -> None:
        self.holders[key] -= 1
        if self.holders[key] == 0:
            del self.holders[key]
            self.live -= size


def _key(tensor: Tensor) -> int:
    # The address of the storage object, not of its data: tensors on the meta device have no data.
    return tensor.untyped_storage()._cdata


def _pack(tensor: Tensor) -> _Held:
    held = _Held(tensor.detach())
    for meter in _RUNNING:
        meter.hold(tensor, held)
    return held


def _unpack(held: _Held) -> Tensor:
    return held.tensor


@contextmanager
def _recomputation_counted() -> Iterator[None]:
    """Let the meters see what non-reentrant checkpointing recomputes and keeps under hooks of its own."""
    module = torch.utils.checkpoint
    original = getattr(module, "_recomputation_hook", None)
    if original is None or len(_RUNNING) > 1:  # an outer measurement has seen to it
        yield
        return

    class Counted(original):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            keep = self.pack_hook

            def pack(tensor: Tensor) -> object:
                for meter in _RUNNING:
                    meter.hold(tensor, tensor.untyped_storage())
                return keep(tensor)

            self.pack_hook = pack

    module._recomputation_hook = Counted  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        module._recomputation_hook = original  # pyright: ignore[reportAttributeAccessIssue]


def saved_bytes(
    fn: Callable[[], object], *, exclude: nn.Module | Tensor | Iterable[nn.Module | Tensor] = ()
) -> SavedBytes:
    """Measure the tensors that autograd saves while `fn` runs.

    A storage counts with its full size, once however many operations save it or views of it, from when the
    first node of a graph saves it until the last node that did is freed. Backward passes free as they go, so
    a rule that runs one for every block shows the peak of one block. It works on every device, the meta
    device included, where a network's memory is measured without computing anything.

    What counts is what must be held from the forward to the backward pass, recomputation under
    `torch.utils.checkpoint` included; gradients, optimizer state and short-lived workspace do not count.
    Tensors that other hooks replace (`torch.autograd.graph.save_on_cpu`) do not count. An input that is a
    slice of a data set holds the whole data set: exclude it, or clone the slice first.

    Args:
        fn: function that runs forward, and backward where that belongs to it. A graph that outlives the call counts to
            the end.
        exclude: modules, whose parameters and buffers are not counted, and tensors that are not (inputs,
            say).

    Returns:
        Peak and total in bytes.

    Raises:
        TypeError: if `exclude` holds something that is neither a module nor a tensor.

    Example:
        >>> layer, x = nn.Linear(8, 8), torch.randn(4, 8)
        >>> saved_bytes(lambda: layer(x).sum().backward(), exclude=layer)  # the input: 4 rows of 8 floats
        SavedBytes(peak=128, total=128)
    """
    meter = _Meter(_tensors([exclude] if isinstance(exclude, nn.Module | Tensor) else exclude))
    _RUNNING.append(meter)
    try:
        with _recomputation_counted(), torch.enable_grad(), saved_tensors_hooks(_pack, _unpack):
            fn()
    finally:
        _RUNNING.remove(meter)
    return SavedBytes(meter.peak, meter.total)


def _tensors(items: Iterable[nn.Module | Tensor]) -> list[Tensor]:
    tensors: list[Tensor] = []
    for item in items:
        if isinstance(item, nn.Module):
            tensors += [*item.parameters(), *item.buffers()]
        elif isinstance(item, Tensor):
            tensors.append(item)
        else:
            raise TypeError(f"expected modules and tensors to exclude, got {type(item).__name__}")
    return tensors
