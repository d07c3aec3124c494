"""Weights kept while a network trains: the last few of them, and their mean.

Pavel Izmailov, Dmitrii Podoprikhin, Timur Garipov, Dmitry Vetrov, Andrew Gordon Wilson, "Averaging Weights Leads to
Wider Optima and Better Generalization", UAI 2018, https://arxiv.org/abs/1803.05407, for the mean; several snapshots of
one training as members of an ensemble: Gao Huang et al., ICLR 2017, https://arxiv.org/abs/1704.00109.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchfolio.checks import whole
from torchfolio.engine import FitState
from torchfolio.shown import Shown

__all__ = ["Snapshots", "average_checkpoints"]

State = Mapping[str, Tensor]


class Snapshots(Shown):
    """A callback of `torchfolio.engine.fit` that keeps the network's state of the last epochs, on the CPU.

    Args:
        last: number of states to keep.
        every: epochs between them: those whose number is a multiple are kept.

    Attributes:
        states: state dicts, oldest first.

    Raises:
        ValueError: if a number is smaller than 1.

    Example:
        >>> snapshots = Snapshots(last=3)
        >>> fit(net, train, epochs=20, callbacks=[snapshots])
        >>> net.load_state_dict(average_checkpoints(snapshots.states))
    """

    def __init__(self, last: int = 3, every: int = 1) -> None:
        self.last, self.every = whole("last", last, 1), whole("every", every, 1)
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, state: FitState) -> None:
        if state.epoch_end and state.epoch % self.every == 0:
            copy = {name: value.detach().cpu().clone() for name, value in state.model.state_dict().items()}
            self.states = [*self.states, copy][-self.last :]

    def state_dict(self) -> dict[str, Any]:
        """The states, for checkpoints."""
        return {"states": self.states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was kept."""
        self.states = list(state["states"])


def average_checkpoints(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of state dicts of one network, name by name.

    Floating-point entries, running statistics of batch norm among them, are averaged (in double precision); whole
    numbers such as batch norm's counters are the last state's.

    Args:
        states: state dicts with equal names and shapes, oldest first.

    Returns:
        A new state dict of the entries' own types.

    Raises:
        ValueError: on no state, names or shapes that differ, or entries that are not finite.
    """
    if not states:
        raise ValueError("expected at least one state dict to average, got none")
    last = states[-1]
    for k, state in enumerate(states):
        odd = sorted(set(state) ^ set(last)) or [name for name in last if state[name].shape != last[name].shape]
        if odd:
            raise ValueError(f"expected state dicts of one network; state {k} differs from the last in {odd[0]}")
    return {name: _mean([state[name] for state in states], name) for name in last}


def _mean(values: Sequence[Tensor], name: str) -> Tensor:
    last = values[-1].detach()
    if not last.is_floating_point():
        return last.clone()
    mean = torch.stack([value.detach().to(last.device, torch.float64) for value in values]).mean(0).to(last.dtype)
    if not mean.isfinite().all():
        raise ValueError(f"expected finite weights to average, {name} holds NaN or infinite ones")
    return mean
