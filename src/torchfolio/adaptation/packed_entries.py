"""A few entries of many parameters, packed into one vector, and what makes sure that the others do not change."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.shown import Shown

__all__ = ["PackedEntries", "bits_outside", "check_parameters", "digest", "write_entries"]


class PackedEntries(Shown):
    """The trained entries of one parameter: flat positions, and where they lie in the packed vectors."""

    def __init__(self, name: str, param: nn.Parameter, index: Tensor) -> None:
        self.name, self.param, self.index = name, param, index
        self.part = slice(0, 0)
        self.handle: Any = None

    def values(self) -> Tensor:
        return self.param.detach().reshape(-1).index_select(0, self.index)

    def write(self, values: Tensor) -> None:
        """Set them from the packed vector."""
        data, values = self.param.data, values[self.part].to(self.param.dtype)
        if data.is_contiguous():
            data.view(-1).index_copy_(0, self.index.long(), values)
        else:
            flat = data.reshape(-1).index_copy(0, self.index.long(), values)
            data.copy_(flat.view(data.shape))


def check_parameters(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse what cannot be packed.

    Raises:
        TypeError: if there are other things than parameters.
        ValueError: if there is none, one is not real, or another optimizer takes its gradients.
    """
    if not named:
        raise ValueError("expected a network with parameters, got none")
    for name, p in named:
        if not isinstance(p, nn.Parameter):
            raise TypeError(f"expected parameters by name, got {type(p).__name__} for {name!r}")
        if not p.is_floating_point():
            raise ValueError(f"expected real floating-point parameters, got {p.dtype} in {name}")
        if getattr(p, "_post_accumulate_grad_hooks", None):
            raise ValueError(f"another optimizer takes the gradients of {name}: release it first")


def bits_outside(param: Tensor, index: Tensor | None) -> int:
    """A checksum of the entries of a parameter that are not among some, exact in their bits."""
    flat = param.detach().reshape(-1)
    bits = flat.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    total = int(bits.sum(dtype=torch.int64))
    if index is not None:
        total -= int(bits.index_select(0, index).sum(dtype=torch.int64))
    return total % 2**64


def digest(index: Mapping[str, Tensor]) -> str:
    """Fingerprint of positions by parameter."""
    total = sha256()
    for name in sorted(index):
        total.update(f"{name} {len(index[name])} ".encode())
        total.update(index[name].cpu().long().numpy().tobytes())
    return total.hexdigest()


@torch.no_grad()
def write_entries(named: Mapping[str, nn.Parameter], index: Mapping[str, Tensor], delta: Mapping[str, Tensor]) -> None:
    """Write values of some entries into parameters, by name.

    Raises:
        ValueError: if they are of other entries.
    """
    if set(delta) != set(index) or any(len(delta[name]) != len(index[name]) for name in delta):
        raise ValueError("the difference is of another mask than this one")
    for name, value in delta.items():
        p = named[name]
        flat = p.data.reshape(-1).index_copy(0, index[name].long(), value.to(p.data))
        p.data.copy_(flat.view(p.shape))
