"""The convex program over activation patterns by the alternating direction method of multipliers (Alg. 3.1).

Longer than most because its linear system can be solved in four ways, each the best for one shape of problem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import between, positive
from torchfolio.theory.convergence import Convergence
from torchfolio.theory.convex_relu.program import Loss, Solution, check_problem, convex_objective, network_from_blocks
from torchfolio.theory.convex_relu.u_steps import (
    BlockDescent,
    ConjugateGradient,
    Dense,
    LinearSolver,
    UStep,
    Woodbury,
    make_u_step,
    norm,
)

__all__ = ["BlockDescent", "ConjugateGradient", "Dense", "LinearSolver", "UStep", "Woodbury", "admm"]


OBJECTIVE_EVERY = 10
BALANCE_FIRST = 20


def admm(
    X: Tensor,
    y: Tensor,
    D: Tensor,
    *,
    beta: float = 1e-3,
    loss: Loss = "squared",
    rho: float = 0.1,
    gamma: float | None = None,
    relaxation: float = 1.0,
    max_iter: int = 2000,
    tol: float = 1e-4,
    linear_solver: LinearSolver = "auto",
    cones: bool = True,
    balance: bool = False,
    start: tuple[Tensor, ...] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
    generator: torch.Generator | None = None,
) -> Solution:
    """Minimise the convex program over the patterns `D` by ADMM.

    Blocks $u$ carry the loss, their copies $v$ the norms, slacks $s$ the cones $G u = \\{(2D_i - I) X u_i\\} \\ge 0$:

    $$\\min \\ell(Fu, y) + \\beta \\|v\\|_{2,1} + \\mathbb 1[s \\ge 0] \\quad\\text{s.t.}\\quad u = v,\\; Gu = s.$$

    An iteration minimises over $u$, shrinks every $u_i + \\lambda_i$ by $\\beta / \\rho$ in norm to $v_i$, clips
    $Gu + \\nu$ to $s$, and moves the scaled duals $\\lambda, \\nu$ by $\\gamma / \\rho$ of the two gaps.

    The step over $u$ never forms $F$ or $G$: since $(2D_i - I)^2 = I$, $G^\\top G$ repeats $X^\\top X$, and with
    $B = I + X^\\top X$ the step is $u = B^{-1}(c - F^\\top q / \\rho)$ for an $n$-vector $q$ that solves a system in
    $K = FB^{-1}F^\\top = 2 (X B^{-1} X^\\top) \\circ D D^\\top$. The cost of an iteration is
    $O(ndP + d^2 P + n^2)$.

    Args:
        X: data `[n, d]`, with a column of ones for biases; rows of norm about 1 converge fastest.
        y: targets `[n]`; -1 and +1 for `"bce"`.
        D: patterns `[n, P]`.
        beta: regularisation $\\beta$.
        loss: `"squared"` or `"bce"`.
        rho: penalty $\\rho$.
        gamma: dual step $\\gamma$; `rho` by default.
        relaxation: over-relaxation $\\alpha$ in [1, 2) of $u$ and $Gu$ in the other updates, with the default `gamma`
            alone. 1 is the paper's method; 1.8 takes nearly half as many iterations to the same solution.
        max_iter: maximum number of iterations.
        tol: relative tolerance of the primal and the dual residual.
        linear_solver: way to minimise over $u$. `"woodbury"`: through $K$ as above, with Newton steps for `"bce"`;
            `"dense"` factors the whole matrix of side $2dP$ (squared loss); `"cg"`: preconditioned conjugate
            gradients (squared loss); `"rbcd"`: randomised block coordinate descent (Alg. 3.2), inexact, any smooth
            loss. `"auto"`: the smallest matrix to factor.
        cones: whether to keep the cone constraints. Without them this is the gated-ReLU relaxation, whose solution
            is not a ReLU network's.
        balance: after 20, 40, 80, … iterations, in the first half of `max_iter`, multiply `rho` (and `gamma` with it) by the
            root of the ratio of the relative residuals, by 10 at most, where one is over five times the other. The pauses
            grow so that residuals settle in between. Each change factors anew.
        start: `state` of an earlier solution with the same data and patterns.
        callback: function that is called with the iteration and $[v, w]$ `[2, P, d]`.
        generator: source of the blocks drawn by `"rbcd"`.

    Returns:
        The solution, its network recovered from $v$. The record has the columns `primal`, `dual`,
        `rho`, and `objective` (of $v$, every ten iterations).

    Warns:
        ConvergenceWarning: at `max_iter`.

    Raises:
        ValueError: on data that are not finite, settings out of range, or the hinge loss (not smooth: use
            `conic_program`).

    Reference:
        Bai et al., section 3. The elimination to $n \\times n$ is exact and replaces the paper's factorisation of
        side $2dP$.
    """
    X, y = check_problem(X, y, beta, loss, D)
    if loss == "hinge":
        raise ValueError("ADMM needs a smooth loss, squared or bce, got hinge; use the solver cvxpy")
    positive("rho", rho)
    if gamma is not None:
        positive("gamma", gamma)
    between("relaxation", relaxation, 1, 2, inclusive=(True, False))
    if relaxation != 1 and gamma is not None:
        raise ValueError(f"expected relaxation=1 with a gamma of its own, got {relaxation!r}")
    M = D.T.to(X)
    E = 2 * M - 1 if cones else torch.zeros_like(M)
    gram = X.T @ X if cones else torch.zeros_like(X.T @ X)
    make_step = partial(make_u_step, linear_solver, X, y, M, gram, loss, generator=generator)
    step = make_step(rho)
    v, s, lam, nu = _start(start, X, M)
    # G's transpose of the slacks and of their dual; the latter follows by recursion without touching n-vectors.
    Gs, Gnu = (E * s) @ X, (E * nu) @ X
    pace = 1.0 if gamma is None else gamma / rho
    progress = Convergence("ADMM", tol=tol, max_iter=max_iter, advice={"dual": "lower rho", "primal": "raise rho"})
    due = BALANCE_FIRST
    for k in progress:
        u, Xu = step(v - lam + Gs - Gnu)
        Gu, GGu = E * Xu, u @ gram
        far_u, far_Gu, far_GGu = u, Gu, GGu
        if relaxation != 1:
            far_u, far_Gu, far_GGu = v.lerp(u, relaxation), s.lerp(Gu, relaxation), Gs.lerp(GGu, relaxation)
        v_before, Gs_before = v, Gs
        v = _shrink(far_u + lam, beta / rho)
        s = F.relu(far_Gu + nu)
        Gs = (E * s) @ X
        lam = lam + pace * (far_u - v)
        nu = nu + pace * (far_Gu - s)
        Gnu = Gnu + pace * (far_GGu - Gs)
        primal = norm(u - v) + norm(Gu - s), max(norm(u) + norm(Gu), norm(v) + norm(s))
        dual = rho * (norm(v - v_before) + norm(Gs - Gs_before)), rho * (norm(lam) + norm(Gnu))
        progress.record({"primal": primal, "dual": dual}, rho=rho, **_objective_now_and_then(k, X, y, D, v, beta, loss))
        if callback is not None:
            callback(k, v)
        if balance and k == due and k <= max_iter // 2:
            factor, due = _balance(primal, dual), 2 * k
            if factor != 1:
                rho *= factor
                lam, nu, Gnu = lam / factor, nu / factor, Gnu / factor  # the duals are scaled by rho
                step = make_step(rho)
    hidden, output = network_from_blocks(v[0], v[1])
    objective = float(convex_objective(X, y, D, v, beta, loss))
    return Solution(hidden, output, objective, progress, v, (v, s, lam, nu))


def _objective_now_and_then(
    k: int, X: Tensor, y: Tensor, D: Tensor, v: Tensor, beta: float, loss: Loss
) -> dict[str, float]:
    return {"objective": float(convex_objective(X, y, D, v, beta, loss))} if k % OBJECTIVE_EVERY == 0 else {}


def _balance(primal: tuple[float, float], dual: tuple[float, float]) -> float:
    """Factor on the penalty that brings the two residuals, relative to their scales, closer."""
    ours, theirs = primal[0] * dual[1], dual[0] * primal[1]
    if ours <= 5 * theirs and theirs <= 5 * ours:
        return 1.0
    return min(max((ours / theirs) ** 0.5 if theirs else 10.0, 0.1), 10.0)


def _shrink(x: Tensor, by: float) -> Tensor:
    """Shorten every block by `by`, to zero at most: the proximal map of the norm."""
    norms = x.norm(dim=-1, keepdim=True)
    return x * F.relu(1 - by / norms.clamp_min(torch.finfo(x.dtype).tiny))


def _start(start: tuple[Tensor, ...] | None, X: Tensor, M: Tensor) -> tuple[Tensor, ...]:
    blocks, slacks = (2, len(M), X.shape[1]), (2, *M.shape)
    shapes = [blocks, slacks, blocks, slacks]
    if start is None:
        return tuple(X.new_zeros(shape) for shape in shapes)
    got = [tuple(t.shape) for t in start]
    if got != shapes:
        raise ValueError(f"expected a start of shapes {shapes}, as a solution's state has them, got {got}")
    return tuple(t.to(X) for t in start)
