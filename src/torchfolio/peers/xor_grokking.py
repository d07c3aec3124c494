"""Training from given points and initial weights: the dual form against gradient descent on the weights."""

from __future__ import annotations

from typing import Any

from torchfolio.experiments._descent_on_weights import primal_steps
from torchfolio.experiments.xor_grokking import Settings, problem
from torchfolio.theory.xor_grokking import DualGD


def peers(bench: Any) -> None:
    train, _, network = problem(Settings(), 0)
    train.x  # noqa: B018  # both begin with the points in memory

    def ours(steps: int) -> None:
        dual = DualGD(train, network, 5e-5)
        for _ in range(steps):
            dual.step()
        dual.weight()

    for steps in (20, 200):
        bench.compare(
            f"{steps} steps and the weights, 200 points, p = 20,000, 200 neurons",
            repeats=3,
            ours=lambda steps=steps: ours(steps),
            primal=lambda steps=steps: primal_steps(train, network, 5e-5, steps),
        )
