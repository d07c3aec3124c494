"""Devices by name, and whether they are there."""

from __future__ import annotations

import torch

__all__ = ["check_device", "resolve_device"]


def resolve_device(device: str | torch.device) -> torch.device:
    """A device by name; `"auto"` takes an accelerator if there is one.

    Raises:
        ValueError: if there is no such device.
    """
    if str(device) != "auto":
        return check_device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def check_device(device: str | torch.device) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: naming those that are, if it is not.
    """
    if str(device) == "auto":
        return resolve_device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    here = ["cpu"] + ([] if accelerator is None else [accelerator.type])
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"expected device to be auto, {', '.join(here)}, got {device!r}") from None
    if place.type in ("cpu", "meta"):
        return place
    part = getattr(torch, place.type, None)
    count = part.device_count() if place.type in here and part is not None else 0
    if place.type not in here or (place.index or 0) >= max(count, 1):
        raise ValueError(f"there is no device {str(device)!r} here; expected device to be auto, {', '.join(here)}")
    return place
