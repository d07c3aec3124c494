"""Sampled convex programs (Alg. 4.1): a lasso over random neurons."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.theory.convergence import Convergence
from torchfolio.theory.convex_relu.program import Loss, Solution, check_problem, data_loss

__all__ = ["sample_neurons", "sampled_convex_program"]


def sample_neurons(n: int, d: int, generator: torch.Generator | None = None) -> Tensor:
    """`n` directions, uniform on the unit sphere of $\\mathbb R^d$; `[n, d]` in float64, drawn on the CPU.

    With a generator of one seed the first rows are the same for any `n`.
    """
    if n < 1 or d < 1:
        raise ValueError(f"expected at least one neuron and one feature, got n={n} and d={d}")
    # Row by row: a block of another size would be filled in another order.
    rows = [torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(n)]
    return F.normalize(torch.stack(rows), dim=1)


def sampled_convex_program(
    X: Tensor,
    y: Tensor,
    neurons: Tensor,
    *,
    beta: float = 1e-3,
    loss: Loss = "squared",
    max_iter: int = 2000,
    tol: float = 1e-4,
    start: tuple[Tensor, ...] | None = None,
) -> Solution:
    """Weigh given neurons $u_i$ of unit norm by a lasso,

    $$\\min_\\alpha \\ell\\Bigl(\\sum_i (X u_i)_+ \\alpha_i, y\\Bigr) + \\beta \\|\\alpha\\|_1,$$

    by FISTA, restarted where momentum points uphill. A weight $\\alpha_i$ gives a neuron
    $u_i \\sqrt{|\\alpha_i|}$ with output weight $\\operatorname{sign}(\\alpha_i) \\sqrt{|\\alpha_i|}$, for which the
    non-convex objective has the same value. With many neurons it tends to the global optimum; `patterns_needed` says
    how many make a further one useless with high probability.

    Args:
        X: data `[n, d]`, with a column of ones for biases.
        y: targets `[n]`; -1 and +1 for `"bce"`.
        neurons: $u_i$ `[N, d]`, from `sample_neurons`.
        beta: regularisation.
        loss: `"squared"` or `"bce"`.
        max_iter: maximum number of iterations.
        tol: tolerance on the optimality of $\\alpha$: the largest violation of a subgradient condition, over `beta`.
        start: `state` of an earlier solution whose neurons were the first of these.

    Returns:
        The solution; `state` is $(\\alpha)$. The record has the columns `optimality` and `objective`.

    Warns:
        ConvergenceWarning: at `max_iter`.

    Raises:
        ValueError: on data that are not finite, settings out of range, or the hinge loss (not smooth).

    Reference:
        Bai et al., section 4.
    """
    X, y = check_problem(X, y, beta, loss)
    if loss == "hinge":
        raise ValueError("sampled programs need a smooth loss, squared or bce, got hinge; use the solver cvxpy")
    if neurons.ndim != 2 or neurons.shape[1] != X.shape[1]:
        raise ValueError(f"expected neurons of shape [N, {X.shape[1]}], got {tuple(neurons.shape)}")
    neurons = neurons.to(X)
    features = F.relu(X @ neurons.T)
    alpha = X.new_zeros(len(neurons))
    if start is not None:
        if start[0].ndim != 1 or len(start[0]) > len(alpha):
            raise ValueError(f"expected a start of at most {len(alpha)} weights, got {tuple(start[0].shape)}")
        alpha[: len(start[0])] = start[0]
    progress = Convergence("FISTA", tol=tol, max_iter=max_iter)
    # Both losses have a second derivative of at most 1.
    lipschitz = float(torch.linalg.matrix_norm(features, 2)) ** 2 or 1.0
    _fista(features, y, alpha, beta, loss, 1 / lipschitz, progress)
    active = alpha != 0
    root = alpha[active].abs().sqrt()
    objective = float(data_loss(features @ alpha, y, loss) + beta * alpha.abs().sum())
    return Solution(neurons[active] * root[:, None], alpha[active].sign() * root, objective, progress, state=(alpha,))


def _fista(
    features: Tensor, y: Tensor, alpha: Tensor, beta: float, loss: Loss, length: float, progress: Convergence
) -> None:
    """Minimise in place."""
    ahead, momentum = alpha.clone(), 1.0
    for _ in progress:
        after = F.softshrink(ahead - length * _gradient(features, ahead, y, loss), length * beta)
        if torch.dot(ahead - after, after - alpha) > 0:
            momentum = 1.0
        momentum_after = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = after + (momentum - 1) / momentum_after * (after - alpha)
        momentum = momentum_after
        alpha.copy_(after)
        gradient = _gradient(features, alpha, y, loss)
        # Distance of the gradient from minus the subdifferential of the norm.
        excess = torch.where(alpha == 0, F.relu(gradient.abs() - beta), (gradient + beta * alpha.sign()).abs())
        value = data_loss(features @ alpha, y, loss) + beta * alpha.abs().sum()
        progress.record({"optimality": (float(excess.max()) / beta, 0.0)}, objective=float(value))


def _gradient(features: Tensor, alpha: Tensor, y: Tensor, loss: Loss) -> Tensor:
    prediction = features @ alpha
    slope = prediction - y if loss == "squared" else -2 * y * torch.sigmoid(-2 * y * prediction)
    return features.T @ slope
