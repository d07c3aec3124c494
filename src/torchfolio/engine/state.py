"""What callbacks see of a training, and the rule by which one stops early."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.history import History
from torchfolio.engine.rules import LearningRule
from torchfolio.shown import Shown


@dataclass(repr=False)
class FitState(Shown):
    """What a callback sees, after every optimizer step and at the end of every epoch.

    Attributes:
        model: the user's network.
        module: module that is trained: `model`, or one that holds it and its auxiliary networks.
        rule: learning rule.
        optimizer: optimizer.
        epochs: epochs asked for; `None` where only `max_steps` bounds the training.
        scheduler: learning-rate scheduler, if there is one.
        epoch: epochs completed.
        step: optimizer steps taken.
        position: batches drawn in the epoch under way.
        scalars: numbers that the rule returned for the last step; values may be tensors on the device, and with
            several processes they are this process's.
        epoch_end: whether this call ends an epoch, whose row is then last in `history`.
        history: rows so far.
        stopped: reason to stop, set by `stop`.
    """

    model: nn.Module
    module: nn.Module
    rule: LearningRule
    optimizer: Optimizer
    epochs: int | None
    scheduler: LRScheduler | None = None
    epoch: int = 0
    step: int = 0
    position: int = 0
    scalars: Mapping[str, Tensor | float] = field(default_factory=dict)
    epoch_end: bool = False
    history: History = field(default_factory=History)
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Ask for the end of training: after this step, or within a few where processes have to agree."""
        self.stopped = reason


Callback = Callable[[FitState], None]


@dataclass(repr=False)
class EarlyStopping(Shown):
    """Stop when a value of the history no longer improves.

    Attributes:
        monitor: name of the value, `"val_loss"` or another column of the history.
        patience: epochs without improvement that are waited for.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better.
        min_delta: least improvement that counts.
        restore_best: end with the weights of the best epoch in place of the last (they are then part of every
            checkpoint, which doubles it).
    """

    monitor: str = "val_loss"
    patience: int = 5
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    restore_best: bool = False
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)
    weights: dict[str, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ValueError(f"expected mode to be 'min' or 'max', got {self.mode!r}")
        if self.patience < 1:
            raise ValueError(f"expected patience of at least one epoch, got {self.patience!r}")

    def update(self, row: Mapping[str, Any], module: nn.Module | None = None) -> bool:
        """Look at an epoch; true when it is time to stop."""
        if self.monitor not in row:
            raise ValueError(f"early stopping monitors {self.monitor!r}; an epoch has {', '.join(row)}")
        value = float(row[self.monitor])
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * value < sign * self.best - self.min_delta:
            self.best, self.waited = value, 0
            if self.restore_best and module is not None:
                self.weights = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        else:
            self.waited += 1
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether the patience is at its end."""
        return self.waited >= self.patience

    @property
    def reason(self) -> str:
        """Why training stops."""
        return f"{self.monitor} has not improved for {self.patience} epochs"

    def restart(self) -> None:
        """Forget an earlier training."""
        self.best, self.waited, self.weights = None, 0, None

    def state_dict(self) -> dict[str, Any]:
        """What has been seen, for checkpoints."""
        return {"best": self.best, "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was seen."""
        self.best, self.waited, self.weights = state["best"], state["waited"], state["weights"]
