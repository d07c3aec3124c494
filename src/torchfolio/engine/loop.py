"""The training loop: steps, epochs, and what happens between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchfolio.engine.counting import Counting
from torchfolio.engine.evaluate import Totals, add_up
from torchfolio.engine.interrupt import SIGNALS, interruptible, leave
from torchfolio.engine.loader import Data, Share
from torchfolio.engine.modes import evaluating, random_state, set_random_state, undisturbed
from torchfolio.engine.progress import Progress
from torchfolio.engine.resume import Checkpoints
from torchfolio.engine.rules import Backprop
from torchfolio.engine.sync import add_over_processes, average_buffers, average_gradients, data_rank, is_sharded
from torchfolio.engine.training_state import TrainingState
from torchfolio.models.stateful import state_modules

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricOptimizer

Evaluate = Callable[[nn.Module, Any], Mapping[str, float]]


@dataclass(frozen=True)
class Options:
    """Arguments of `torchfolio.engine.fit` that the loop reads as they are."""

    val: Data | None
    augment: Callable[[Tensor], Tensor] | None
    clip_norm: float | None
    accumulate: int
    max_steps: int | None
    batch_size: int
    by_epoch: bool
    evaluate: Evaluate | None
    log_every: int
    checkpoint_every: int | None
    uneven: bool = False  # whether equally large batches may count differently


class Training:
    """One training under way.

    Args:
        state: state reached, and all that the rest depends on.
        checkpoints: folder that it is kept in.
        options: options of the loop.
    """

    def __init__(self, state: TrainingState, checkpoints: Checkpoints, options: Options) -> None:
        self.state, self.checkpoints, self.options = state, checkpoints, options
        self.fabric = fabric = state.fabric
        self.optimizer = cast("_FabricOptimizer", fabric.setup_optimizers(self.state.optimizer))
        self.trained = [p for p in self.state.module.parameters() if p.requires_grad]
        self.sharded = is_sharded(fabric)
        self.rank, self.shares = data_rank(fabric)
        # A plateau is one of epochs' scores, whatever the schedule.
        self.by_epoch = options.by_epoch or isinstance(self.state.scheduler, ReduceLROnPlateau)
        if state.stopper is not None and state.stopper.restore_best and self.sharded:
            raise ValueError("restore_best needs whole weights, which a sharded module does not hold")
        self.stateful = state_modules(self.state.module)
        self.counting = Counting.of(getattr(self.state.rule, "loss", None))
        self.uneven = options.uneven
        # Where there are several processes, they leave the loop together.
        self.stopping = False
        self.leaving = [False] * len(SIGNALS)
        self.signals: list[int] = []

    def run(self, progress: bool | None) -> None:
        """Train until the last epoch, the last step or a reason to stop."""
        state = self.state
        if state.stopper is not None and state.stopper.exhausted:
            state.stop(state.stopper.reason)
            self.stopping = True
        if state.step == 0:
            for callback in state.callbacks:
                if getattr(callback, "from_start", False):
                    callback(state)
        show = progress if self.fabric.is_global_zero else False
        with interruptible(self.checkpoints.folder is not None) as self.signals:
            with Progress(self._total(), state.step, show) as self.bar:
                while not self._finished():
                    self._epoch()
            state.sums.read()
            self.checkpoints.save()
        self._close()

    def _total(self) -> int | None:
        """Optimizer steps in all, where that is known."""
        state, count = self.state, self.state.batches.count
        bounds = [self.options.max_steps] if self.options.max_steps is not None else []
        if count is not None and state.epochs is not None:
            bounds.append(-(-count // self.options.accumulate) * state.epochs)
        return min(bounds, default=None)

    def _finished(self) -> bool:
        state, last = self.state, self.options.max_steps
        done = state.epochs is not None and state.epoch >= state.epochs
        return self.stopping or done or (last is not None and state.step >= last)

    def _close(self) -> None:
        """A row for an epoch that was not finished, the best weights, the loggers' last words."""
        state = self.state
        if state.sums.sums:
            # It is no part of the checkpoint: a training that goes on writes the whole epoch's row.
            state.history.append(self._row(state.epoch + 1))
        if state.stopper is not None and state.stopper.weights is not None:
            state.module.load_state_dict(state.stopper.weights)
        for logger in self.fabric.loggers:
            logger.save()
        state.module.eval()

    # Epochs

    def _epoch(self) -> None:
        state = self.state
        state.module.train()
        drawn = self._draw()
        started = time.perf_counter()
        while group := list(islice(drawn, self.options.accumulate)):
            stepped = self._step(group)
            now = time.perf_counter()
            state.seconds += now - started
            started = now
            if not stepped:
                continue
            self._after_step()
            if self._finished() and state.position != state.batches.count:
                return
        self._end_epoch()

    def _draw(self) -> Iterator[Share]:
        """The batches of the epoch that are left, with the generators where they were after the last step."""
        state = self.state
        if not state.position:
            state.epoch_random = random_state()
            return state.batches.epoch(state.epoch)
        # Passing over batches draws random numbers as it did the first time.
        now = random_state()
        set_random_state(state.epoch_random)
        drawn = state.batches.epoch(state.epoch, state.position)
        set_random_state(now)
        return drawn

    def _end_epoch(self) -> None:
        state = self.state
        self._read()
        if not state.sums.sums:
            raise ValueError("no batch of the epoch holds a target that the loss does not ignore")
        state.epoch += 1
        state.position = 0
        row = self._row(state.epoch)
        state.history.append(row)
        self._log_row(row)
        state.sums.clear()
        state.seconds = 0.0
        if state.scheduler is not None and self.by_epoch:
            plateau = isinstance(state.scheduler, ReduceLROnPlateau)
            state.scheduler.step(*([row.get("val_loss", row["loss"])] if plateau else []))
        if state.stopper is not None and state.stopper.update(row, state.module):
            state.stop(state.stopper.reason)
            self.stopping = True
        state.epoch_end = True
        self._call_back()
        if self.options.checkpoint_every is None:
            self.checkpoints.save()

    def _row(self, epoch: int) -> dict[str, Any]:
        state = self.state
        row: dict[str, Any] = {"epoch": epoch, "step": state.step, "lr": self._lr()}
        row |= state.sums.means()
        if self.options.val is not None or self.options.evaluate is not None:
            row |= {f"val_{name}": value for name, value in self._evaluate().items()}
        return row | {"seconds": state.seconds}

    def _evaluate(self) -> dict[str, float]:
        """Scores on the validation data, the same on all processes."""
        state, val = self.state, self.options.val
        if self.fabric.world_size > 1 and not self.sharded:
            average_buffers(state.module)
        with undisturbed(), self.fabric.autocast():
            if self.options.evaluate is not None:
                with evaluating(state.model):
                    given = self.options.evaluate(state.model, val)
                return self.fabric.broadcast({name: float(v) for name, v in given.items()})
            assert val is not None
            loss = state.rule.loss if isinstance(state.rule, Backprop) else None
            size = max(self.options.batch_size, 256)
            predictor = state.rule.predictor(state.model)
            if self.sharded:  # every process runs every batch, since each holds only a part of the weights
                return add_up(predictor, val, loss=loss, batch_size=size).scores()
            totals = add_up(predictor, val, loss=loss, batch_size=size, rank=self.rank, world=self.shares)
        sums = (totals.loss, totals.correct, totals.labelled, totals.count)
        return Totals(*add_over_processes(sums, self.fabric)).scores()

    # Steps

    def _step(self, group: Sequence[Share]) -> bool:
        """One optimizer step on one or more joint batches, as if they were one; false if nothing in them counts."""
        state = self.state
        self.optimizer.zero_grad(set_to_none=True)
        weights = self._weights(group)
        if weights is None:
            state.position += len(group)
            return False
        parts = []
        for share, weight in zip(group, weights, strict=True):
            batch = self._prepared(share.batch)
            if self.uneven and weight == 0:
                batch = [*batch[:-1], batch[-1].clamp_min(0)]  # its mean would be 0 / 0, and 0 times that no number
            for part in self.stateful:
                part.reset()  # pyright: ignore[reportCallIssue]
            with self.fabric.autocast():
                parts.append((weight, state.rule.step(batch, self._backward(weight))))
            state.position += 1
        state.scalars = _weighted(parts)
        if self.fabric.world_size > 1 and not self.sharded:
            average_gradients(self.trained)
        if self.options.clip_norm is not None:
            self.fabric.clip_gradients(
                state.module, self.optimizer, max_norm=self.options.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        if state.scheduler is not None and not self.by_epoch:
            state.scheduler.step()
        state.step += 1
        return True

    def _weights(self, group: Sequence[Share]) -> list[float] | None:
        """The weight of every share's mean in the mean over the joint batches; `None` if nothing in them counts.

        Gradients are averaged over processes: a smaller share, or one with fewer targets that count, weighs less.
        """
        if not self.uneven or not all(_has_target(share.batch) for share in group):
            joint = sum(share.joint for share in group)
            return [share.size * self.shares / joint for share in group]
        own = [float(self.counting.mass(share.batch[-1])) if share.size else 0.0 for share in group]
        total = add_over_processes([sum(own)], self.fabric)[0]
        return [mass * self.shares / total for mass in own] if total else None

    def _prepared(self, batch: Any) -> Any:
        """The batch on the device, in the precision of training, augmented."""
        batch = place(self.fabric, batch)
        if self.options.augment is not None:
            batch = [self.options.augment(batch[0]), *batch[1:]]
        return batch

    def _backward(self, weight: float) -> Callable[[Tensor], None]:
        if weight == 1:
            return self.fabric.backward
        return lambda loss: self.fabric.backward(loss * weight)

    def _after_step(self) -> None:
        state, options = self.state, self.options
        state.sums.add(state.step, state.scalars)
        saving = options.checkpoint_every is not None and state.step % options.checkpoint_every == 0
        logging = bool(self.fabric.loggers) and state.step % options.log_every == 0
        if state.sums.due(state.step) or saving or logging:
            self._read()
        if logging:
            self.fabric.log_dict(state.sums.latest | {"lr": self._lr()}, step=state.step)
        if self.bar.show:
            self.bar.update(state.step, self._description())
        state.epoch_end = False
        self._call_back()
        if saving:
            self.checkpoints.save()
        if any(self.leaving):
            self.checkpoints.save()
            leave(self.leaving)

    def _read(self) -> None:
        """Read the scalars; processes learn whether one of them was asked to stop."""
        state = self.state
        stop, *self.leaving = state.sums.read([state.stopped is not None, *(s in self.signals for s in SIGNALS)])
        self.stopping = self.stopping or stop
        if self.stopping and state.stopped is None:
            state.stop("another process asked for it")

    def _call_back(self) -> None:
        for callback in self.state.callbacks:
            callback(self.state)
        if self.fabric.world_size == 1:
            self.stopping = self.state.stopped is not None
            self.leaving = [s in self.signals for s in SIGNALS]

    def _lr(self) -> float:
        return float(self.state.optimizer.param_groups[0]["lr"])

    def _description(self) -> str:
        epochs = f"/{self.state.epochs}" if self.state.epochs is not None else ""
        loss = f"  loss {self.state.sums.latest['loss']:.4g}" if "loss" in self.state.sums.latest else ""
        return f"epoch {self.state.epoch + 1}{epochs}{loss}"

    def _log_row(self, row: Mapping[str, Any]) -> None:
        if self.fabric.loggers:
            named = {
                k if k.startswith("val_") else f"epoch_{k}": v for k, v in row.items() if k not in ("epoch", "step")
            }
            self.fabric.log_dict(named | {"epoch": row["epoch"]}, step=self.state.step)


def _has_target(batch: Any) -> bool:
    return isinstance(batch, list | tuple) and len(batch) > 1 and isinstance(batch[-1], Tensor)


def place(fabric: Fabric, batch: Any) -> Any:
    """A batch on the device; its floats in the precision of training where that is not 32 bits.

    Under automatic mixed precision they stay as they are: losses and labels in 16 bits would lose digits.
    """
    if isinstance(batch, Tensor):  # of a loader of inputs alone
        batch = [batch]
    if isinstance(batch, list | tuple) and all(isinstance(t, Tensor) for t in batch):
        batch = [t.to(fabric.device, non_blocking=True) for t in batch]
    else:
        batch = fabric.to_device(batch)
    precision = fabric.strategy.precision
    return precision.convert_input(batch) if str(precision.precision).endswith("true") else batch


def _weighted(parts: Sequence[tuple[float, Mapping[str, Tensor | float]]]) -> Mapping[str, Tensor | float]:
    """The weighted sum of named scalars."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    total: dict[str, Tensor | float] = {}
    for weight, values in parts:
        for name, value in values.items():
            plain = value.detach() if isinstance(value, Tensor) else float(value)
            total[name] = total.get(name, 0.0) + weight * plain
    return total
