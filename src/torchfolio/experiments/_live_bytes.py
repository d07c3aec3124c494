"""Peak memory of a chain of layers: as its circuit diagram says, and as it is when run without gradients."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchfolio.diagrams import draw


class _Live(TorchDispatchMode):
    """Bytes of an input and of the results that are alive, and their peak; views and weights do not count."""

    def __init__(self, x: Tensor, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = x.nbytes
        self.known = {t.untyped_storage()._cdata for t in (x, *weights)}
        weakref.finalize(x, self._gone, x.nbytes, x.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.known:
            storage = made.untyped_storage()
            size, key = storage.nbytes(), storage._cdata
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(made, self._gone, size, key)
        return made

    def _gone(self, size: int, key: int) -> None:
        self.now -= size
        self.known.discard(key)


def working_memory() -> dict[str, float]:
    """Peak of a chain of layers, as read and as it is."""
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 200), nn.Tanh(), nn.Linear(200, 10))
    weights = [p.detach() for p in net.parameters()]
    x = torch.rand(32, 64)
    with torch.no_grad(), _Live(x, weights) as live:
        y = nn.functional.linear(x, weights[0], weights[1])
        del x
        y = torch.relu(y)
        y = nn.functional.linear(y, weights[2], weights[3])
        y = torch.tanh(y)
        y = nn.functional.linear(y, weights[4], weights[5])
    return {
        "memory_read": 4.0 * draw(net, torch.rand(32, 64)).cost().working_peak(),
        "memory_measured": float(live.peak),
    }
