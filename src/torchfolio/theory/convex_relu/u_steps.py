"""Ways to take the step in $u$ of ADMM, exactly or nearly."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from torchfolio.shown import Shown
from torchfolio.theory.convex_relu.program import Loss, data_loss

__all__ = ["LinearSolver", "make_u_step"]

LinearSolver = Literal["auto", "woodbury", "dense", "cg", "rbcd"]
"""Ways to solve the linear system of an iteration."""


LARGEST_FACTOR = 20_000  # a Cholesky factor of this side takes 3.2 GB in float64


class UStep(Protocol):
    """Minimises $\\ell(Fu, y) + \\frac\\rho2 (\\langle u, Bu \\rangle - 2 \\langle u, c \\rangle)$, $B = I + G^\\top G$."""

    def __call__(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """$u$ `[2, P, d]` and $Xu$ `[2, P, n]`."""
        ...


def make_u_step(
    name: LinearSolver,
    X: Tensor,
    y: Tensor,
    M: Tensor,
    gram: Tensor,
    loss: Loss,
    rho: float,
    generator: torch.Generator | None,
) -> UStep:
    """The step of ADMM that minimises the loss over the weights, by the named solver of its linear system."""
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


class Woodbury(Shown):
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


class Dense(Shown):
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


class ConjugateGradient(Shown):
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
        limit = 10 * torch.finfo(c.dtype).eps * norm(target)
        residual = target - self._apply(self.u)
        direction = torch.zeros_like(residual)
        size = 1.0
        for _ in range(10 * len(self.X)):
            if norm(residual) <= limit:
                break
            conditioned = residual @ self.B_inverse
            size, before = float((residual * conditioned).sum()), size
            direction = conditioned + size / before * direction
            image = self._apply(direction)
            length = size / float((direction * image).sum())
            self.u = self.u + length * direction
            residual = residual - length * image
        return self.u, self.u @ self.X.T


class BlockDescent(Shown):
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


def norm(x: Tensor) -> float:
    return float(x.norm())
