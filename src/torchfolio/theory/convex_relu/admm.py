"""The convex program over activation patterns by the alternating direction method of multipliers (Alg. 3.1).

Longer than most because its linear system can be solved in four ways, each the best for one shape of problem.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import between, positive
from torchfolio.theory.convergence import Convergence
from torchfolio.theory.convex_relu.program import (
    Loss,
    Solution,
    check_problem,
    convex_objective,
    data_loss,
    network_from_blocks,
)

__all__ = ["LinearSolver", "admm"]

LinearSolver = Literal["auto", "woodbury", "dense", "cg", "rbcd"]
"""Ways to solve the linear system of an iteration."""

LARGEST_FACTOR = 20_000  # a Cholesky factor of this side takes 3.2 GB in float64
OBJECTIVE_EVERY = 10
BALANCE_EVERY = 20


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
        max_iter: most iterations.
        tol: relative tolerance of the primal and the dual residual.
        linear_solver: how to minimise over $u$. `"woodbury"`: through $K$ as above, with Newton steps for `"bce"`;
            `"dense"` factors the whole matrix of side $2dP$ (squared loss); `"cg"`: preconditioned conjugate
            gradients (squared loss); `"rbcd"`: randomised block coordinate descent (Alg. 3.2), inexact, any smooth
            loss. `"auto"`: the smallest matrix to factor.
        cones: whether to keep the cone constraints. Without them this is the gated-ReLU relaxation, whose solution
            is not a ReLU network's.
        balance: halve or double `rho` (and `gamma` with it) every twenty iterations while one relative residual is
            over five times the other, in the first half of `max_iter`. Each change factors anew.
        start: `state` of an earlier solution with the same data and patterns.
        callback: called with the iteration and $[v, w]$ `[2, P, d]`.
        generator: of the blocks drawn by `"rbcd"`.

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
    make_step = partial(_u_step, linear_solver, X, y, M, gram, loss, generator=generator)
    step = make_step(rho)
    v, s, lam, nu = _start(start, X, M)
    # G's transpose of the slacks and of their dual; the latter follows by recursion without touching n-vectors.
    Gs, Gnu = (E * s) @ X, (E * nu) @ X
    pace = 1.0 if gamma is None else gamma / rho
    progress = Convergence("ADMM", tol=tol, max_iter=max_iter, advice={"dual": "lower rho", "primal": "raise rho"})
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
        primal = _norm(u - v) + _norm(Gu - s), max(_norm(u) + _norm(Gu), _norm(v) + _norm(s))
        dual = rho * (_norm(v - v_before) + _norm(Gs - Gs_before)), rho * (_norm(lam) + _norm(Gnu))
        progress.record({"primal": primal, "dual": dual}, rho=rho, **_objective_now_and_then(k, X, y, D, v, beta, loss))
        if callback is not None:
            callback(k, v)
        if balance and k % BALANCE_EVERY == 0 and k <= max_iter // 2:
            factor = _balance(primal, dual)
            if factor != 1:
                rho *= factor
                lam, nu, Gnu = lam / factor, nu / factor, Gnu / factor  # the duals are scaled by rho
                step = make_step(rho)
    hidden, output = network_from_blocks(v[0], v[1])
    objective = float(convex_objective(X, y, D, v, beta, loss))
    return Solution(hidden, output, objective, progress, v, (v, s, lam, nu))


def _norm(x: Tensor) -> float:
    return float(x.norm())


def _objective_now_and_then(
    k: int, X: Tensor, y: Tensor, D: Tensor, v: Tensor, beta: float, loss: Loss
) -> dict[str, float]:
    return {"objective": float(convex_objective(X, y, D, v, beta, loss))} if k % OBJECTIVE_EVERY == 0 else {}


def _balance(primal: tuple[float, float], dual: tuple[float, float]) -> float:
    """Factor on the penalty that brings the two residuals, relative to their scales, closer."""
    ours, theirs = primal[0] * dual[1], dual[0] * primal[1]
    return 2.0 if ours > 5 * theirs else 0.5 if theirs > 5 * ours else 1.0


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


class UStep(Protocol):
    """Minimises $\\ell(Fu, y) + \\frac\\rho2 (\\langle u, Bu \\rangle - 2 \\langle u, c \\rangle)$, $B = I + G^\\top G$."""

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """$u$ `[2, P, d]` and $Xu$ `[2, P, n]`."""
        ...


def _u_step(
    name: LinearSolver,
    X: Tensor,
    y: Tensor,
    M: Tensor,
    gram: Tensor,
    loss: Loss,
    rho: float,
    generator: torch.Generator | None,
) -> UStep:
    if name not in get_args(LinearSolver):
        raise ValueError(f"expected linear_solver to be one of {', '.join(get_args(LinearSolver))}, got {name!r}")
    if name in ("dense", "cg") and loss != "squared":
        raise ValueError(f"the linear solver {name} is for the squared loss, got {loss}; use woodbury or rbcd")
    if name == "auto":
        side = 2 * gram.shape[0] * len(M)
        if min(len(X), side) > LARGEST_FACTOR:
            name = "cg" if loss == "squared" else "rbcd"
        else:
            name = "woodbury" if len(X) < side or loss != "squared" else "dense"
    if name == "woodbury":
        return Woodbury(X, y, M, gram, loss, rho)
    if name == "rbcd":
        return BlockDescent(X, y, M, gram, loss, rho, generator)
    return (Dense if name == "dense" else ConjugateGradient)(X, y, M, gram, rho)


class Woodbury:
    """Eliminates $u$: with $q = \\ell'(Fu)$, $u = B^{-1}(c - F^\\top q / \\rho)$ and $Fu = z - Kq / \\rho$.

    For the squared loss $q = \\rho (\\rho I + K)^{-1} (z - y)$; otherwise Newton's method finds the minimiser of the
    convex function $\\ell(z - Kq / \\rho) + \\langle q, Kq \\rangle / 2\\rho$ from the last $q$.
    """

    def __init__(self, X: Tensor, y: Tensor, M: Tensor, gram: Tensor, loss: Loss, rho: float) -> None:
        self.X, self.y, self.M, self.rho = X, y, M, rho
        self.loss: Loss = loss
        eye = torch.eye(len(gram), dtype=X.dtype, device=X.device)
        self.B_inverse = torch.cholesky_inverse(torch.linalg.cholesky(eye + gram))
        self.XB = X @ self.B_inverse
        self.K = 2 * (self.XB @ X.T) * (M.T @ M)
        if loss == "squared":
            # The inverse, since PyTorch's solve with a factor copies it every time.
            shifted = self.K + rho * torch.eye(len(X), dtype=X.dtype, device=X.device)
            self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
        self.q = torch.zeros_like(y)

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        u = c @ self.B_inverse
        Xu = u @ self.X.T
        z = ((Xu[0] - Xu[1]) * self.M).sum(0)
        if self.loss == "squared":
            self.q = self.rho * (self.inverse @ (z - self.y))
        else:
            self.q = self._newton(z)
        # The correction of the two halves differs in sign only.
        shift = (self.M * (self.q / self.rho)) @ self.XB
        X_shift = shift @ self.X.T
        return torch.stack([u[0] - shift, u[1] + shift]), torch.stack([Xu[0] - X_shift, Xu[1] + X_shift])

    def _newton(self, z: Tensor, steps: int = 30) -> Tensor:
        K, q = self.K / self.rho, self.q
        eye = torch.eye(len(K), dtype=K.dtype, device=K.device)
        for _ in range(steps):
            prediction = z - K @ q
            slope = _slope(prediction, self.y)
            gap = q - slope
            if gap.norm() <= 1e-3 * torch.finfo(K.dtype).eps ** 0.5 * (1 + slope.norm()):
                break
            curvature = slope * (-2 * self.y - slope)
            move = torch.linalg.solve(eye + curvature[:, None] * K, gap)
            q = self._backtrack(q, move, z, K)
        return q

    def _backtrack(self, q: Tensor, move: Tensor, z: Tensor, K: Tensor) -> Tensor:
        def value(q: Tensor) -> float:
            Kq = K @ q
            return float(data_loss(z - Kq, self.y, self.loss) + q @ Kq / 2)

        before, length = value(q), 1.0
        while length > 1e-4 and value(q - length * move) > before:
            length /= 2
        return q - length * move


def _slope(prediction: Tensor, y: Tensor) -> Tensor:
    """Derivative of the cross-entropy; its own derivative is `slope * (-2 y - slope)`."""
    return -2 * y * torch.sigmoid(-2 * y * prediction)


class Dense:
    """Factors $A = B + F^\\top F / \\rho$ of side $2dP$ once: the paper's own step, for reference and small $dP$."""

    def __init__(self, X: Tensor, y: Tensor, M: Tensor, gram: Tensor, rho: float) -> None:
        self.X = X
        half = (M[:, :, None] * X).transpose(0, 1).flatten(1)  # [n, P d]
        matrix = torch.cat([half, -half], 1)
        blocks = torch.eye(2 * len(M), dtype=X.dtype, device=X.device)
        eye = torch.eye(len(matrix.T), dtype=X.dtype, device=X.device)
        A = eye + torch.kron(blocks, gram) + matrix.T @ matrix / rho
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(A))
        self.shift = matrix.T @ y / rho

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        u = (self.inverse @ (c.flatten() + self.shift)).view_as(c)
        return u, u @ self.X.T


