"""Time of convex training: an ADMM iteration against its floor, and whole solves against a conic solver and Adam.

The table is scikit-learn's breast cancer data, standardised and scaled to rows of norm about 1. Timed in alternation in
one process, on one thread. With 400 examples and 40 patterns an iteration took 1.6 ms with `woodbury`, 25 to 35 times
as long with `dense` (factor of side 2,480 included, over twenty iterations) and 28 to 31 times with `cg`; the products
that it cannot avoid took a tenth. On 100 examples with 20 patterns 2,000 steps of Adam on as many neurons took 2.5 times
as long as ADMM and went lower, to 0.65 from 2.1: twenty random patterns are few in 31 dimensions (300 gave 0.76). Whole
solves beside CVXPY and Clarabel are in `torchfolio bench convex_relu`. Run it with

    python benchmarks/bench_convex_relu.py [--patterns 40] [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from torchfolio.data import load
from torchfolio.measure import alternate
from torchfolio.theory.convex_relu import (
    LinearSolver,
    Solution,
    activation_patterns,
    admm,
    conic_program,
    nonconvex_objective,
    sample_neurons,
    sampled_convex_program,
)

BETA = 0.05


def table(n: int) -> tuple[Tensor, Tensor]:
    x, y = load("breast_cancer", train_size=n).train.tensors
    x = x.double() / 30**0.5
    return torch.cat([x, torch.ones_like(x[:, :1])], 1), y.double() * 2 - 1


def iterations(X: Tensor, y: Tensor, D: Tensor, solver: LinearSolver, extra: int = 20) -> Callable[[], None]:
    """Twenty further iterations of a solver; the factorisation is timed with them, once."""
    state = admm(X, y, D, beta=BETA, max_iter=1, linear_solver=solver).state

    def go() -> None:
        admm(X, y, D, beta=BETA, max_iter=extra, tol=0.0, linear_solver=solver, start=state)

    return go


def floor(X: Tensor, D: Tensor, extra: int = 20) -> Callable[[], None]:
    """Four products of an iteration's size, twenty times: what no way of taking the step can avoid."""
    blocks = torch.randn(2 * D.shape[1], X.shape[1], dtype=X.dtype)

    def go() -> None:
        for _ in range(2 * extra):
            _ = blocks @ X.T @ X

    return go


def adam(X: Tensor, y: Tensor, width: int, steps: int = 2000) -> Tensor:
    """The objective after training the same network by Adam."""
    hidden = (torch.randn(width, X.shape[1], dtype=X.dtype) / X.shape[1] ** 0.5).requires_grad_()
    output = (torch.randn(width, dtype=X.dtype) / width**0.5).requires_grad_()
    optimizer = torch.optim.Adam([hidden, output], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nonconvex_objective(X, y, hidden, output, BETA).backward()
        optimizer.step()
    return nonconvex_objective(X, y, hidden.detach(), output.detach(), BETA)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patterns", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    torch.set_num_threads(1)
    X, y = table(400)
    D = activation_patterns(X, arguments.patterns, generator=torch.Generator().manual_seed(0))
    print(f"twenty iterations, {len(X)} examples, {X.shape[1]} columns, {D.shape[1]} patterns")
    solvers: tuple[LinearSolver, ...] = ("woodbury", "dense", "cg")
    timed: dict[str, Any] = {name: iterations(X, y, D, name) for name in solvers}
    print(alternate(**timed, floor=floor(X, D), repeats=arguments.rounds))

    X, y = table(100)
    D = activation_patterns(X, arguments.patterns // 2, generator=torch.Generator().manual_seed(0))
    neurons = sample_neurons(500, X.shape[1], torch.Generator().manual_seed(0))
    reached: dict[str, float] = {}

    def keep(name: str, value: Callable[[], float]) -> Callable[[], None]:
        return lambda: reached.update({name: value()})

    solves: dict[str, Any] = {
        "admm": keep("admm", lambda: _value(X, y, admm(X, y, D, beta=BETA, tol=1e-4, balance=True))),
        "scp": keep("scp", lambda: _value(X, y, sampled_convex_program(X, y, neurons, beta=BETA, tol=1e-2))),
        "adam": keep("adam", lambda: float(adam(X, y, 2 * D.shape[1]))),
    }
    if importlib.util.find_spec("cvxpy") is not None:
        solves["clarabel"] = keep("clarabel", lambda: _value(X, y, conic_program(X, y, D, beta=BETA)))
    print(f"whole solves, {len(X)} examples, {D.shape[1]} patterns")
    print(alternate(**solves, repeats=arguments.rounds))
    for name, value in reached.items():
        print(f"{name:>10}: objective of the network {value:.4f}")


def _value(X: Tensor, y: Tensor, solution: Solution) -> float:
    return float(nonconvex_objective(X, y, solution.hidden, solution.output, BETA))


if __name__ == "__main__":
    main()
