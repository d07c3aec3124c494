"""What a training step of a spiking network costs by several rules: memory by the length of the sequence, and time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from torch import Tensor, nn

from torchfolio.engine.recipes import sgd
from torchfolio.measure import alternate, saved_bytes
from torchfolio.runs.bench import training_step
from torchfolio.spiking.bptt import SequenceRule

__all__ = ["peaks_by_length", "step_times"]


def peaks_by_length(
    make: Callable[[], nn.Module],
    rules: Mapping[str, Callable[[int], SequenceRule]],
    lengths: Sequence[int],
    batch: tuple[Tensor, Tensor],
) -> dict[str, object]:
    """Peak megabytes that one batch saves for backward, at every number of steps.

    Args:
        make: makes the network.
        rules: makers of rules by name; each is given the number of steps.
        lengths: numbers of steps.
        batch: inputs and labels.
    """
    peaks: dict[str, object] = {}
    for name, rule_of in rules.items():
        values = []
        for timesteps in lengths:
            rule = rule_of(timesteps)
            net = rule.prepare(make(), batch)
            saved = saved_bytes(lambda rule=rule: rule.step(batch, Tensor.backward), exclude=net)
            values.append(saved.peak / 1e6)
        peaks[name] = values
    return peaks


def step_times(
    make: Callable[[], nn.Module],
    rules: Mapping[str, SequenceRule],
    batch: tuple[Tensor, Tensor],
    momentum: float,
    rounds: int,
) -> dict[str, float]:
    """Milliseconds of a training step by every rule, and their ratios to the first one's, timed in turn.

    Args:
        make: makes the network.
        rules: rules by name.
        batch: inputs and labels.
        momentum: momentum of SGD.
        rounds: rounds of timing.
    """
    optimizer = sgd(1e-3, momentum, nesterov=False)
    nets = {name: make() for name in rules}
    steps: dict[str, Any] = {name: training_step(nets[name], batch, rule, optimizer) for name, rule in rules.items()}
    timed = alternate(**steps, repeats=rounds)
    times = {f"{name}_ms": 1e3 * median(timed.seconds[name]) for name in rules}
    return times | {f"{name}_ratio": timed.ratio(name) for name in list(rules)[1:]}
