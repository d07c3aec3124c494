"""What must not change between the runs of one training."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.objectives import Objective
from torchfolio.engine.rules import LearningRule

Plain = bool | int | float | str
LOOKED_AT = 2**24
"""Bytes of the training examples that they are known by, at most."""


def settings_of(value: Any) -> dict[str, Any]:
    """The arguments of an object that it keeps under their own names, as plain values; see `described`.

    Rules and objectives among them, which a rule may be put on, count with their own arguments.
    """
    try:
        names = inspect.signature(type(value).__init__).parameters
    except (TypeError, ValueError):
        return {}
    settings: dict[str, Any] = {}
    for name, part in ((name, getattr(value, name, None)) for name in names):
        if isinstance(part, LearningRule | Objective):
            settings |= {name: type(part).__name__, **{f"{name}.{k}": v for k, v in settings_of(part).items()}}
        elif part is not None:
            settings[name] = described(part)
    return settings


def described(value: Any) -> Any:
    """A plain value as it is; tensors by a digest, functions by their names, other objects by class and arguments."""
    if value is None or is_plain(value):
        return value
    if isinstance(value, Tensor):
        return digest_of([value])
    if isinstance(value, partial):
        return f"{described(value.func)}({_listed({k: described(v) for k, v in value.keywords.items()})})"
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return value.__qualname__  # its module is __main__ where a script is run and another where it is imported
    return f"{type(value).__name__}({_listed(settings_of(value)) if callable(value) else ''})"


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def digest_of(tensors: Sequence[Tensor]) -> str:
    """What tells tensors from others: their shapes and types, and rows of them at equal distances."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
        rows = tensor.detach()[None] if tensor.dim() == 0 else tensor.detach()
        rows = rows[:, None] if rows.dim() == 1 else rows.flatten(1)
        size = rows[:1].numel() * rows.element_size()
        step = max(1, -(-len(rows) * size // LOOKED_AT))
        digest.update(rows[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def fingerprint(
    rule: Mapping[str, Any], optimizer: Optimizer, scheduler: LRScheduler | None, **others: Any
) -> dict[str, Any]:
    """What must not change between the runs of one training, as plain values by name.

    Args:
        rule: `settings_of` the rule before it was prepared, with its class.
        optimizer: fresh.
        scheduler: fresh.
        **others: further settings.
    """
    entries: dict[str, Any] = {**others, **{f"rule.{k}" if k else "rule": v for k, v in rule.items()}}
    entries["optimizer"] = type(optimizer).__name__
    entries |= {f"optimizer.{k}": v for k, v in optimizer.defaults.items() if is_plain(v)}
    if scheduler is not None:
        entries["scheduler"] = type(scheduler).__name__
        entries |= {f"scheduler.{k}": v for k, v in scheduler.state_dict().items() if is_plain(v)}
    return entries


def is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(is_plain(part) for part in value)
    return isinstance(value, Plain)


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Compare the settings of a checkpoint with those of the training that would go on from it.

    Raises:
        ValueError: at the first that differs.
    """
    for name in sorted(set(saved) | set(now)):
        then, here = saved.get(name), now.get(name)
        if name == "threads" and then != here and then and here:
            raise ValueError(
                f"the checkpoint in {folder} was made with {then} thread(s), now there are {here}, which add up in "
                f"another order and end with other bits; go on with OMP_NUM_THREADS={then} in the environment or "
                f"torch.set_num_threads({then}), or start over with resume=False"
            )
        if name == "data" and then != here:
            raise ValueError(
                f"the checkpoint in {folder} is of a training on other examples; give the same, or resume=False to start "
                "over"
            )
        if _untupled(then) != _untupled(here):
            raise ValueError(
                f"the checkpoint in {folder} was made with {name} {then!r}, now it is {here!r}; give the "
                "same, or resume=False to start over"
            )


def _untupled(value: Any) -> Any:
    return [_untupled(v) for v in value] if isinstance(value, tuple | list) else value
