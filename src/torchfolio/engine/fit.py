"""One training loop for every learning rule."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.checkpoint import clear_checkpoints, load_checkpoint, save_checkpoint
from torchfolio.engine.checks import check_data, check_fits, check_positive
from torchfolio.engine.evaluate import evaluate as evaluate_model
from torchfolio.engine.history import FitResult, History
from torchfolio.engine.loader import Batches, Data, as_batches, tensors_of
from torchfolio.engine.modes import random_state, seed_all, seeded, set_random_state
from torchfolio.engine.progress import Progress
from torchfolio.engine.rules import Backprop, Batch, LearningRule
from torchfolio.engine.sync import average_gradients, broadcast_module, mean_over_processes

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite; training stopped there."""


@dataclass
class EarlyStopping:
    """Stop when a value of the history no longer improves.

    Attributes:
        monitor: name of the value, `"val_loss"` or another column of the history.
        patience: epochs without improvement that are waited for.
        mode: whether smaller (`"min"`) or larger (`"max"`) is better.
        min_delta: least improvement that counts.
    """

    monitor: str = "val_loss"
    patience: int = 5
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.0
    best: float | None = field(default=None, init=False)
    waited: int = field(default=0, init=False)

    def update(self, row: Mapping[str, Any]) -> bool:
        """Look at an epoch; true when it is time to stop."""
        if self.monitor not in row:
            raise ValueError(f"early stopping monitors {self.monitor!r}; an epoch has {', '.join(row)}")
        value = float(row[self.monitor])
        sign = 1 if self.mode == "min" else -1
        if self.best is None or sign * value < sign * self.best - self.min_delta:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience


