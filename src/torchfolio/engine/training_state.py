"""All that the rest of a training depends on, in one object that checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio.engine.loader import Batches
from torchfolio.engine.modes import random_state, set_random_state
from torchfolio.engine.scalars import NonFiniteLoss, Scalars
from torchfolio.engine.state import EarlyStopping, FitState
from torchfolio.engine.sync import average_buffers, gather, is_sharded

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(kw_only=True, repr=False)
class TrainingState(FitState):
    """A training under way: what callbacks see, and what it takes to go on from here.

    Attributes:
        fabric: processes.
        batches: batches and their order.
        sums: sums of the epoch under way.
        stopper: early stopping, if there is any.
        callbacks: functions that are called; those with `state_dict` and `load_state_dict` are part of the state.
        epoch_random: random state at the beginning of the epoch under way.
        seconds: time spent in the epoch under way.
    """

    fabric: Fabric
    batches: Batches
    sums: Scalars
    stopper: EarlyStopping | None = None
    callbacks: tuple[Callable[..., Any], ...] = ()
    epoch_random: dict[str, Any] = field(default_factory=random_state)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything by name, in what loads without unpickling. All processes take part.

        Raises:
            NonFiniteLoss: if a weight or a state of the optimizer is not finite.
        """
        self.sums.read()
        world = self.fabric.world_size
        if world > 1 and not is_sharded(self.fabric):
            average_buffers(self.module)
        weights, optimizer = self._weights()
        return {
            "module": weights,
            "optimizer": optimizer,
            "rule": self.rule.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
            "precision": self.fabric.strategy.precision.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "position": self.position,
            "batches": self.batches.state_dict(),
            "history": self.history.rows,
            "scalars": self.sums.state_dict(),
            "seconds": self.seconds,
            "stopper": self.stopper.state_dict() if self.stopper is not None else None,
            "callbacks": [getattr(callback, "state_dict", dict)() for callback in self.callbacks],
            "random": gather((random_state(), self.epoch_random), world),
        }

    def _weights(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and states of the optimizer, after a look whether they are finite."""
        if is_sharded(self.fabric):
            weights, states = sharded_state(self.module, self.optimizer)
            check_finite(((f"weight {k}", v) for k, v in weights.items() if isinstance(v, Tensor)), self.step)
            return weights, states
        check_finite(named_values(self.module, self.optimizer), self.step)
        return self.module.state_dict(), self.optimizer.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned. All processes take part."""
        if is_sharded(self.fabric):
            load_sharded_state(self.module, self.optimizer, saved["module"], saved["optimizer"])
        else:
            self.module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            check_finite(named_values(self.module, self.optimizer), saved["step"])
        self.rule.load_state_dict(saved["rule"])
        if self.scheduler is not None and saved["scheduler"] is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        self.epoch, self.step, self.position = saved["epoch"], saved["step"], saved["position"]
        self.batches.load_state_dict(saved["batches"])
        self.history.rows[:] = saved["history"]
        self.sums.load_state_dict(saved["scalars"])
        self.seconds = saved["seconds"]
        if self.stopper is not None and saved["stopper"] is not None:
            self.stopper.load_state_dict(saved["stopper"])
        for callback, state in zip(self.callbacks, saved["callbacks"], strict=False):
            if state and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state)  # pyright: ignore[reportFunctionMemberAccess]
        now, self.epoch_random = saved["random"][self.fabric.global_rank]
        set_random_state(now)


def check_finite(named: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Refuse to keep weights or optimizer states that are not finite.

    Raises:
        NonFiniteLoss: naming the first.
    """
    floats = [(name, value.detach()) for name, value in named if value.is_floating_point() and value.numel()]
    # The largest absolute value is NaN where any value is, infinite where any is: one pass and no copies.
    largest = [torch.linalg.vector_norm(value, float("inf")).float().cpu() for _, value in floats]
    for (name, value), size in zip(floats, largest, strict=True):
        if not torch.isfinite(size):
            raise NonFiniteLoss(step, name, float(value[~torch.isfinite(value)].flatten()[0]))


def named_values(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Trained weights and the optimizer's tensors for them, with names for messages."""
    names: dict[Tensor, str] = {p: name for name, p in module.named_parameters() if p.requires_grad}
    for parameter, name in names.items():
        yield f"weight {name}", parameter
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(parameter, 'a weight')}", value


def sharded_state(module: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Whole weights and optimizer states of a sharded module, on the CPU. All processes take part."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_state_dict(module, optimizer, options=options)


def load_sharded_state(
    module: nn.Module, optimizer: Optimizer, weights: dict[str, Any], states: dict[str, Any]
) -> None:
    """Hand every process its part of what `sharded_state` gave."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