class ConjugateGradient:
    """Solves $Au = c + F^\\top y / \\rho$ by conjugate gradients, preconditioned by $B$, from the last $u$."""

    def __init__(self, X: Tensor, y: Tensor, M: Tensor, gram: Tensor, rho: float) -> None:
        self.X, self.M, self.rho = X, M, rho
        self.B = torch.eye(len(gram), dtype=X.dtype, device=X.device) + gram
        self.B_inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.B))
        self.shift = self._transpose(y) / rho
        self.u = torch.zeros_like(self.shift)

    def _transpose(self, q: Tensor) -> Tensor:
        half = (self.M * q) @ self.X
        return torch.stack([half, -half])

    def _apply(self, u: Tensor) -> Tensor:
        prediction = ((u[0] - u[1]) @ self.X.T * self.M).sum(0)
        return u @ self.B + self._transpose(prediction) / self.rho

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        target = c + self.shift
        limit = 10 * torch.finfo(c.dtype).eps * _norm(target)
        residual = target - self._apply(self.u)
        direction = torch.zeros_like(residual)
        size = 1.0
        for _ in range(10 * len(self.X)):
            if _norm(residual) <= limit:
                break
            conditioned = residual @ self.B_inverse
            size, before = float((residual * conditioned).sum()), size
            direction = conditioned + size / before * direction
            image = self._apply(direction)
            length = size / float((direction * image).sum())
            self.u = self.u + length * direction
            residual = residual - length * image
        return self.u, self.u @ self.X.T


