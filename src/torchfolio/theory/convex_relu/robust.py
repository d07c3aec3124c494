"""The convex program, plain or robust to perturbed data, handed to a conic solver through CVXPY (section 5)."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torchfolio.checks import at_least, one_of
from torchfolio.errors import require
from torchfolio.theory.convergence import Convergence
from torchfolio.theory.convex_relu.program import Loss, Solution, check_problem, network_from_blocks

__all__ = ["Norm", "conic_program"]

Norm = Literal["inf", "2", "1"]
"""Norm of the ball around an input."""
DUAL: dict[str, Any] = {"inf": 1, "2": 2, "1": "inf"}


def conic_program(
    X: Tensor,
    y: Tensor,
    D: Tensor,
    *,
    beta: float = 1e-3,
    loss: Loss = "squared",
    epsilon: float = 0.0,
    norm: Norm = "inf",
    bias: bool = False,
    max_iter: int = 2000,
    tol: float = 1e-8,
    solver: str = "CLARABEL",
) -> Solution:
    """Train against the worst perturbation of every example by a convex program.

    With $g_k = \\sum_i D_{ki} (v_i - w_i)$ the network is $x^\\top g_k$ on the whole ball around $x_k$ as long as no
    neuron changes its pattern there, which the robust cones demand:
    $(2D_i - I) X v_i \\ge \\epsilon \\|v_i\\|_*$, and the same for $w_i$. Then the worst case over
    $\\|\\delta\\| \\le \\epsilon$ is known in closed form, and the program minimises it:

    - `"hinge"`: $\\frac1n \\sum_k (1 - y_k x_k^\\top g_k + \\epsilon \\|g_k\\|_*)_+$;
    - `"squared"`: $\\frac12 \\sum_k (|x_k^\\top g_k - y_k| + \\epsilon \\|g_k\\|_*)^2$;
    - `"bce"`: $\\sum_k \\log(1 + e^{-2 y_k x_k^\\top g_k + 2 \\epsilon \\|g_k\\|_*})$;

    plus $\\beta \\sum_i (\\|v_i\\|_2 + \\|w_i\\|_2)$. Its value is that of the recovered network under the worst
    perturbation, and bounds what non-convex adversarial training can reach from above. With `epsilon=0` it is the
    ordinary program.

    Args:
        X: data `[n, d]`. Up to about $nP = 10^5$ is practical.
        y: targets `[n]`; -1 and +1 for `"bce"` and `"hinge"`.
        D: patterns `[n, P]`, from `activation_patterns` with the same `epsilon`.
        beta: regularisation.
        loss: loss, see above.
        epsilon: radius of the ball.
        norm: norm of the ball, `"inf"`, `"2"` or `"1"`; $\\|\\cdot\\|_*$ is its dual.
        bias: whether the last column of `X` is a constant, which no one perturbs.
        max_iter: maximum number of iterations of the solver (of Clarabel and SCS).
        tol: its tolerance (of Clarabel and SCS).
        solver: one of CVXPY's that are installed.

    Returns:
        The solution, with blocks. The record has one row, the solver's last.

    Raises:
        MissingDependency: without CVXPY (extra `convex`).
        ValueError: on data that are not finite or settings out of range.
        RuntimeError: if the solver fails.

    Warns:
        ConvergenceWarning: if the solver stops short of its tolerance.

    Reference:
        Bai et al., section 5 and Alg. 5.1.
    """
    X, y = check_problem(X, y, beta, loss, D)
    at_least("epsilon", epsilon, 0)
    if norm not in get_args(Norm):
        raise ValueError(f"expected norm to be one of {', '.join(get_args(Norm))}, got {norm!r}")
    cp = require("cvxpy", "convex")
    one_of("solver", solver, cp.installed_solvers())
    variable, problem = _problem(cp, X, y, D, beta, loss, epsilon, DUAL[norm], bias)
    options = {
        "CLARABEL": {"max_iter": max_iter, "tol_gap_abs": tol, "tol_gap_rel": tol, "tol_feas": tol},
        "SCS": {"max_iters": max_iter, "eps_abs": tol, "eps_rel": tol},
    }
    # The long steps that Clarabel takes by default may end at the border of an exponential cone: shorter ones do not.
    shorter: list[dict[str, Any]] = [{"max_step_fraction": fraction} for fraction in (0.9, 0.7)]
    failed = None
    for own in [{}, *(shorter if solver == "CLARABEL" else [])]:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Solution may be inaccurate")  # the status says it
                problem.solve(solver=solver, **options.get(solver, {}), **own)
        except cp.SolverError as error:
            failed = error
        if problem.status in (cp.OPTIMAL, cp.USER_LIMIT):
            break
    if variable.value is None:
        raise RuntimeError(f"{solver} ended with the status {problem.status!r} and no solution") from failed
    progress = Convergence(solver, tol=0.0, max_iter=1)
    for _ in progress:
        # CVXPY gives no residuals: the status says whether they are within tolerance.
        short = float(problem.status != cp.OPTIMAL)
        progress.record({"shortfall": (short, 0.0)}, objective=float(problem.value))
    blocks = torch.as_tensor(variable.value).view(2, D.shape[1], X.shape[1]).to(X)
    blocks[blocks.norm(dim=-1) <= 10 * tol] = 0  # an interior-point solver never gives exact zeros
    hidden, output = network_from_blocks(blocks[0], blocks[1], threshold=1e-6)
    return Solution(hidden, output, float(problem.value), progress, blocks)


def _problem(
    cp: Any, X: Tensor, y: Tensor, D: Tensor, beta: float, loss: Loss, epsilon: float, dual: Any, bias: bool
) -> tuple[Any, Any]:
    """The variable $[v, w]$, `[2P, d]`, and the problem in it."""
    data, target, active = (t.detach().cpu().double().numpy() for t in (X, y, D))
    n, d = data.shape
    perturbed = d - int(bias)
    P = active.shape[1]
    blocks = cp.Variable((2 * P, d))  # v, then w
    fields = blocks @ data.T  # [2P, n]
    reach = cp.multiply(np.tile(2 * active - 1, 2).T, fields)
    if epsilon > 0:
        sizes = cp.norm(blocks[:, :perturbed], dual, axis=1)
        cones = reach >= epsilon * cp.reshape(sizes, (2 * P, 1), order="C") @ np.ones((1, n))
        g = active @ (blocks[:P] - blocks[P:])  # [n, d]
        prediction = cp.sum(cp.multiply(data, g), axis=1)
        worst = epsilon * cp.norm(g[:, :perturbed], dual, axis=1)
    else:
        cones, worst = reach >= 0, 0
        prediction = cp.sum(cp.multiply(np.concatenate([active, -active], 1).T, fields), axis=0)
    if loss == "hinge":
        fit = cp.sum(cp.pos(1 - cp.multiply(target, prediction) + worst)) / n
    elif loss == "bce":
        fit = cp.sum(cp.logistic(-2 * cp.multiply(target, prediction) + 2 * worst))
    else:
        # The absolute value would cost a variable and two constraints an example where nothing is added to it.
        miss = prediction - target
        fit = cp.sum_squares(cp.abs(miss) + worst if epsilon > 0 else miss) / 2
    size = cp.sum(cp.norm(blocks, 2, axis=1))
    return blocks, cp.Problem(cp.Minimize(fit + beta * size), [cones])
