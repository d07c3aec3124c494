"""From static inputs to sequences: `[B, ...]` to `[T, B, ...]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Encode", "encode_input", "frames", "latency", "poisson", "repeat"]

Encode = Literal["repeat", "poisson", "latency", "frames"] | Callable[[Tensor, int], Tensor] | None
"""Name of an encoder, a function `(x, timesteps) -> sequence`, or `None` for sequences."""


def repeat(x: Tensor, timesteps: int) -> Tensor:
    """The same analogue input at every step (direct coding); the first layer becomes the encoder.

    Args:
        x: `[B, ...]`.
        timesteps: $T \\ge 1$.

    Returns:
        A view `[T, B, ...]` that takes no memory.
    """
    _check_timesteps(timesteps)
    return x.expand(timesteps, *x.shape)


def poisson(x: Tensor, timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """Independent spikes with probability `x` at every step.

    Args:
        x: rates in [0, 1], `[B, ...]`.
        timesteps: $T \\ge 1$.
        generator: source of spikes on the device of `x`; torch's global one by default.

    Returns:
        Zeros and ones `[T, B, ...]`.

    Raises:
        ValueError: if `x` leaves [0, 1].
    """
    _check_timesteps(timesteps)
    _check_unit(x, "poisson")
    noise = torch.rand((timesteps, *x.shape), dtype=x.dtype, device=x.device, generator=generator)
    return (noise < x).to(x.dtype)


def latency(x: Tensor, timesteps: int) -> Tensor:
    """One spike for every element, the earlier the brighter: 1 at the first step, 0 at the last.

    Args:
        x: inputs in [0, 1], `[B, ...]`.
        timesteps: $T \\ge 1$.

    Returns:
        Zeros and ones `[T, B, ...]` with exactly one 1 along the first axis.

    Raises:
        ValueError: if `x` leaves [0, 1].
    """
    _check_timesteps(timesteps)
    _check_unit(x, "latency")
    when = ((1 - x) * (timesteps - 1)).round().long()
    steps = torch.arange(timesteps, device=x.device).view(-1, *[1] * x.dim())
    return (steps == when).to(x.dtype)


def frames(x: Tensor, timesteps: int) -> Tensor:
    """Recordings with examples first, as data sets hold them: `[B, T, ...]` to `[T, B, ...]`.

    Raises:
        ValueError: if the second axis is not `timesteps` long.
    """
    if x.dim() < 2 or x.shape[1] != timesteps:
        raise ValueError(f"expected recordings [B, {timesteps}, ...], got {tuple(x.shape)}")
    return x.movedim(1, 0)


def encode_input(x: Tensor, timesteps: int, encode: Encode, generator: torch.Generator | None = None) -> Tensor:
    """A sequence of `timesteps` steps from `x`.

    Args:
        x: `[B, ...]`, or `[T, B, ...]` with `encode=None`.
        timesteps: $T \\ge 1$.
        encode: `"repeat"`, `"poisson"`, `"latency"`, `"frames"`, a callable `(x, timesteps) -> [T, B, ...]`, or `None`
            for inputs that begin with a time axis.
        generator: source of the spikes of `"poisson"`.

    Raises:
        ValueError: if the name is unknown or the sequence is not `timesteps` long.
    """
    check_encode(encode)
    if encode == "poisson":
        return poisson(x, timesteps, generator)
    if isinstance(encode, str):
        return NAMED[encode](x, timesteps)
    sequence = x if encode is None else encode(x, timesteps)
    if len(sequence) != timesteps:
        raise ValueError(f"expected a sequence [T, B, ...] of {timesteps} steps, got shape {tuple(sequence.shape)}")
    return sequence


NAMED: dict[str, Callable[..., Tensor]] = {"repeat": repeat, "poisson": poisson, "latency": latency, "frames": frames}


def check_encode(encode: Encode) -> None:
    """Refuse what is no way to encode.

    Raises:
        ValueError: naming those that there are.
    """
    if not (encode is None or callable(encode) or (isinstance(encode, str) and encode in NAMED)):
        known = ", ".join(map(repr, NAMED))
        raise ValueError(f"expected encode to be {known}, callable or None, got {encode!r}")


def _check_timesteps(timesteps: int) -> None:
    if timesteps < 1:
        raise ValueError(f"expected at least one time step, got {timesteps}")


def _check_unit(x: Tensor, name: str) -> None:
    low, high = (float(v) for v in x.aminmax()) if x.numel() else (0.0, 0.0)
    if low < 0 or high > 1:
        raise ValueError(f"{name} coding expects inputs in [0, 1], got {low:g} to {high:g}")
