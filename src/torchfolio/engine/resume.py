"""Whether a checkpoint belongs to a training, and everything that a training goes on from."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from torchfolio.engine.checkpoint import FORMAT, clear_checkpoints, readable, save_checkpoint
from torchfolio.engine.loader import Batches
from torchfolio.engine.lock import FolderInUse, exclusive
from torchfolio.engine.modes import random_state, set_random_state
from torchfolio.engine.objectives import Objective
from torchfolio.engine.rules import LearningRule
from torchfolio.engine.scalars import NonFiniteLoss, Scalars
from torchfolio.engine.state import EarlyStopping, FitState
from torchfolio.engine.sync import average_buffers, gather, is_sharded

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Plain = bool | int | float | str


def settings_of(value: Any) -> dict[str, Any]:
    """The arguments of an object that it keeps under their own names, where they are plain values.

    Rules and objectives among them, which a rule may be put on, count with their own arguments.
    """
    try:
        names = inspect.signature(type(value).__init__).parameters
    except (TypeError, ValueError):
        return {}
    kept = {name: getattr(value, name, None) for name in names}
    settings = {name: setting for name, setting in kept.items() if _is_plain(setting)}
    for name, part in kept.items():
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
    found: dict[str, Any] = {**others, **{f"rule.{k}": v for k, v in rule.items()}}
    found["optimizer"] = type(optimizer).__name__
    found |= {f"optimizer.{k}": v for k, v in optimizer.defaults.items() if _is_plain(v)}
    if scheduler is not None:
        found["scheduler"] = type(scheduler).__name__
        found |= {f"scheduler.{k}": v for k, v in scheduler.state_dict().items() if _is_plain(v)}
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
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


PARTS: dict[str, tuple[type, ...]] = {
    "settings": (dict,), "module": (dict,), "optimizer": (dict,), "rule": (dict,), "scheduler": (dict, type(None)),
    "precision": (dict,), "epoch": (int,), "step": (int,), "position": (int,), "batches": (dict,), "history": (list,),
    "scalars": (dict,), "seconds": (float, int), "stopper": (dict, type(None)), "callbacks": (list,), "random": (list,),
}  # fmt: skip
"""Parts of a checkpoint by name, with their types."""


def check_parts(saved: Mapping[str, Any], processes: int, batches: int | None) -> None:
    """Refuse a checkpoint that is not built as one.

    Args:
        saved: its content.
        processes: of the training that goes on.
        batches: of an epoch, where that is known.

    Raises:
        ValueError: at the first part that is odd.
    """
    if saved.get("format") != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {saved.get('format')!r}")
    for name, kinds in PARTS.items():
        part = saved.get(name, PARTS)
        if not isinstance(part, kinds) or isinstance(part, bool) or (int in kinds and not 0 <= part < float("inf")):
            raise ValueError(f"its {name} is no {kinds[0].__name__} that a training has: {str(part)[:40]!r}")
    sums, counts = saved["scalars"].get("sums"), saved["scalars"].get("counts")
    rows, stopper = saved["history"], saved["stopper"]
    conditions = {
        "settings": all(value is None or _is_plain(value) for value in saved["settings"].values()),
        "position": batches is None or saved["settings"].get("batches") != batches or saved["position"] <= batches,
        "history": all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows),
        "scalars": isinstance(sums, dict) and isinstance(counts, dict) and sums.keys() == counts.keys()
        and all(map(_is_number, (*sums.values(), *counts.values()))),
        "stopper": stopper is None or (_is_number(stopper.get("waited")) and {"best", "weights"} <= stopper.keys()),
        "callbacks": all(isinstance(kept, dict) for kept in saved["callbacks"]),
        "random": saved["settings"].get("processes") != processes or len(saved["random"]) == processes,
    }  # fmt: skip
    for name, holds in conditions.items():
        if not holds:
            raise ValueError(f"its {name} is not what a training keeps")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_network(saved: Mapping[str, Tensor], now: Mapping[str, Tensor], folder: Path) -> None:
    """Compare the weights of a checkpoint with the module's, by name, shape and type.

    Raises:
        ValueError: at the first that differs.
    """
    there, here = ({k: _kind(v) for k, v in state.items()} for state in (saved, now))
    odd = next((k for k in [*here, *there] if here.get(k) != there.get(k)), None)
    if odd is not None:
        raise ValueError(
            f"the checkpoint in {folder} is of another network: {odd} is {there.get(odd, 'not there')} in it "
            f"and {here.get(odd, 'not there')} now; give the same network and rule, or resume=False"
        )


def _kind(value: Any) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


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


@dataclass
class Keeper:
    """Writes all that the rest of a training depends on, and takes it back.

    Attributes:
        folder: of the checkpoints; `None` keeps nothing.
        fabric: the processes.
        state: of the training.
        batches: their order.
        scalars: sums of the epoch under way.
        stopper: early stopping, if there is any.
        callbacks: those with `state_dict` and `load_state_dict` are kept too.
        settings: see `fingerprint`.
        epoch_random: the random state at the beginning of the epoch under way.
        seconds: time spent in the epoch under way.
        saved: (step, epoch) of the last checkpoint.
    """

    folder: Path | None
    fabric: Fabric
    state: FitState
    batches: Batches
    scalars: Scalars
    stopper: EarlyStopping | None
    callbacks: tuple[Callable[..., Any], ...]
    settings: dict[str, Any]
    epoch_random: dict[str, Any] = field(default_factory=random_state)
    seconds: float = 0.0
    saved: tuple[int, int] | None = None

    def save(self) -> None:
        """Write a checkpoint, unless the last one is of this very moment. All processes take part."""
        state = self.state
        if self.folder is None or self.saved == (state.step, state.epoch):
            return
        self.scalars.read()
        sharded, world = is_sharded(self.fabric), self.fabric.world_size
        if world > 1 and not sharded:
            average_buffers(state.module)
        weights, states = self._weights(sharded)
        everyone = gather((random_state(), self.epoch_random), world)
        if self.fabric.is_global_zero:
            contents = self._contents() | {"module": weights, "optimizer": states, "random": everyone}
            save_checkpoint(self.folder, state.step, contents)
        self.fabric.barrier()
        self.saved = (state.step, state.epoch)

    def _weights(self, sharded: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """Weights and optimizer states, found finite."""
        state = self.state
        if sharded:
            weights, states = sharded_state(state.module, state.optimizer)
            check_finite(((f"weight {k}", v) for k, v in weights.items() if isinstance(v, Tensor)), state.step)
            return weights, states
        check_finite(named_values(state.module, state.optimizer), state.step)
        return state.module.state_dict(), state.optimizer.state_dict()

    def _contents(self) -> dict[str, Any]:
        state = self.state
        return {
            "format": FORMAT,
            "settings": self.settings,
            "rule": state.rule.state_dict(),
            "scheduler": state.scheduler.state_dict() if state.scheduler is not None else None,
            "precision": self.fabric.strategy.precision.state_dict(),
            "epoch": state.epoch,
            "step": state.step,
            "position": state.position,
            "batches": self.batches.state_dict(),
            "history": state.history.rows,
            "scalars": self.scalars.state_dict(),
            "seconds": self.seconds,
            "stopper": self.stopper.state_dict() if self.stopper is not None else None,
            "callbacks": [getattr(callback, "state_dict", dict)() for callback in self.callbacks],
        }

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other trainings. All processes take part.

        Raises:
            FolderInUse: in all of them, if another training holds it.
        """
        if self.folder is None:
            yield
            return
        with ExitStack() as stack:
            refused = None
            if self.fabric.is_global_zero:
                try:
                    stack.enter_context(exclusive(self.folder))
                except (FolderInUse, OSError) as error:
                    refused = error
            if self.fabric.world_size > 1:
                refused = self.fabric.broadcast(refused)
            if refused is not None:
                raise refused
            yield

    def restore(self, resume: bool) -> bool:
        """Go on from the newest readable checkpoint; true if there is one."""
        if self.stopper is not None:
            self.stopper.restart()
        if self.folder is None:
            return False
        if self.fabric.is_global_zero:
            clear_checkpoints(self.folder, all=not resume)
        self.fabric.barrier()
        return resume and self._take_up(self.folder)

    def _take_up(self, folder: Path) -> bool:
        """Load the newest checkpoint that can be, with a warning for each that is passed over.

        Raises:
            ValueError: if none can be, or one is of another training.
        """
        for path, saved in readable(folder):
            try:
                check_parts(saved, self.fabric.world_size, self.batches.count)
            except ValueError as error:
                warnings.warn(f"{path} cannot be read ({error}); trying the one before", stacklevel=2)
                continue
            check_same(saved["settings"], self.settings, folder)
            check_network(saved["module"], self.state.module.state_dict(), folder)
            try:
                self._load_weights(saved)
                self._load_rest(saved)
            except Exception as error:  # states of optimizers, rules and callbacks refuse in many ways
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"{path} cannot be taken up ({reason}); trying the one before", stacklevel=2)
                continue
            self.saved = (self.state.step, self.state.epoch)
            return True
        return False

    def _load_weights(self, saved: Mapping[str, Any]) -> None:
        state = self.state
        if is_sharded(self.fabric):
            load_sharded_state(state.module, state.optimizer, saved["module"], saved["optimizer"])
            return
        state.module.load_state_dict(saved["module"])
        state.optimizer.load_state_dict(saved["optimizer"])
        check_finite(named_values(state.module, state.optimizer), saved["step"])

    def _load_rest(self, saved: Mapping[str, Any]) -> None:
        state = self.state
        state.rule.load_state_dict(saved["rule"])
        if state.scheduler is not None and saved["scheduler"] is not None:
            state.scheduler.load_state_dict(saved["scheduler"])
        self.fabric.strategy.precision.load_state_dict(saved["precision"])
        state.epoch, state.step, state.position = saved["epoch"], saved["step"], saved["position"]
        self.batches.load_state_dict(saved["batches"])
        state.history.rows[:] = saved["history"]
        self.scalars.load_state_dict(saved["scalars"])
        self.seconds = saved["seconds"]
        if self.stopper is not None and saved["stopper"] is not None:
            self.stopper.load_state_dict(saved["stopper"])
        for callback, kept in zip(self.callbacks, saved["callbacks"], strict=False):
            if kept and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(kept)  # pyright: ignore[reportFunctionMemberAccess]
        now, self.epoch_random = saved["random"][self.fabric.global_rank]
        set_random_state(now)
