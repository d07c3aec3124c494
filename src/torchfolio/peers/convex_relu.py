"""Whole solves beside the program written plainly in CVXPY and solved by Clarabel.

ADMM stops at objectives (of the recovered networks) within 2e-4 of Clarabel's.
"""

from __future__ import annotations

import torch

from torchfolio.experiments._convex_solver_times import plain_cvxpy
from torchfolio.experiments._two_class_tables import with_bias
from torchfolio.runs.bench import Bench
from torchfolio.theory.convex_relu import activation_patterns, admm, conic_program


def peers(bench: Bench) -> None:
    for n, d, patterns in ((60, 31, 10), (100, 20, 20), (400, 31, 20)):
        generator = torch.Generator().manual_seed(0)
        X = with_bias(torch.randn(n, d - 1, generator=generator, dtype=torch.float64) / (d - 1) ** 0.5)
        y = torch.sign(X @ torch.randn(d, generator=generator, dtype=torch.float64))
        D = activation_patterns(X, patterns, generator=generator)
        solve = lambda X=X, y=y, D=D: admm(X, y, D, beta=0.05, tol=1e-3, relaxation=1.8)  # noqa: E731
        plain = lambda X=X, y=y, D=D: plain_cvxpy(X, y, D, 0.05)  # noqa: E731
        bench.compare(f"ADMM, {n} x {d}, {D.shape[1]} patterns", ours=solve, cvxpy=plain)
        if n == 100:
            conic = lambda X=X, y=y, D=D: conic_program(X, y, D, beta=0.05)  # noqa: E731
            bench.compare(f"conic program, {n} x {d}, {D.shape[1]} patterns", ours=conic, cvxpy=plain)
