"""Going on from checkpoints: whether one is whole and of this training, and who may write there."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from torchfolio.engine.checkpoint import FORMAT, clear_checkpoints, readable, save_checkpoint
from torchfolio.engine.fingerprint import check_same, is_plain
from torchfolio.engine.lock import FolderInUse, exclusive
from torchfolio.engine.training_state import TrainingState

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
        processes: number of processes of the training that goes on.
        batches: batches of an epoch, where that is known.

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
        "settings": all(value is None or is_plain(value) for value in saved["settings"].values()),
        "position": batches is None or saved["settings"].get("batches") != batches or saved["position"] <= batches,
        "history": all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows),
        "scalars": isinstance(sums, dict) and isinstance(counts, dict) and sums.keys() == counts.keys()
        and all(map(_is_number, (*sums.values(), *counts.values()))),
        "stopper": stopper is None or (_is_number(stopper.get("waited")) and {"best", "weights"} <= stopper.keys()),
        "callbacks": all(isinstance(state, dict) for state in saved["callbacks"]),
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


class Checkpoints:
    """The checkpoints of one training, in a folder that it holds alone.

    Args:
        folder: folder that they are in; `None` keeps nothing.
        state: training.
        settings: settings, see `fingerprint`.
    """

    def __init__(self, folder: Path | None, state: TrainingState, settings: dict[str, Any]) -> None:
        self.folder, self.state, self.settings = folder, state, settings
        self._last: tuple[int, int] | None = None  # (step, epoch) of the last one

    def save(self) -> None:
        """Write a checkpoint, unless the last one is of this very moment. All processes take part."""
        state = self.state
        if self.folder is None or self._last == (state.step, state.epoch):
            return
        contents = {"format": FORMAT, "settings": self.settings, **state.state_dict()}
        if state.fabric.is_global_zero:
            save_checkpoint(self.folder, state.step, contents)
        state.fabric.barrier()
        self._last = (state.step, state.epoch)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the folder against other trainings. All processes take part.

        Raises:
            FolderInUse: in all of them, if another training holds it.
        """
        if self.folder is None:
            yield
            return
        fabric = self.state.fabric
        with ExitStack() as stack:
            refused = None
            if fabric.is_global_zero:
                try:
                    stack.enter_context(exclusive(self.folder))
                except (FolderInUse, OSError) as error:
                    refused = error
            if fabric.world_size > 1:
                refused = fabric.broadcast(refused)
            if refused is not None:
                raise refused
            yield

    def restore(self, resume: bool) -> bool:
        """Go on from the newest readable checkpoint; true if there is one. All processes take part."""
        if self.folder is None:
            return False
        fabric = self.state.fabric
        if fabric.is_global_zero:
            clear_checkpoints(self.folder, all=not resume)
        fabric.barrier()
        return resume and self._take_up(self.folder)

    def _take_up(self, folder: Path) -> bool:
        """Load the newest checkpoint that can be, with a warning for each that is passed over.

        Raises:
            ValueError: if none can be, or one is of another training.
        """
        state = self.state
        for path, saved in readable(folder):
            try:
                check_parts(saved, state.fabric.world_size, state.batches.count)
            except ValueError as error:
                warnings.warn(f"{path} cannot be read ({error}); trying the one before", stacklevel=2)
                continue
            check_same(saved["settings"], self.settings, folder)
            check_network(saved["module"], state.module.state_dict(), folder)
            try:
                state.load_state_dict(saved)
            except Exception as error:  # states of optimizers, rules and callbacks refuse in many ways
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"{path} cannot be taken up ({reason}); trying the one before", stacklevel=2)
                continue
            self._last = (state.step, state.epoch)
            return True
        return False