@dataclass
class FitState:
    """What a callback sees, after every optimizer step and at the end of every epoch.

    Attributes:
        model: the user's network.
        module: what is trained.
        rule: the learning rule.
        optimizer: the optimizer.
        epoch: epochs completed.
        epochs: epochs asked for.
        step: optimizer steps taken.
        position: batches drawn in the epoch under way.
        scalars: what the rule returned last; values may be tensors on the device.
        epoch_end: whether this call ends an epoch, whose row is then last in `history`.
        history: rows so far.
        stopped: reason to stop, set by `stop`.
    """

    model: nn.Module
    module: nn.Module
    rule: LearningRule
    optimizer: Optimizer
    epochs: int
    epoch: int = 0
    step: int = 0
    position: int = 0
    scalars: Mapping[str, Tensor | float] = field(default_factory=dict)
    epoch_end: bool = False
    history: History = field(default_factory=History)
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Ask for the end of training after this step."""
        self.stopped = reason


Callback = Callable[[FitState], None]


def fit(
    model: nn.Module,
    train: Data,
    *,
    val: Data | None = None,
    rule: LearningRule | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    scheduler: SchedulerFactory | None = None,
    schedule: Literal["step", "epoch"] = "step",
    epochs: int = 1,
    max_steps: int | None = None,
    batch_size: int = 128,
    augment: Callable[[Tensor], Tensor] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    precision: Any = "32-true",
    device: str = "auto",
    devices: int | str = 1,
    num_nodes: int = 1,
    strategy: Any = "auto",
    fabric: Fabric | None = None,
    seed: int = 0,
    early_stopping: EarlyStopping | None = None,
    evaluate: Callable[[nn.Module, Data], Mapping[str, float]] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Any = (),
    log_every: int = 50,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> FitResult:
    """Train a network in place by any learning rule.

    Args:
        model: the network. It holds the trained weights afterwards, on the device of training.
        train: a `TensorDataset` or tensors (x, y), which are batched by indexing; another `Dataset`; or a
            `DataLoader`, which brings its own batches.
        val: data to evaluate on after every epoch.
        rule: how a batch becomes gradients; `Backprop()` by default, which takes cross-entropy for integer targets
            and the mean squared error for others.
        optimizer: a factory from parameters to an optimizer, such as `partial(SGD, lr=0.1)`, or an optimizer that
            holds every parameter that is trained. AdamW with learning rate 1e-3 by default.
        scheduler: a factory from the optimizer to a learning-rate scheduler, such as
            `partial(OneCycleLR, max_lr=0.1, total_steps=n)`.
        schedule: whether the scheduler steps after every optimizer `"step"` or every `"epoch"`.
        epochs: passes over the training data.
        max_steps: stop after so many optimizer steps.
        batch_size: examples of a batch, of all processes together.
        augment: applied to every batch of inputs on the device.
        clip_norm: largest norm of all gradients together.
        accumulate: batches whose mean gradient makes one step.
        precision: of Fabric: `"32-true"`, `"bf16-mixed"`, `"16-mixed"`, `"bf16-true"`, `"64-true"`.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"mps"`: Fabric's accelerator.
        devices: number of devices of this machine. Under `torchrun` the number of its processes is taken.
        num_nodes: number of machines.
        strategy: Fabric's strategy for several devices.
        fabric: a Fabric of your own, in place of the arguments from `precision` to `strategy` and `loggers`.
            For FSDP give it a `ModelParallelStrategy` whose `parallelize_fn` applies `fully_shard`, which works in
            place; gradients are then averaged by it.
        seed: of auxiliary networks, order, augmentation and dropout. Global generators are put back afterwards.
        early_stopping: see `EarlyStopping`.
        evaluate: `(model, val) -> {name: value}` in place of `torchfolio.engine.evaluate`.
        callbacks: called with a `FitState` after every step and epoch. Those with `state_dict` and
            `load_state_dict` are part of checkpoints.
        loggers: Fabric loggers (`CSVLogger`, `TensorBoardLogger`), fed every `log_every` steps and every epoch.
        log_every: steps between logged scalars.
        checkpoint: folder of checkpoints. Training killed at any time goes on from the last one and ends with the
            weights of an uninterrupted run, to the bit on a CPU.
        checkpoint_every: steps between checkpoints; every epoch by default.
        resume: go on from the checkpoints in the folder; otherwise they are removed.
        progress: show a progress bar; by default where standard error is a terminal.

    Returns:
        The trained network, its history and the number of steps.

    Raises:
        ValueError: on empty or unequal data, NaN, labels out of range, settings out of range, an optimizer that
            misses parameters, or checkpoints of another training.
        NonFiniteLoss: if a loss becomes NaN or infinite. The last checkpoint is from before.

    Example:
        >>> net = resnet20()
        >>> fit(net, data.train, val=data.val, epochs=5)
    """
    check_data(train, "train")
    if val is not None:
        check_data(val, "val")
    check_positive(epochs=epochs, max_steps=max_steps, batch_size=batch_size, accumulate=accumulate)
    check_positive(checkpoint_every=checkpoint_every, log_every=log_every)
    if schedule not in ("step", "epoch"):
        raise ValueError(f"expected schedule to be 'step' or 'epoch', got {schedule!r}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"expected clip_norm above 0, got {clip_norm!r}")
    fabric = fabric or _make_fabric(device, devices, num_nodes, strategy, precision, loggers)
    fabric.launch()
    with seeded(seed):
        trainer = _Trainer(
            fabric=fabric,
            batches=as_batches(train, batch_size, seed, fabric),
            val=val,
            augment=augment,
            clip_norm=clip_norm,
            accumulate=accumulate,
            max_steps=max_steps or 2**62,
            stopper=early_stopping,
            evaluate=evaluate or (lambda model, data: evaluate_model(model, data, batch_size=max(batch_size, 256))),
            callbacks=callbacks,
            log_every=log_every,
            folder=Path(checkpoint) if checkpoint is not None else None,
            checkpoint_every=checkpoint_every,
            epoch_schedule=schedule == "epoch",
            settings={"seed": seed, "batch_size": batch_size, "accumulate": accumulate, "world": fabric.world_size},
        )
        trainer.prepare(model, train, rule or Backprop(), optimizer, scheduler, epochs, seed)
        trainer.restore(resume)
        trainer.run(progress)
    state = trainer.state
    return FitResult(model, state.module, state.rule, state.history, state.step, state.epoch, state.stopped)


def _make_fabric(
    device: str, devices: int | str, num_nodes: int, strategy: Any, precision: Any, loggers: Any
) -> Fabric:
    if "TORCHELASTIC_RUN_ID" in os.environ and devices == 1:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", num_nodes))
    return Fabric(
        accelerator=device,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        loggers=list(loggers) or None,
    )


@dataclass
class _Trainer:
    """The state of one call of `fit`, in the pieces that a reader can follow."""

    fabric: Fabric
    batches: Batches
    val: Data | None
    augment: Callable[[Tensor], Tensor] | None
    clip_norm: float | None
    accumulate: int
    max_steps: int
    stopper: EarlyStopping | None
    evaluate: Callable[[nn.Module, Data], Mapping[str, float]]
    callbacks: Sequence[Callback]
    log_every: int
    folder: Path | None
    checkpoint_every: int | None
    epoch_schedule: bool
    settings: dict[str, Any]

    def prepare(
        self,
        model: nn.Module,
        train: Data,
        rule: LearningRule,
        optimizer: OptimizerFactory | Optimizer | None,
        scheduler: SchedulerFactory | None,
        epochs: int,
        seed: int,
    ) -> None:
        """Move the model, let the rule build around it, make optimizer and scheduler."""
        self.device = self.fabric.device
        example = self._example(train)
        model.to(self.device)
        check_fits(model, example, train)
        model.train()
        module = rule.prepare(model, example).to(self.device)
        module.train()
        if self.sharded:
            self.fabric.setup_module(module)
        elif self.fabric.world_size > 1:
            broadcast_module(module)
        self.trained = [p for p in module.parameters() if p.requires_grad]
        made = _make_optimizer(optimizer, self.trained)
        self.scheduler = scheduler(made) if scheduler is not None else None
        self.optimizer = self.fabric.setup_optimizers(made)
        self.state = FitState(model, module, rule, made, epochs)
        self.settings |= {"optimizer": type(made).__name__, "batches": len(self.batches)}
        # Dropout and augmentation should differ between processes, the weights should not.
        seed_all(seed + self.fabric.global_rank)
        self.epoch_random = random_state()
        self.sums: dict[str, Tensor] = {}
        self.summed = 0
        self.first_bad = torch.full((), -1, dtype=torch.long, device=self.device)
        self.seconds = 0.0

    @property
    def sharded(self) -> bool:
        """Whether the strategy shards the module and averages gradients itself."""
        return "ModelParallel" in type(self.fabric.strategy).__name__

    def _example(self, train: Data) -> Batch:
        tensors = tensors_of(train)
        batch = [t[:8] for t in tensors] if tensors is not None else next(iter(self.batches.epoch(0)))[0]
        if not isinstance(batch, list | tuple) or not all(isinstance(t, Tensor) for t in batch) or len(batch) < 2:
            raise ValueError(f"expected batches of tensors (x, y), got {type(batch).__name__}")
        return self._place(batch)

    def _place(self, batch: Batch) -> Batch:
        placed = [t.to(self.device, non_blocking=True) for t in batch]
        if self.fabric._precision.precision.endswith("true"):  # pyright: ignore[reportAttributeAccessIssue]
            placed = [self.fabric._precision.convert_input(t) if t.is_floating_point() else t for t in placed]
        return placed

    # The loop

    def run(self, progress: bool | None) -> None:
        """Train until the last epoch, the last step or a reason to stop."""
        state = self.state
        per_epoch = -(-len(self.batches) // self.accumulate)
        total = min(self.max_steps, state.epochs * per_epoch)
        show = progress if self.fabric.is_global_zero else False
        with Progress(total, state.step, show) as self.bar, _interruptible(self.folder is not None) as self.interrupted:
            while state.epoch < state.epochs and state.step < self.max_steps and state.stopped is None:
                self._epoch()
        self._check_finite()
        if self.folder is not None:
            self._save()
        state.module.eval()

    def _epoch(self) -> None:
        state = self.state
        if state.position == 0:
            self.epoch_random = random_state()
        state.module.train()
        self.bar.describe(f"epoch {state.epoch + 1}/{state.epochs}")
        resumed = state.position
        wanted = random_state() if resumed else None
        if resumed:
            set_random_state(self.epoch_random)
        drawn = self.batches.epoch(state.epoch, resumed)
        started = time.perf_counter()
        while group := list(islice(drawn, self.accumulate)):
            if wanted is not None:  # drawing the batches that were passed over has moved the generators
                set_random_state(wanted)
                wanted = None
            self._step(group)
            self.seconds += time.perf_counter() - started
            started = time.perf_counter()
            if state.stopped is not None or state.step >= self.max_steps:
                break
            if self.checkpoint_every and state.step % self.checkpoint_every == 0 and state.position < len(self.batches):
                self._save()
        if state.position >= len(self.batches):
            self._end_epoch()

    def _step(self, group: Sequence[tuple[Batch, int]]) -> None:
        """One optimizer step on one or more batches."""
        state = self.state
        self.optimizer.zero_grad(set_to_none=True)
        joint = sum(size for _, size in group)
        for batch, size in group:
            batch = self._place(batch)
            if self.augment is not None:
                batch = [self.augment(batch[0]), *batch[1:]]
            # Gradients are averaged over processes: a process with fewer examples of the batch weighs less.
            share = size / joint * (len(batch[0]) * self.fabric.world_size / size)
            with self.fabric.autocast():
                state.scalars = state.rule.step(batch, self._backward(share))
            state.position += 1
            self._add(state.scalars)
        if self.fabric.world_size > 1 and not self.sharded:
            average_gradients(self.trained)
        if self.clip_norm is not None:
            self.fabric.clip_gradients(state.module, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False)
        self.optimizer.step()
        if self.scheduler is not None and not self.epoch_schedule:
            self.scheduler.step()
        state.step += 1
        self._after_step()

    def _backward(self, share: float) -> Callable[[Tensor], None]:
        if share == 1:
            return self.fabric.backward
        return lambda loss: self.fabric.backward(loss * share)

    def _after_step(self) -> None:
        state = self.state
        self.bar.advance()
        if self.device.type == "cpu" or state.step % self.log_every == 0:
            self._check_finite()
        if self.fabric.loggers and state.step % self.log_every == 0:
            self.fabric.log_dict({k: float(v) for k, v in state.scalars.items()}, step=state.step)
        state.epoch_end = False
        for callback in self.callbacks:
            callback(state)
        if self.interrupted:
            self._leave()

    def _add(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Sum the scalars on the device, and remember the first step at which one is not finite."""
        for name, value in scalars.items():
            value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value), device=self.device)
            self.sums[name] = (
                self.sums[name] + value if name in self.sums else value.double() if value.is_cpu else value.float()
            )
        self.summed += 1
        loss = scalars.get("loss")
        if isinstance(loss, Tensor) and loss.device.type == "cpu":
            bad = not math.isfinite(loss.item())
            if bad and self.first_bad < 0:
                self.first_bad.fill_(self.state.step + 1)
        elif isinstance(loss, Tensor):
            now = (~torch.isfinite(loss)) & (self.first_bad < 0)
            self.first_bad = torch.where(now, self.state.step + 1, self.first_bad)

    def _check_finite(self) -> None:
        step = int(self.first_bad)
        if step >= 0:
            values = ", ".join(f"{k} {float(v):g}" for k, v in self.state.scalars.items())
            raise NonFiniteLoss(
                f"the loss is not finite at step {step} (epoch {self.state.epoch + 1}: {values}); "
                "try a smaller learning rate, clip_norm, or look at the inputs"
            )

    def _end_epoch(self) -> None:
        state = self.state
        self._check_finite()
        state.epoch += 1
        state.position = 0
        row: dict[str, Any] = {"epoch": state.epoch, "step": state.step, "lr": self.optimizer.param_groups[0]["lr"]}
        row |= {k: float(mean_over_processes(v)) / self.summed for k, v in self.sums.items()}
        if self.val is not None:
            row |= {f"val_{k}": float(v) for k, v in self.evaluate(state.model, self.val).items()}
        row["seconds"] = self.seconds
        self.sums, self.summed, self.seconds = {}, 0, 0.0
        state.history.append(row)
        if self.fabric.loggers:
            self.fabric.log_dict({k: v for k, v in row.items() if k not in ("epoch", "step")}, step=state.step)
        if self.scheduler is not None and self.epoch_schedule:
            self.scheduler.step()
        if self.stopper is not None and self.stopper.update(row):
            state.stop(f"{self.stopper.monitor} has not improved for {self.stopper.patience} epochs")
        state.epoch_end = True
        for callback in self.callbacks:
            callback(state)
        if self.folder is not None and self.checkpoint_every is None:
            self._save()

    # Checkpoints

    def _save(self) -> None:
        """Write everything that the rest of the training depends on."""
        if self.folder is None:
            return
        self._check_finite()
        state = self.state
        random = random_state()
        everyone = self._gather(random), self._gather(self.epoch_random)
        if self.fabric.is_global_zero:
            contents = {
                "settings": self.settings,
                "module": state.module.state_dict(),
                "rule": state.rule.state_dict(),
                "optimizer": state.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler is not None else None,
                "precision": self.fabric._precision.state_dict(),
                "epoch": state.epoch,
                "step": state.step,
                "position": state.position,
                "random": everyone[0],
                "epoch_random": everyone[1],
                "history": state.history.rows,
                "sums": self.sums,
                "summed": self.summed,
                "seconds": self.seconds,
                "stopper": (self.stopper.best, self.stopper.waited) if self.stopper is not None else None,
                "stopped": state.stopped,
                "callbacks": [getattr(c, "state_dict", dict)() for c in self.callbacks],
            }
            save_checkpoint(self.folder, state.step, contents)
        self.fabric.barrier()

    def _gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        if self.fabric.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.fabric.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def restore(self, resume: bool) -> None:
        """Go on from the newest readable checkpoint."""
        if self.folder is None:
            return
        if not resume:
            if self.fabric.is_global_zero:
                clear_checkpoints(self.folder)
            self.fabric.barrier()
            return
        saved = load_checkpoint(self.folder)
        if saved is None:
            return
        self._check_same(saved)
        state = self.state
        state.module.load_state_dict(saved["module"])
        state.rule.load_state_dict(saved["rule"])
        state.optimizer.load_state_dict(saved["optimizer"])
        if self.scheduler is not None and saved["scheduler"] is not None:
            self.scheduler.load_state_dict(saved["scheduler"])
        self.fabric._precision.load_state_dict(saved["precision"])
        state.epoch, state.step, state.position = saved["epoch"], saved["step"], saved["position"]
        state.history.rows[:] = saved["history"]
        # A training that stopped for a reason of its own may be asked to go on, with more epochs or patience.
        self.sums = {k: v.to(self.device) for k, v in saved["sums"].items()}
        self.summed, self.seconds = saved["summed"], saved["seconds"]
        if self.stopper is not None and saved["stopper"] is not None:
            self.stopper.best, self.stopper.waited = saved["stopper"]
        for callback, kept in zip(self.callbacks, saved["callbacks"], strict=False):
            if kept and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(kept)  # pyright: ignore[reportFunctionMemberAccess]
        rank = self.fabric.global_rank
        self.epoch_random = saved["epoch_random"][rank]
        set_random_state(saved["random"][rank])

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if saved["settings"].get(name) != value:
                raise ValueError(
                    f"the checkpoint in {self.folder} was made with {name} {saved['settings'].get(name)!r}, now it is "
                    f"{value!r}; give the same, or resume=False to start over"
                )
        here = {k: tuple(v.shape) for k, v in self.state.module.state_dict().items()}
        there = {k: tuple(v.shape) for k, v in saved["module"].items()}
        odd = next((k for k in sorted(set(here) | set(there)) if here.get(k) != there.get(k)), None)
        if odd is not None:
            raise ValueError(
                f"the checkpoint in {self.folder} is of another network: {odd} has shape {there.get(odd)} there and "
                f"{here.get(odd)} here; give the same network and rule, or resume=False to start over"
            )

    def _leave(self) -> None:
        """Write a checkpoint at a step's end and hand the signal on."""
        self._save()
        number = self.interrupted[0]
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def _make_optimizer(optimizer: OptimizerFactory | Optimizer | None, trained: list[nn.Parameter]) -> Optimizer:
    if not trained:
        raise ValueError("the prepared module has no parameter that requires a gradient")
    if optimizer is None:
        return torch.optim.AdamW(trained, lr=1e-3)
    if not isinstance(optimizer, Optimizer):
        return optimizer(trained)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sum(id(p) not in held for p in trained)
    if missing:
        raise ValueError(
            f"the optimizer misses {missing} of {len(trained)} trained parameters (a learning rule may add networks of its "
            "own); give a factory in its place, such as functools.partial(torch.optim.SGD, lr=0.1)"
        )
    return optimizer


@contextlib.contextmanager
def _interruptible(active: bool) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM so that a step is finished and a checkpoint written before leaving."""
    received: list[int] = []
    if not active or threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, frame: received.append(n)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
