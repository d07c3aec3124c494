"""What a method that judges a network is handed: a copy of it, and clean examples that were checked."""

from __future__ import annotations

import copy
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio import checks
from torchfolio.measure.batches import gathered
from torchfolio.models.device import device_of

__all__ = ["Pair", "checked_classes", "collected", "device_of", "fingerprint", "finite_rows", "private"]

Pair = tuple[Tensor, Tensor]


def private(model: nn.Module, device: str | torch.device | None) -> nn.Module:
    """A copy of a network that a method may do anything to: in evaluation mode, its parameters frozen.

    Raises:
        TypeError: if it is none.
        ValueError: if it holds NaN.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a network, got {type(model).__name__}")
    checks.network(model)
    net = copy.deepcopy(model).eval().requires_grad_(False)
    return net if device is None else net.to(device)


def finite_rows(x: Tensor) -> Tensor:
    """Which inputs `[N, ...]` hold neither NaN nor infinity, bool `[N]`."""
    if not (x.is_floating_point() or x.is_complex()):
        return torch.ones(len(x), dtype=torch.bool, device=x.device)
    # NaN and infinity survive a sum of magnitudes in float64.
    return x.flatten(1).abs().sum(1, dtype=torch.float64).isfinite() if x.dim() > 1 else x.isfinite()


def collected(clean: Any) -> Pair:
    """All clean examples as two tensors on the CPU.

    Raises:
        ValueError: if labels are not integers `[N]`, or inputs hold NaN.
    """
    x, y = gathered(clean, "cpu")
    if y.is_floating_point() or y.dim() != 1:
        raise ValueError(f"expected integer labels [N], got {y.dtype} of shape {tuple(y.shape)}")
    if not bool(finite_rows(x).all()):
        raise ValueError("the clean examples hold NaN or infinite values")
    return x, y


def checked_classes(outputs: Tensor, y: Tensor) -> int:
    """Number of classes of a network with such outputs, whose labels are `y`."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(f"expected logits [N, C] of at least 2 classes, got shape {tuple(outputs.shape)}")
    classes = outputs.shape[1]
    if int(y.min()) < 0 or int(y.max()) >= classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    if len(y.unique()) < 2:
        raise ValueError(f"expected examples of at least two classes, got class {int(y[0])} alone")
    return classes


def fingerprint(model: nn.Module) -> str:
    """A digest of a network's state dict."""
    digest = sha256()
    for name, value in model.state_dict().items():
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
