"""One training loop for every learning rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio.data.examples import Examples
from torchfolio.engine.checks import (
    check_callables,
    check_data,
    check_kinds,
    check_last_batch,
    check_monitor,
    check_optional,
    check_settings,
    may_be_uneven,
)
from torchfolio.engine.evaluate import check_validation
from torchfolio.engine.fingerprint import described, digest_of, fingerprint, settings_of
from torchfolio.engine.history import FitResult
from torchfolio.engine.loader import Data, as_batches, tensors_of
from torchfolio.engine.loop import Evaluate, Options, Training
from torchfolio.engine.modes import seed_all, seeded
from torchfolio.engine.resume import Checkpoints
from torchfolio.engine.rules import Backprop, LearningRule
from torchfolio.engine.setup import OptimizerFactory, SchedulerFactory, launch, prepare, scheduled_steps
from torchfolio.engine.state import Callback, EarlyStopping
from torchfolio.engine.sync import data_rank

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def fit(
    model: nn.Module,
    train: Data,
    *,
    val: Data | None = None,
    rule: LearningRule | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    scheduler: SchedulerFactory | None = None,
    schedule: Literal["step", "epoch"] = "step",
    epochs: int | None = None,
    max_steps: int | None = None,
    batch_size: int = 128,
    drop_last: bool = False,
    augment: Callable[[Tensor], Tensor] | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    precision: Any = "32-true",
    device: str | torch.device = "auto",
    fabric: Fabric | None = None,
    seed: int | None = 0,
    early_stopping: EarlyStopping | int | None = None,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
    log_every: int = 50,
    checkpoint: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> FitResult:
    """Train a network in place by any learning rule.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        >>> result = fit(net, (x, y), val=(x_val, y_val), epochs=5)
        >>> result.history.to_frame()

    Args:
        model: the network. It holds the trained weights afterwards, on the device of training, in evaluation
            mode.
        train: tensors or arrays (x, y), x alone for a rule that needs no targets, or a `TensorDataset`, which are
            batched by indexing; another `Dataset`, of dicts too; or a `DataLoader`, which brings its own batches. See
            `torchfolio.data.Examples`.
        val: data to evaluate on after every epoch. Labels and shapes are checked before the first step: of all
            examples where they are tensors, else of the first.
        rule: rule by which a batch becomes gradients; `Backprop()` by default, which takes cross-entropy for integer
            targets and the mean squared error for others.
        optimizer: a factory from parameters to an optimizer, such as `partial(SGD, lr=0.1)`, or an optimizer
            that holds every parameter that is trained. AdamW with learning rate 1e-3 by default.
        scheduler: a factory from the optimizer to a learning-rate scheduler, such as
            `torchfolio.engine.recipes.one_cycle(0.1)` or `partial(CosineAnnealingLR, T_max=n)`. One with a free
            parameter `total_steps`, as `partial(OneCycleLR, max_lr=0.1)` has, is told how many steps it will make.
        schedule: whether the scheduler steps after every optimizer `"step"` or every `"epoch"`. A
            `ReduceLROnPlateau` goes by the epoch and follows `val_loss` (`loss` without `val`).
        epochs: passes over the training data; 1 by default, or as many as `max_steps` needs.
        max_steps: maximum number of optimizer steps.
        batch_size: examples of a batch, of all processes together.
        drop_last: whether to leave out a last batch that is not full.
        augment: function that is applied to every batch of inputs on the device.
        clip_norm: largest norm of all gradients together.
        accumulate: batches whose mean gradient makes one step.
        precision: precision of Fabric: `"32-true"`, `"bf16-mixed"`, `"16-mixed"`, `"bf16-true"`, `"64-true"`. The
            `true` ones other than 32 bits convert the model permanently.
        device: `"auto"`, `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, or a `torch.device`.
        fabric: a Fabric of your own, in place of `precision` and `device`: it holds what concerns several devices
            (`devices`, `num_nodes`, `strategy`) and `loggers`. Under `torchrun` none is needed: its processes are taken.
        seed: of auxiliary networks, order, augmentation and dropout. Global generators are put back
            afterwards. `None` draws one from torch's global generator.
        early_stopping: rule by which to stop; a number is the patience on `val_loss`.
        evaluate: `(model, val) -> {name: value}` in place of `torchfolio.engine.evaluate`, called with the
            model in evaluation mode.
        callbacks: functions that are called with a `FitState` after every step and epoch, on all processes. Those
            with `from_start = True`, such as `StepRecorder`, are called before the first step too; those with
            `state_dict` and `load_state_dict` are part of checkpoints.
        log_every: steps between the scalars that go to the Fabric's loggers, which get every epoch's row too.
        checkpoint: folder of checkpoints. Training killed at any time goes on from the last one and ends
            with the weights of an uninterrupted run, to the bit on a CPU. With a folder, SIGINT and SIGTERM
            finish the step and write a checkpoint before the process leaves.
        checkpoint_every: steps between checkpoints; every epoch by default. One more is written at the end.
        resume: whether to go on from the checkpoints in the folder; otherwise they are removed. A finished training may
            be given more epochs.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The trained network, its history and the number of steps.

    Raises:
        ValueError: on empty or unequal data, NaN, labels out of range, settings out of range, an optimizer
            that misses parameters, checkpoints of another training, or another process that writes there.
        TypeError: on data or labels of another type than expected.
        NonFiniteLoss: if a scalar becomes NaN or infinite, at its step (found at most 16 steps later where
            reading it earlier would hold up the device). The last checkpoint is from before and finite.

    Note:
        *Several processes*: `torchrun --nproc-per-node 4 train.py` (with `--nnodes` for several machines), or
        `fabric=Fabric(devices=4)`. Each process takes its share of every batch, gradients are averaged after the rule's
        step, and the weights are those of one process on the same batches. The first process alone writes
        and prints; checkpoints must be in a folder that all can read. Batch norm sees each share by itself;
        convert the model by `nn.SyncBatchNorm.convert_sync_batchnorm` where that matters.

        *FSDP2*: pass `fabric=Fabric(strategy=ModelParallelStrategy(parallelize_fn, data_parallel_size=4,
        tensor_parallel_size=1), devices=4)` with a `parallelize_fn(module, mesh)` that applies `fully_shard`
        to the module's parts with `mesh=mesh["data_parallel"]` and returns it. Sharding works in place, so
        rules that hold parts of the module keep working; gradients are then averaged by FSDP2, and
        checkpoints hold whole weights. Strategies that wrap the module (FSDP1, DeepSpeed) are refused.
    """
    check_settings(schedule, clip_norm, epochs=epochs, max_steps=max_steps, batch_size=batch_size,
                   accumulate=accumulate, checkpoint_every=checkpoint_every, log_every=log_every)  # fmt: skip
    rule = rule or Backprop()
    check_kinds(model, rule)
    check_data(train, "train", rule.needs_targets)
    if val is not None:
        check_data(val, "val", rule.needs_targets or evaluate is None)
    check_callables(callbacks)
    check_optional(seed, augment, evaluate, early_stopping)
    stopper = EarlyStopping(patience=early_stopping) if isinstance(early_stopping, int) else early_stopping
    check_monitor(stopper, val is not None or evaluate is not None)
    fabric = launch(fabric, device, precision)
    if seed is None:
        seed = int(fabric.broadcast(int(torch.randint(2**31, ()))))
    rank, world = data_rank(fabric)
    train = Examples(train, "train").source
    val = Examples(val, "val").source if val is not None else None
    with seeded(seed):
        arguments = {"": type(rule).__name__, **settings_of(rule)}
        batches = as_batches(train, batch_size, seed, rank=rank, world=world, drop_last=drop_last, device=fabric.device)
        epochs = 1 if epochs is None and max_steps is None else epochs
        steps = scheduled_steps(schedule, epochs, max_steps, batches.count, accumulate)
        total = scheduled_steps("step", epochs, max_steps, batches.count, accumulate)
        state = prepare(
            fabric, model, train, batches, rule, optimizer, scheduler, epochs, steps, total, stopper, callbacks
        )
        settings = fingerprint(
            arguments, state.optimizer, state.scheduler, seed=seed, batch_size=batch_size,
            accumulate=accumulate, clip_norm=clip_norm, schedule=schedule, processes=fabric.world_size,
            precision=str(fabric.strategy.precision.precision), batches=batches.count,
            threads=torch.get_num_threads() if fabric.device.type == "cpu" else None, augment=described(augment),
            data=digest_of(tensors) if checkpoint is not None and (tensors := tensors_of(train)) is not None else None,
        )  # fmt: skip
        checkpoints = Checkpoints(Path(checkpoint) if checkpoint is not None else None, state, settings)
        options = Options(
            val, augment, clip_norm, accumulate, max_steps, batch_size, schedule == "epoch", evaluate,
            log_every, checkpoint_every, may_be_uneven(state.rule, train),
        )  # fmt: skip
        # Dropout and augmentation differ between processes, the weights do not.
        seed_all((seed + 1_000_003 * rank) % 2**63)
        try:
            check_last_batch(batches, state.module)
            if val is not None and evaluate is None:
                with fabric.autocast():
                    check_validation(state.model, val, state.rule)
            with checkpoints.alone():
                checkpoints.restore(resume)
                Training(state, checkpoints, options).run(progress)
        finally:
            state.rule.release()
    return FitResult(model, state.module, state.rule, state.history, state.step, state.epoch, state.stopped)
