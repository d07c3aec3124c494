"""Gradient descent on least squares in closed form: any number of steps, rate, momentum, penalty from one decomposition.

For $L(W) = \\|ZW - Y\\|_F^2 / (2N) + \\lambda \\|W\\|_F^2 / 2$ and the thin singular value decomposition
$Z = U \\, \\mathrm{diag}(\\sigma) V^\\top$, direction $v_k$ has the curvature $h_k = \\sigma_k^2 / N + \\lambda$, and what is
left of its error after t steps is $e_k(t) = (1 - \\eta h_k)^t$, or a recurrence of second order with momentum. Everything is
float64: at the interpolation threshold the smallest singular values, which float32 loses, make the peak of the test error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchfolio.checks import at_least, between, finite, positive
from torchfolio.shown import Shown

__all__ = ["Decomposition", "Path", "Projection", "gradient_descent_path"]


def decay(curvature: Tensor, steps: Tensor, lr: float, momentum: float = 0.0) -> tuple[Tensor, Tensor]:
    """The error left in each direction and the part learned, each to full relative precision as far as it can be.

    Args:
        curvature: $h_k \\ge 0$, `[r]`.
        steps: numbers of steps, whole or infinite, `[S]`.
        lr: learning rate.
        momentum: momentum of heavy-ball; the first step has none.

    Returns:
        $e_k(t)$ and $g_k(t) = 1 - e_k(t)$, `[S, r]`.
    """
    x, t = lr * curvature, steps[:, None]
    if momentum:
        learned = _heavy_ball(x, steps, momentum)
        left = 1 - learned
    else:
        # (1 - x)^t by logarithms: with x = 1e-12 and t = 1e6 the power itself has no correct digit.
        exponent = torch.where(x < 1, torch.log1p(-x.clamp_max(1)), (x - 1).abs().log())
        exponent = torch.where(x == 0, 0.0, t * exponent)
        odd = (x > 1) & (t.remainder(2) == 1)
        left = torch.where(odd, -1.0, 1.0) * exponent.exp()
        learned = torch.where(odd, 1 - left, -exponent.expm1())
    flat = (curvature == 0).expand_as(left)
    infinite = torch.isinf(t)
    left = torch.where(infinite, flat.to(left), left)
    return left, torch.where(infinite, 1 - flat.to(left), learned)


def _heavy_ball(x: Tensor, steps: Tensor, momentum: float) -> Tensor:
    """The part learned after t steps of momentum, by repeated squaring of the affine map of (learned, velocity).

    $v \\leftarrow \\mu v + x (1 - g)$ and $g \\leftarrow g + v$ from 0. In these coordinates nothing small is a difference
    of large numbers.
    """
    a, b, c, d = 1 - x, torch.full_like(x, momentum), -x, torch.full_like(x, momentum)
    power, offset = (a, b, c, d), (x, x)
    learned, velocity = (torch.zeros(len(steps), len(x)).to(x) for _ in range(2))
    whole = torch.where(torch.isinf(steps), 0, steps).long()
    while bool((whole > 0).any()):
        a, b, c, d = power
        odd = (whole % 2 == 1)[:, None]
        learned, velocity = (
            torch.where(odd, a * learned + b * velocity + offset[0], learned),
            torch.where(odd, c * learned + d * velocity + offset[1], velocity),
        )
        offset = (a * offset[0] + b * offset[1] + offset[0], c * offset[0] + d * offset[1] + offset[1])
        power = (a * a + b * c, a * b + b * d, c * a + d * c, c * b + d * d)
        whole = whole // 2
    return learned


class Projection(NamedTuple):
    """Points as a `Decomposition` sees them: features `[M, P]` and their coordinates $Z_* V$ `[M, r]`."""

    features: Tensor
    modes: Tensor


class Decomposition(Shown):
    """Least-squares problem taken apart once, for any number of `path`s.

    Args:
        Z: features `[N, P]`.
        Y: targets `[N, K]` or `[N]`.

    Attributes:
        singular_values: $\\sigma$, decreasing, `[min(N, P)]`; 0 where they are rounding.

    Raises:
        ValueError: if shapes do not fit, or values are not finite.
    """

    def __init__(self, Z: Tensor, Y: Tensor) -> None:
        Z, Y = torch.as_tensor(Z), torch.as_tensor(Y)
        if Z.dim() != 2 or Y.dim() not in (1, 2) or len(Z) != len(Y) or not Z.numel() or not Y.numel():
            raise ValueError(f"expected Z [N, P] and Y [N, K], got {tuple(Z.shape)} and {tuple(Y.shape)}")
        self.Z, self.Y = finite("Z", Z).detach().double(), finite("Y", Y).detach().double().reshape(len(Y), -1)
        self._u, sigma, self._vt = torch.linalg.svd(self.Z, full_matrices=False)
        rounding = max(Z.shape) * torch.finfo(torch.float64).eps * float(sigma[0])
        self.singular_values = torch.where(sigma > rounding, sigma, 0.0)

    @property
    def condition_number(self) -> float:
        """$\\sigma_1 / \\sigma_{\\min(N, P)}$, infinite where the features are linearly dependent."""
        first, last = float(self.singular_values[0]), float(self.singular_values[-1])
        return first / last if last else math.inf

    def limit(self, momentum: float = 0.0, l2: float = 0.0) -> float:
        """The learning rate from which on gradient descent diverges, $2 (1 + \\mu) / h_1$."""
        largest = float(self.singular_values[0]) ** 2 / len(self.Z) + l2
        return 2 * (1 + momentum) / largest if largest else math.inf

    def project(self, Z: Tensor) -> Projection:
        """Other points, in the form that many paths can use: features `[M, P]`.

        Raises:
            ValueError: if they have another number of features or values are not finite.
        """
        if Z.dim() != 2 or Z.shape[1] != self.Z.shape[1]:
            raise ValueError(f"expected features [M, {self.Z.shape[1]}], got {tuple(Z.shape)}")
        features = finite("Z", Z).detach().double()
        return Projection(features, features @ self._vt.T)

    def path(
        self,
        steps: float | Sequence[float] = math.inf,
        *,
        lr: float | None = None,
        momentum: float = 0.0,
        init: Tensor | None = None,
        l2: float = 0.0,
    ) -> Path:
        """Full-batch gradient descent; see `gradient_descent_path`."""
        between("momentum", momentum, 0, 1, inclusive=(True, False))
        at_least("l2", l2, 0)
        limit = self.limit(momentum, l2)
        if lr is None:
            lr = self.limit(0.0, l2) / 2 if math.isfinite(limit) else 1.0
        if not positive("lr", lr) < limit:
            raise ValueError(f"expected lr below {limit:.6g}, from where on gradient descent diverges, got {lr!r}")
        return Path(self, _step_tensor(steps, self.Z.device), float(lr), float(momentum), self._start(init), float(l2))

    def _start(self, init: Tensor | None) -> Tensor:
        shape = (self.Z.shape[1], self.Y.shape[1])
        if init is None:
            return torch.zeros(shape).to(self.Z)
        init = finite("init", init).detach().to(self.Z)
        if init.numel() != math.prod(shape):
            raise ValueError(f"expected init of shape {shape}, got {tuple(init.shape)}")
        return init.reshape(shape)


def _step_tensor(steps: float | Sequence[float], device: torch.device) -> Tensor:
    listed = [steps] if isinstance(steps, int | float) else list(steps)
    if not listed or not all(t > 0 and (math.isinf(t) or t == int(t)) for t in listed):
        raise ValueError(f"expected steps to be whole numbers above 0, or inf, got {steps!r}")
    return torch.tensor(listed, dtype=torch.float64, device=device)


@dataclass(frozen=True, eq=False, repr=False)
class Path(Shown):
    """Gradient descent at some numbers of steps.

    Attributes:
        decomposition: problem that it descends on.
        steps: numbers of steps, `[S]`.
        lr: learning rate.
        momentum: heavy-ball momentum.
        init: initial weights `[P, K]`.
        l2: ridge penalty.
    """

    decomposition: Decomposition
    steps: Tensor
    lr: float
    momentum: float
    init: Tensor
    l2: float

    @property
    def condition_number(self) -> float:
        """Condition number of the features."""
        return self.decomposition.condition_number

    def _modes(self, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Changes of the coordinates $V^\\top W$ and train residuals of the modes, `[S, r, K]`; decay off the modes, `[S]`."""
        problem, penalty = self.decomposition, len(self.decomposition.Z) * self.l2
        sigma = problem.singular_values[:, None]
        curvature = torch.cat(
            [problem.singular_values.square() / len(problem.Z) + self.l2, sigma.new_tensor([self.l2])]
        )
        left, learned = decay(curvature, steps, self.lr, self.momentum)
        gap, start = problem._u.T @ (problem.Y - problem.Z @ self.init), problem._vt @ self.init
        total = sigma.square() + penalty
        total = torch.where(total == 0, 1.0, total)
        e, g = left[:, :-1, None], learned[:, :-1, None]
        change = g * (sigma * gap - penalty * start) / total
        # Not gap - sigma * change, which near the optimum is a difference of equal numbers.
        dead = (sigma == 0).to(gap) * (penalty == 0)
        residual = gap * (e + g * (penalty / total + dead)) + g * penalty * sigma * start / total
        return change, residual, learned[:, -1]

    def weights(self, steps: float | None = None) -> Tensor:
        """The weights: `[S, P, K]` at all steps of the path, `[P, K]` at one number of steps (any, or `inf`)."""
        asked = self.steps if steps is None else _step_tensor(steps, self.steps.device)
        change, _, shrunk = self._modes(asked)
        basis = self.decomposition._vt
        outside = self.init - basis.T @ (basis @ self.init)
        weights = self.init + basis.T @ change - shrunk[:, None, None] * outside
        return weights if steps is None else weights[0]

    @property
    def train_loss(self) -> Tensor:
        """Mean squared error over samples and outputs, `[S]`; without the penalty."""
        problem = self.decomposition
        gap = problem.Y - problem.Z @ self.init
        outside = (gap - problem._u @ (problem._u.T @ gap)).square().sum()
        if len(problem.singular_values) == len(problem.Z):
            outside = 0 * outside  # U is a full basis: what is left is rounding
        return (self._modes(self.steps)[1].square().sum((1, 2)) + outside) / gap.numel()

    def predict(self, Z: Tensor | Projection) -> Tensor:
        """Outputs at features `[M, P]`, or their projection: `[S, M, K]`."""
        points = Z if isinstance(Z, Projection) else self.decomposition.project(Z)
        change, _, shrunk = self._modes(self.steps)
        output = points.modes @ change
        if bool(self.init.any()):
            start = points.features @ self.init
            outside = start - points.modes @ (self.decomposition._vt @ self.init)
            output = output + start - shrunk[:, None, None] * outside
        return output


