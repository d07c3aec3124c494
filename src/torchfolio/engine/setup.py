"""What a training needs before its first step: processes, a prepared module, an optimizer."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.checks import check_model, check_row
from torchfolio.engine.devices import check_device
from torchfolio.engine.fabric import import_fabric
from torchfolio.engine.loader import Batches, Data, tensors_of
from torchfolio.engine.loop import place
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.rules import Batch, LearningRule
from torchfolio.engine.scalars import Scalars
from torchfolio.engine.state import Callback, EarlyStopping
from torchfolio.engine.sync import broadcast_module, is_sharded
from torchfolio.engine.training_state import TrainingState

if TYPE_CHECKING:
    from lightning_fabric import Fabric

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[..., LRScheduler]

EXAMPLES = 8  # of tensors in memory, for the batch that rules see before training


def launch(given: Fabric | None, device: str | torch.device, precision: Any) -> Fabric:
    """The user's Fabric or one for this device and precision, with its processes started.

    Raises:
        ValueError: on a strategy that wraps the module, or on a device that is absent.
    """
    # Imported when it is needed: it takes longer to import than torch.
    import_fabric()
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

    if given is None:
        given = make_fabric(device, precision)
    if not isinstance(given.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
        raise ValueError(
            f"{type(given.strategy).__name__} wraps the module, which learning rules cannot see through; "
            "expected a single device, 'ddp', or a ModelParallelStrategy that applies fully_shard"
        )
    if not getattr(given, "_launched", False):
        given.launch()
    return given


_FABRICS: dict[tuple[str, str], Any] = {}


def make_fabric(device: str | torch.device = "auto", precision: Any = "32-true", loggers: Sequence[Any] = ()) -> Fabric:
    """A Fabric for one device, or for the processes that `torchrun` started.

    The same one for equal arguments, since making one looks through all installed packages; one with state of its own
    (loggers, several processes, the loss scale of 16 bits) is made anew.

    Args:
        device: name such as `"auto"`, `"cpu"`, `"cuda:1"`.
        precision: Fabric's precision, such as `"bf16-mixed"`.
        loggers: loggers of Fabric.

    Raises:
        ValueError: on a device that this machine does not have.
    """
    import_fabric()
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import SingleDeviceStrategy

    device = str(device)
    # Fabric wants the kind of device and the indices apart.
    accelerator, _, index = device.partition(":")
    options: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "loggers": [*loggers]}
    options["devices"] = [int(index)] if index and accelerator != "cpu" else 1
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic and options["devices"] == 1:
        options["devices"] = int(os.environ["LOCAL_WORLD_SIZE"])
        options["num_nodes"] = int(os.environ.get("GROUP_WORLD_SIZE", 1))
    shared = isinstance(precision, str) and precision != "16-mixed" and not elastic and not loggers
    if shared and (device, precision) in _FABRICS:
        return _FABRICS[device, precision]
    if accelerator not in ("gpu", "tpu"):  # Fabric's own names
        check_device(device)
    fabric = Fabric(**options)
    if shared and isinstance(fabric.strategy, SingleDeviceStrategy):
        _FABRICS[device, precision] = fabric
    return fabric


def prepare(
    fabric: Fabric,
    model: nn.Module,
    train: Data,
    batches: Batches,
    rule: LearningRule,
    optimizer: OptimizerFactory | Optimizer | None,
    scheduler: SchedulerFactory | None,
    epochs: int | None,
    steps: int | None,
    total_steps: int | None,
    stopper: EarlyStopping | None,
    callbacks: Sequence[Callback],
) -> TrainingState:
    """Move the model, let the rule build around it, share the weights, make optimizer and scheduler.

    Args:
        steps: number of steps of the scheduler; `None` where nobody knows.
        total_steps: number of steps of the optimizer, likewise.
    """
    convert = fabric.strategy.precision.convert_module
    example = place(fabric, _example(train, batches))
    model = convert(model.to(fabric.device))
    if rule.needs_targets:
        check_row(example, "train")
    if isinstance(example, list | tuple) and len(example) > 1:
        check_model(model, example, train, rule)
    model.train()
    module = convert(rule.prepare(model, example).to(fabric.device))
    if is_sharded(fabric):
        module = _shard(fabric, module)
    elif fabric.world_size > 1:
        broadcast_module(module)
    built = make_optimizer(optimizer, {n: p for n, p in module.named_parameters() if p.requires_grad})
    rule.configure(built, total_steps)
    if stopper is not None:
        stopper.restart()
    return TrainingState(
        model, module, rule, built, epochs, make_scheduler(scheduler, built, steps), fabric=fabric, batches=batches,
        sums=Scalars(fabric.device, fabric.world_size), stopper=stopper, callbacks=tuple(callbacks),
    )  # fmt: skip


def scheduled_steps(
    schedule: str, epochs: int | None, max_steps: int | None, batches: int | None, accumulate: int
) -> int | None:
    """Steps that a scheduler will make: of the optimizer, or epochs; `None` where nobody knows."""
    if schedule == "epoch":
        return epochs
    known = [max_steps] if max_steps is not None else []
    if epochs is not None and batches is not None:
        known.append(epochs * -(-batches // accumulate))
    return min(known, default=None)


def make_scheduler(given: SchedulerFactory | None, optimizer: Optimizer, steps: int | None) -> LRScheduler | None:
    """The scheduler of an optimizer; a factory with a free parameter `total_steps` is told how many there will be.

    Raises:
        ValueError: if it asks for them and nobody knows.
        TypeError: if it is no factory, or makes something else.
    """
    if given is None:
        return None
    if not callable(given):
        raise TypeError(f"expected a factory of a learning-rate scheduler, got {given!r}")
    scheduler = _scheduler(given, optimizer, steps)
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(f"expected the scheduler factory to return a scheduler, got {type(scheduler).__name__}")
    return scheduler


def _scheduler(given: SchedulerFactory, optimizer: Optimizer, steps: int | None) -> LRScheduler:
    try:
        asks = "total_steps" in inspect.signature(given).parameters
    except (TypeError, ValueError):  # a callable without a signature
        asks = False
    if not asks or (isinstance(given, partial) and "total_steps" in given.keywords):
        return given(optimizer)
    if steps is None:
        raise ValueError(
            "the scheduler asks for the total number of steps, and the data do not say how many batches they hold; "
            "give max_steps, or total_steps to the scheduler"
        )
    return given(optimizer, total_steps=steps)


def _shard(fabric: Fabric, module: nn.Module) -> nn.Module:
    """The module, sharded in place unless an earlier training did so."""
    from torch.distributed.tensor import DTensor

    done = any(isinstance(p, DTensor) for p in module.parameters())
    return module if done else fabric.strategy.setup_module(module)


def _example(train: Data, batches: Batches) -> Batch:
    """A batch to look at, with no trace in the generators."""
    tensors = tensors_of(train)
    if tensors is not None:
        return [t[:EXAMPLES] for t in tensors]
    with undisturbed():
        before = batches.state_dict()
        share = next(batches.epoch(0), None)
        batches.load_state_dict(before)
    if share is None:
        raise ValueError("train holds no batch")
    return share.batch


def make_optimizer(given: OptimizerFactory | Optimizer | None, trained: Mapping[str, nn.Parameter]) -> Optimizer:
    """The optimizer of the trained parameters.

    Raises:
        ValueError: if nothing is trained, or an optimizer that was handed in misses some of it.
        TypeError: if it is neither an optimizer nor makes one.
    """
    if not trained:
        raise ValueError("the prepared module has no parameter that requires a gradient")
    if given is None:
        return torch.optim.AdamW(trained.values(), lr=1e-3)
    if not isinstance(given, Optimizer) and not callable(given):
        raise TypeError(f"expected an optimizer or a factory of one, got {type(given).__name__}")
    optimizer = given if isinstance(given, Optimizer) else given(list(trained.values()))
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"expected the optimizer factory to return an optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, LBFGS):
        raise ValueError("LBFGS evaluates the loss several times a step, which a learning rule cannot")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if missing:
        raise ValueError(
            f"the optimizer misses {len(missing)} of {len(trained)} trained parameters, {missing[0]} first "
            "(a learning rule may add networks of its own); give a factory in its place, such as "
            "functools.partial(torch.optim.SGD, lr=0.1), or freeze them by requires_grad_(False)"
        )
    return optimizer
