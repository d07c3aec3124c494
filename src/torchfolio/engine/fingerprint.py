"""What must not change between the runs of one training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.objectives import Objective
from torchfolio.engine.rules import LearningRule

Plain = bool | int | float | str


def settings_of(value: Any) -> dict[str, Any]:
    """The arguments of an object that it keeps under their own names, where they are plain values.

    Rules and objectives among them, which a rule may be put on, count with their own arguments.
    """
    try:
        names = inspect.signature(type(value).__init__).parameters
    except (TypeError, ValueError):
        return {}
    values = {name: getattr(value, name, None) for name in names}
    settings = {name: setting for name, setting in values.items() if is_plain(setting)}
    for name, part in values.items():
        if isinstance(part, LearningRule | Objective):
            settings |= {name: type(part).__name__, **{f"{name}.{k}": v for k, v in settings_of(part).items()}}
    return settings


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
    entries: dict[str, Any] = {**others, **{f"rule.{k}": v for k, v in rule.items()}}
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
        if _untupled(then) != _untupled(here):
            raise ValueError(
                f"the checkpoint in {folder} was made with {name} {then!r}, now it is {here!r}; give the "
                "same, or resume=False to start over"
            )


def _untupled(value: Any) -> Any:
    return [_untupled(v) for v in value] if isinstance(value, tuple | list) else value
