"""Fixed-step methods for the probability flow in exponential form, laid out on a grid of times."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.dynamics.noise_schedules import Schedule
from torchfolio.dynamics.runge_kutta import RK4, Euler, ExplicitRungeKutta, Heun, Midpoint
from torchfolio.shown import Shown

__all__ = ["METHODS", "Method", "Node", "Plan", "make_plan"]

State = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """A place at which the network is evaluated.

    Attributes:
        time: time of the schedule.
        model_time: time that the network is told.
        alpha: share of signal.
        sigma: share of noise.
        scale: $\\alpha_t / \\alpha_T$, which takes y to x.
        weight: weight with which a quantity that is only summed up along the way counts here.
    """

    time: float
    model_time: float
    alpha: float
    sigma: float
    scale: float
    weight: float


@dataclass(frozen=True, slots=True)
class Plan:
    """A method on a grid: the nodes of every step, its length in rho, and that length over the one before."""

    method: Method
    nodes: list[list[Node]]
    lengths: list[float]
    ratios: list[float]


class Method(Shown, ABC):
    """A fixed-step method.

    Attributes:
        order: order of convergence.
        offsets: places of its nodes within a step.
        multistep: whether a step is handed the slope of the one before.
    """

    order: int
    offsets: tuple[float, ...] = (0.0,)
    multistep = False

    @abstractmethod
    def weights(self, lengths: Tensor) -> Tensor:
        """Of all nodes `[steps, nodes]`, for what is only summed up."""

    @abstractmethod
    def step(
        self,
        slope: Callable[[Node, State], State],
        nodes: list[Node],
        length: float,
        ratio: float,
        y: State,
        before: State | None,
    ) -> tuple[State, State | None]:
        """Go one step; returns the state and what the next step is handed."""


class RungeKutta(Method):
    """An explicit Runge-Kutta method by its tableau."""

    def __init__(self, solver: type[ExplicitRungeKutta]) -> None:
        self.order, tableau = int(solver.order), solver.tableau
        self.offsets, self.rows, self.b = tableau.c, ((), *tableau.a), tableau.b

    def weights(self, lengths: Tensor) -> Tensor:
        return lengths[:, None] * torch.tensor(self.b, dtype=lengths.dtype)

    def step(self, slope, nodes, length, ratio, y, before):
        slopes: list[State] = []
        for node, row in zip(nodes, self.rows, strict=True):
            slopes.append(slope(node, moved(y, slopes, row, length)))
        return moved(y, slopes, self.b, length), None


class AdamsBashforth2(Method):
    r"""$y + h[(1 + r/2) \varepsilon_n - (r/2) \varepsilon_{n-1}]$ with $r = h_n / h_{n-1}$; Euler's step at first."""

    order, multistep = 2, True

    def weights(self, lengths: Tensor) -> Tensor:
        extra = 0.5 * lengths[1:].square() / lengths[:-1]
        weights = lengths.clone()
        weights[1:] += extra
        weights[:-1] -= extra
        return weights[:, None]

    def step(self, slope, nodes, length, ratio, y, before):
        now = slope(nodes[0], y)
        if before is None:
            return moved(y, [now], (1.0,), length), now
        return moved(y, [now, before], (1 + ratio / 2, -ratio / 2), length), now


METHODS: dict[str, Method] = {
    "euler": RungeKutta(Euler),
    "midpoint": RungeKutta(Midpoint),
    "heun": RungeKutta(Heun),
    "rk4": RungeKutta(RK4),
    "ab2": AdamsBashforth2(),
}
"""Methods by name."""


def make_plan(schedule: Schedule, times: Tensor, method: Method, start: Tensor) -> Plan:
    """Nodes of a method on a grid of times, whichever way it goes.

    Args:
        schedule: schedule of the noise.
        times: grid `[steps + 1]`.
        method: method that walks along it.
        start: time T of the noise.
    """
    alpha_T, sigma_T = schedule.alpha(start), schedule.sigma(start)
    rho = alpha_T * schedule.sigma(times) / schedule.alpha(times) - sigma_T
    lengths = rho.diff()
    inner = rho[:-1, None] + lengths[:, None] * torch.tensor(method.offsets, dtype=rho.dtype)
    t = schedule.time(-torch.log((inner + sigma_T) / alpha_T))
    for k, offset in enumerate(method.offsets):  # at the ends of a step the times are known to the last bit
        if offset in (0.0, 1.0):
            t[:, k] = times[int(offset) : len(times) - 1 + int(offset)]
    alpha = schedule.alpha(t)
    values = torch.stack(
        [t, schedule.model_time(t), alpha, schedule.sigma(t), alpha / alpha_T, method.weights(lengths)], -1
    )
    nodes = [[Node(*node) for node in step] for step in values.tolist()]
    ratios = [0.0, *(lengths[1:] / lengths[:-1]).tolist()]
    return Plan(method, nodes, lengths.tolist(), ratios)


def moved(y: State, slopes: Sequence[State], weights: Sequence[float], length: float) -> State:
    for slope, weight in zip(slopes, weights, strict=True):
        if weight:
            y = tuple(torch.add(part, rate, alpha=weight * length) for part, rate in zip(y, slope, strict=True))
    return y
