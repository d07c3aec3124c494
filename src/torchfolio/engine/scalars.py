"""The named scalars of the steps: averaged over an epoch, watched for NaN, read seldom where that is slow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.engine.sync import mean_over_processes
from torchfolio.errors import TorchfolioError

PATIENCE = 16  # steps between readings where a reading costs a synchronisation


class NonFiniteLoss(TorchfolioError, ArithmeticError):
    """A scalar of the training, or a weight, became NaN or infinite; training stopped there.

    Args:
        step: optimizer step, from 1.
        name: scalar that the rule returned, or the weight.
        value: NaN or an infinity.
    """

    def __init__(self, step: int, name: str, value: float) -> None:
        self.step, self.name, self.value = step, name, value
        super().__init__(
            f"{name} is {value} at step {step}; expected a finite number. Try a smaller learning "
            "rate, clip_norm, or look at the inputs"
        )

    def __reduce__(self) -> tuple[type[NonFiniteLoss], tuple[int, str, float]]:
        return type(self), (self.step, self.name, self.value)


class Scalars:
    """Collects what the rule returns.

    On a CPU every step is read at once. On other devices, and with several processes, the values stay where
    they are for some steps and are then read (and averaged) together: a NaN is still found at its own step,
    at most `PATIENCE` steps later.

    Args:
        device: device of training.
        world: number of processes.
    """

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world = device, world
        self.immediate = device.type == "cpu" and world == 1
        self.waiting: list[tuple[int, str, Tensor | float]] = []
        self.latest: dict[str, float] = {}
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Take the scalars of a step."""
        if "loss" not in values:
            raise ValueError(f"expected the rule's step to return a 'loss', got {', '.join(values) or 'nothing'}")
        self.waiting += [(step, n, v.detach() if isinstance(v, Tensor) else float(v)) for n, v in values.items()]

    def due(self, step: int) -> bool:
        """Whether it is time to read."""
        return self.immediate or step % PATIENCE == 0

    def read(self, flags: Sequence[bool] = ()) -> list[bool]:
        """Add what waits to the epoch's sums.

        Args:
            flags: flags of this process.

        Returns:
            Each flag, true if it is on any process.

        Raises:
            NonFiniteLoss: at the first value that is not finite, on all processes alike.
        """
        numbers, agreed = self._numbers(flags)
        waiting, self.waiting = self.waiting, []
        for (step, name, _), number in zip(waiting, numbers, strict=True):
            if not math.isfinite(number):
                raise NonFiniteLoss(step, name, number)
            self.latest[name] = number
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1
        return agreed

    def _numbers(self, flags: Sequence[bool]) -> tuple[list[float], list[bool]]:
        if self.immediate or (self.world == 1 and not self.waiting):
            return [float(value) for _, _, value in self.waiting], list(flags)
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        values = [torch.as_tensor(v, dtype=exact, device=self.device) for v in (*(w[2] for w in self.waiting), *flags)]
        numbers = mean_over_processes(torch.stack(values), self.world).tolist() if values else []
        cut = len(self.waiting)
        return numbers[:cut], [n > 0 for n in numbers[cut:]]

    def means(self) -> dict[str, float]:
        """The mean of every scalar over the steps since `clear`."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}

    def clear(self) -> None:
        """Begin a new epoch."""
        self.sums, self.counts = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch under way."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
