"""The solvable model of opposing signals: a two-layer linear network whose sharpening and spike are known exactly.

Features $(x, x_o)$: x has identity covariance; $x_o = \\pm\\sqrt{\\alpha / (p d_2)}\\,\\mathbf 1$ with probability $p/2$ each, else
0, along $u = \\mathbf 1/\\sqrt{d_2}$. The target $y = \\beta^\\top x + |\\mathbf 1^\\top x_o|/\\sqrt{d_2}$ depends on the size of the
outlier and not on its sign. The predictor is $f = c\\,(b^\\top x + b_o^\\top x_o)$, and with $s = u^\\top b_o$

$$L = \\tfrac12 \\lVert c b - \\beta \\rVert^2 + \\tfrac12 c^2 \\alpha s^2 + \\tfrac12 \\alpha.$$

Reference:
    Rosenfeld, Risteski, Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization, ICLR 2024
    (arXiv 2311.04163), Section 4; formulas derived again and checked by autograd.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchfolio.checks import at_least, between, finite, positive, whole
from torchfolio.shown import Shown

__all__ = ["ModelPath", "OpposingSignalModel"]

State = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, repr=False)
class ModelPath(Shown):
    """Gradient descent on the model, step by step, from the start on.

    Attributes:
        loss: $L$, `[T]`.
        delta: $\\delta = c s$, the predictor's answer to the outlier's sign, `[T]`.
        sharpness: top eigenvalue of the Hessian, `[T]`.
        conserved: $q = c^2 - \\lVert b \\rVert^2 - s^2$, `[T]`, which gradient flow leaves.
        state: $(c, b, b_o)$ at the end.
    """

    loss: Tensor
    delta: Tensor
    sharpness: Tensor
    conserved: Tensor
    state: State


class OpposingSignalModel:
    """The population loss of the two-layer linear network, with exact gradients and Hessians in float64.

    Args:
        d1: features of the signal.
        d2: features of the outlier.
        alpha: $E\\lVert x_o \\rVert^2 \\ge 0$.
        p: probability of an outlier, in (0, 1].
        beta: norm of $\\beta$, along a random direction, or $\\beta$ itself `[d1]`.
        seed: seed of the direction.
    """

    def __init__(self, d1: int, d2: int, alpha: float, p: float, beta: float | Tensor, *, seed: int = 0) -> None:
        self.d1, self.d2 = whole("d1", d1, 1), whole("d2", d2, 1)
        self.alpha, self.p = at_least("alpha", alpha, 0), between("p", p, 0, 1, inclusive=(False, True))
        if not isinstance(beta, Tensor):
            direction = torch.randn(d1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            beta = positive("beta", beta) * direction / direction.norm()
        if beta.shape != (d1,):
            raise ValueError(f"expected beta of {d1} numbers, got shape {tuple(beta.shape)}")
        self.beta = finite("beta", beta).double()
        self.u = torch.full((d2,), d2**-0.5, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"OpposingSignalModel({self.d1}, {self.d2}, {self.alpha}, {self.p}, beta={float(self.beta.norm()):g})"

    def start(self, c: float = 0.5, scale: float = 0.5, *, generator: torch.Generator | None = None) -> State:
        """An initial state: c, and $b, b_o \\sim$ scale $\\cdot N(0, 1/(d_1 + d_2))$."""
        draws = torch.randn(self.d1 + self.d2, generator=generator, dtype=torch.float64)
        draws *= scale / math.sqrt(self.d1 + self.d2)
        return torch.tensor(c, dtype=torch.float64), draws[: self.d1], draws[self.d1 :]

    def loss(self, c: Tensor, b: Tensor, b_o: Tensor) -> Tensor:
        """The population loss."""
        s = self.u @ b_o
        return 0.5 * (c * b - self.beta).square().sum() + 0.5 * c**2 * self.alpha * s**2 + 0.5 * self.alpha

    def grad(self, c: Tensor, b: Tensor, b_o: Tensor) -> State:
        """Gradient in $(c, b, b_o)$."""
        s, rest = self.u @ b_o, c * b - self.beta
        return b @ rest + c * self.alpha * s**2, c * rest, c**2 * self.alpha * s * self.u

    def hessian(self, c: Tensor, b: Tensor, b_o: Tensor) -> Tensor:
        """Hessian in $(c, b, b_o)$, `[1 + d1 + d2, 1 + d1 + d2]`."""
        s, n = self.u @ b_o, 1 + self.d1 + self.d2
        H = torch.zeros(n, n, dtype=torch.float64)
        signal, outlier = slice(1, 1 + self.d1), slice(1 + self.d1, n)
        H[0, 0] = b @ b + self.alpha * s**2
        H[0, signal] = H[signal, 0] = 2 * c * b - self.beta
        H[0, outlier] = H[outlier, 0] = 2 * c * self.alpha * s * self.u
        H[signal, signal] = c**2 * torch.eye(self.d1, dtype=torch.float64)
        H[outlier, outlier] = c**2 * self.alpha * torch.outer(self.u, self.u)
        return H

    def sharpness(self, c: Tensor, b: Tensor, b_o: Tensor) -> float:
        """Top eigenvalue of the Hessian."""
        return float(torch.linalg.eigvalsh(self.hessian(c, b, b_o))[-1])

    def group_losses(self, c: Tensor, b_o: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the two groups' outlier part, $\\ell_\\pm = \\frac{\\alpha}{2p} (\\delta \\mp 1)^2$ with $\\delta = c s$.

        At $\\delta = 0$ their gradients in $b_o$ are exactly opposite.
        """
        delta = c * (self.u @ b_o)
        return self.alpha / (2 * self.p) * (delta - 1) ** 2, self.alpha / (2 * self.p) * (delta + 1) ** 2

    def conserved(self, c: Tensor, b: Tensor, b_o: Tensor) -> Tensor:
        """$q = c^2 - \\lVert b \\rVert^2 - s^2$, which gradient flow leaves as it is."""
        return c**2 - b @ b - (self.u @ b_o) ** 2

    def final_sharpness(self, c: Tensor, b: Tensor, b_o: Tensor) -> float:
        """Sharpness at the minimum that gradient flow reaches from a state, $\\max(c_\\infty^2 \\alpha, c_\\infty^2 + \\lVert\\beta\\rVert^2 / c_\\infty^2)$."""
        q, size = float(self.conserved(c, b, b_o)), float(self.beta @ self.beta)
        squared = (q + math.sqrt(q**2 + 4 * size)) / 2
        return max(squared * self.alpha, squared + size / squared)

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """A finite sample: inputs `[n, d1 + d2]`, targets `[n]`, and the sign of the outlier (0 for none) `[n]`."""
        whole("n", n, 1)
        x = torch.randn(n, self.d1, generator=generator, dtype=torch.float64)
        draw = torch.rand(n, generator=generator, dtype=torch.float64)
        sign = (draw < self.p / 2).double() - ((draw >= self.p / 2) & (draw < self.p)).double()
        size = math.sqrt(self.alpha / self.p)
        return torch.cat([x, sign[:, None] * size * self.u], 1), x @ self.beta + sign.abs() * size, sign

    def simulate(self, lr: float, steps: int, start: State, *, every: int = 1) -> ModelPath:
        """Gradient descent on the population loss.

        Args:
            lr: $\\eta$; a small one follows gradient flow.
            steps: number of steps of gradient descent.
            start: $(c, b, b_o)$.
            every: steps between records.
        """
        positive("lr", lr)
        c, b, b_o = (t.clone() for t in start)
        rows = []
        for step in range(whole("steps", steps, 0) + 1):
            if step % every == 0 or step == steps:
                values = (
                    self.loss(c, b, b_o),
                    c * (self.u @ b_o),
                    self.sharpness(c, b, b_o),
                    self.conserved(c, b, b_o),
                )
                rows.append([float(value) for value in values])
            if step < steps:
                c, b, b_o = (t - lr * g for t, g in zip((c, b, b_o), self.grad(c, b, b_o), strict=True))
        columns = torch.tensor(rows, dtype=torch.float64).T
        return ModelPath(columns[0], columns[1], columns[2], columns[3], (c, b, b_o))