class BlockDescent:
    """Randomised block coordinate descent with Armijo's rule (Alg. 3.2), from the last $u$.

    A sweep visits all blocks, three at a time. Sweeps go on until the mean decrease of a visit falls below a limit
    that shrinks by 4 % with every call, so that the step grows exact as ADMM converges.
    """

    together = 3
    backtrack = 2.5
    sufficient = 1e-3
    most_sweeps = 30

    def __init__(
        self,
        X: Tensor,
        y: Tensor,
        M: Tensor,
        gram: Tensor,
        loss: Loss,
        rho: float,
        generator: torch.Generator | None,
    ) -> None:
        self.X, self.y, self.rho, self.generator = X, y, rho, generator
        self.loss: Loss = loss
        self.B = torch.eye(len(gram), dtype=X.dtype, device=X.device) + gram
        self.signed = torch.cat([M, -M])  # rows of F before X
        self.u = X.new_zeros(len(self.signed), X.shape[1])
        self.limit = 1e-3 * float(data_loss(torch.zeros_like(y), y, loss)) / len(self.signed)
        self.length = 1.0

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        blocks = c.flatten(0, 1)
        prediction = (self.u @ self.X.T * self.signed).sum(0)
        for _ in range(self.most_sweeps):
            decreases = []
            for chosen in torch.randperm(len(blocks), generator=self.generator).split(self.together):
                prediction, decrease = self._visit(chosen.to(self.X.device), blocks, prediction)
                decreases.append(decrease)
            if sum(decreases) / len(decreases) <= self.limit:
                break
        self.limit *= 0.96
        u = self.u.view_as(c)
        return u, u @ self.X.T

    def _visit(self, chosen: Tensor, c: Tensor, prediction: Tensor) -> tuple[Tensor, float]:
        signed, u = self.signed[chosen], self.u[chosen]
        slope = prediction - self.y if self.loss == "squared" else _slope(prediction, self.y)
        pull = self.rho * (u @ self.B - c[chosen])
        gradient = (signed * slope) @ self.X + pull
        # Along the gradient the objective is the loss of a line of predictions plus a quadratic.
        move = (gradient @ self.X.T * signed).sum(0)
        linear, quadratic = float((gradient * pull).sum()), self.rho * float((gradient * (gradient @ self.B)).sum())
        squared_norm = float(gradient.square().sum())
        before = float(data_loss(prediction, self.y, self.loss))
        self.length *= self.backtrack
        while self.length > 1e-12:
            after = float(data_loss(prediction - self.length * move, self.y, self.loss))
            decrease = before - after + self.length * linear - self.length**2 * quadratic / 2
            if decrease >= self.sufficient * self.length * squared_norm:
                self.u[chosen] = u - self.length * gradient
                return prediction - self.length * move, decrease
            self.length /= self.backtrack
        self.length = 1.0
        return prediction, 0.0
