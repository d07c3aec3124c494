"""Optimizers and schedules by name, as `fit` takes them.

Every function returns a factory. One of a schedule has a parameter `total_steps`, which `fit` fills in, so that nobody
counts batches: `fit(net, train, optimizer=sgd(0.1), scheduler=one_cycle(0.1), epochs=8)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

__all__ = ["adam", "adamw", "cosine", "one_cycle", "sgd"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def sgd(lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0, nesterov: bool = True) -> OptimizerFactory:
    """Stochastic gradient descent, with Nesterov momentum where there is momentum."""
    return partial(SGD, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0)


def adam(lr: float = 1e-3, **arguments: Any) -> OptimizerFactory:
    """Adam; `arguments` are those of `torch.optim.Adam`."""
    return partial(Adam, lr=lr, **arguments)


def adamw(lr: float = 1e-3, weight_decay: float = 0.01, **arguments: Any) -> OptimizerFactory:
    """Adam with decoupled weight decay; `arguments` are those of `torch.optim.AdamW`."""
    return partial(AdamW, lr=lr, weight_decay=weight_decay, **arguments)


def one_cycle(max_lr: float | None = None, **arguments: Any) -> Callable[..., LRScheduler]:
    """One cycle up to a rate and down to nearly zero; momentum stays.

    Args:
        max_lr: peak of the learning rate; the optimizer's own by default, group by group.
        **arguments: arguments of `torch.optim.lr_scheduler.OneCycleLR`.
    """
    return partial(_one_cycle, max_lr=max_lr, arguments=arguments)


def _one_cycle(
    optimizer: Optimizer, total_steps: int, *, max_lr: float | None, arguments: dict[str, Any]
) -> LRScheduler:
    peak = max_lr if max_lr is not None else [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peak, total_steps=total_steps, **{"cycle_momentum": False, **arguments})


def cosine(warmup: int = 0, min_lr: float = 0.0) -> Callable[..., LRScheduler]:
    """Half a cosine from the optimizer's rate to `min_lr`, after a linear rise over `warmup` steps."""
    return partial(_cosine, warmup=warmup, min_lr=min_lr)


def _cosine(optimizer: Optimizer, total_steps: int, *, warmup: int, min_lr: float) -> LRScheduler:
    rest = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup), eta_min=min_lr)
    if not warmup:
        return rest
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, rest], milestones=[warmup])