def gradient_descent_path(
    Z: Tensor | Decomposition,
    Y: Tensor | None = None,
    steps: float | Sequence[float] = math.inf,
    lr: float | None = None,
    momentum: float = 0.0,
    init: Tensor | None = None,
    l2: float = 0.0,
) -> Path:
    """Full-batch gradient descent on $\\|ZW - Y\\|_F^2 / (2N) + \\lambda \\|W\\|_F^2 / 2$, in closed form.

    $$W^{(t)} = W^{(0)} + V \\mathrm{diag}\\Big(\\frac{1 - (1 - \\eta \\sigma_k^2 / N)^t}{\\sigma_k}\\Big) U^\\top
    (Y - Z W^{(0)})$$

    without a penalty; directions with $\\sigma_k = 0$ stay. Endless steps from 0 give the interpolator of least norm, or ridge
    regression.

    Args:
        Z: features `[N, P]`; or a `Decomposition`, to be used for many paths, in place of `Z` and `Y`.
        Y: targets `[N, K]` or `[N]`.
        steps: number of steps, or several, each at least 1; `inf` for the limit.
        lr: learning rate $\\eta$; by default the inverse of the largest curvature, half of where descent diverges.
        momentum: heavy-ball momentum $\\mu$ in [0, 1).
        init: initial weights `[P, K]`; 0 by default.
        l2: penalty $\\lambda$, at least 0.

    Raises:
        ValueError: if `lr` is too large (the message says the limit), steps are not above 0, or values are not finite.

    Example:
        >>> Z, Y = torch.eye(3), torch.ones(3, 1)
        >>> gradient_descent_path(Z, Y, steps=[1, math.inf], lr=1.5).train_loss
        tensor([0.2500, 0.0000], dtype=torch.float64)
    """
    if isinstance(Z, Decomposition) == (Y is not None):
        raise ValueError("expected features and targets, or a Decomposition, which holds both")
    problem = Z if isinstance(Z, Decomposition) else Decomposition(Z, Y)  # pyright: ignore[reportArgumentType]
    return problem.path(steps, lr=lr, momentum=momentum, init=init, l2=l2)
