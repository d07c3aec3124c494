"""Few to one: units of one network as sparse combinations of the other's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchfolio.insight.convergent_learning.statistics import CorrelationBlocks
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd

ALPHAS = (0.0, 1e-3, 1e-2, 3e-2, 1e-1)
_CUTOFF = 1e-6  # of the largest eigenvalue, in the pseudo-inverse


@dataclass(frozen=True, repr=False)
class SparsePrediction(Shown):
    """Predictions of every living unit of the second layer from those of the first, at several penalties.

    Attributes:
        alphas: penalties $\\lambda$, increasing, `[A]`.
        weights: $W$ on standardised units, `[A, S_1, S_2]`; 0 for dead units.
        loss: loss of every unit on held-out samples, `[A, S_2]`; 0.5 is a prediction by the mean. NaN for dead units.
        nonzeros: number of units used, `[A, S_2]`.
    """

    alphas: Tensor
    weights: Tensor
    loss: Tensor
    nonzeros: Tensor

    def curve(self) -> pd.DataFrame:
        """A row for every penalty: `alpha`, mean `loss` and mean `nonzeros` over the predicted units."""
        import pandas as pd

        alive = ~self.loss[0].isnan()
        return pd.DataFrame(
            {
                "alpha": self.alphas.numpy(),
                "loss": self.loss[:, alive].mean(1).numpy(),
                "nonzeros": self.nonzeros[:, alive].double().mean(1).numpy(),
            }
        )

    def fewest(self, tolerance: float = 0.02) -> float:
        """Fewest units a prediction, on average, that come within `tolerance` of the least penalised loss."""
        loss, nonzeros = self.curve()[["loss", "nonzeros"]].to_numpy().T
        return float(nonzeros[loss <= loss[0] + tolerance].min())


def sparse_prediction(
    blocks: CorrelationBlocks,
    alphas: Sequence[float] = ALPHAS,
    *,
    validate: bool = True,
    tolerance: float = 1e-6,
    max_iterations: int = 20_000,
) -> SparsePrediction:
    """Predict every unit of the second layer linearly from the first, with an L1 penalty.

    With standardised units and $G$, $R$ the correlations within the first layer and between the layers, unit $j$
    has the loss

    $$\\ell_j(w) = \\tfrac12 \\mathbb{E}\\,(\\hat a^\\top w - \\hat b_j)^2
      = \\tfrac12 (1 - 2 r_j^\\top w + w^\\top G w), \\qquad
      \\min_w \\ell_j(w) + \\lambda \\lVert w \\rVert_1,$$

    so that no data are needed any more (on other samples than those that standardise the units, with their second
    moments about the same means). All units are solved at once by accelerated proximal gradient (FISTA with
    restarts) to the optimality conditions of the lasso, which gives exact zeros; $\\lambda = 0$ by the
    pseudo-inverse. A unit that cannot be predicted has the loss 0.5, its match alone $\\tfrac12 (1 - c^2)$.

    Args:
        blocks: correlations of the layers.
        alphas: penalties $\\lambda \\ge 0$.
        validate: fit on half of the examples and report the loss on the others (where `blocks` has halves).
        tolerance: largest violation of the optimality conditions.
        max_iterations: maximum number of iterations for each penalty; a warning tells if they do not suffice.

    Raises:
        ValueError: on no penalty or a negative one.

    Reference:
        Li et al., ICLR 2016, section 4, whose mapping layer is trained by SGD; solved exactly here. FISTA: Beck,
        Teboulle, SIAM Journal on Imaging Sciences, 2009.
    """
    if not len(alphas) or min(alphas) < 0:
        raise ValueError(f"expected penalties of at least 0, got {list(alphas)}")
    train, test = blocks.halves if validate and blocks.halves else (blocks, blocks)
    a, b = blocks.alive_a, blocks.alive_b
    gram, cross = train.within_a[a][:, a], train.between[a][:, b]
    held = _second_moments(test, train)
    ordered = sorted(alphas)
    weights = torch.zeros(len(ordered), *blocks.sizes, dtype=torch.float64)
    loss = torch.full((len(ordered), blocks.sizes[1]), torch.nan, dtype=torch.float64)
    start = torch.zeros_like(cross)
    for k in reversed(range(len(ordered))):  # from sparse to dense: each solution starts the next
        start = lasso(gram, cross, ordered[k], start, tolerance, max_iterations)
        weights[k][a.nonzero(), b.nonzero().T] = start
        loss[k, b] = _loss(*held, start)
    nonzeros = (weights != 0).sum(1)
    return SparsePrediction(torch.tensor(ordered, dtype=torch.float64), weights, loss, nonzeros)


def _second_moments(blocks: CorrelationBlocks, by: CorrelationBlocks) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments of the living units, standardised by the means and deviations of other samples.

    Returns:
        Those within the first layer, between the layers, and of each unit of the second.
    """
    alive, first = blocks.alive, int(blocks.alive_a.sum())
    scale = torch.where(by.std > 0, by.std, torch.inf)[alive]
    spread, shift = blocks.std[alive] / scale, (blocks.mean - by.mean)[alive] / scale
    moments = blocks.joint()[alive][:, alive] * spread * spread[:, None] + torch.outer(shift, shift)
    return moments[:first, :first], moments[:first, first:], moments.diagonal()[first:]


def _loss(gram: Tensor, cross: Tensor, power: Tensor, w: Tensor) -> Tensor:
    """Loss of every column, `[S_2]`; `power` is 1 on the samples that standardise the units."""
    return 0.5 * (power - 2 * (cross * w).sum(0) + (w * (gram @ w)).sum(0))


def lasso(
    gram: Tensor, cross: Tensor, alpha: float, start: Tensor, tolerance: float = 1e-6, max_iterations: int = 20_000
) -> Tensor:
    """Minimise $\\tfrac12 w^\\top G w - r^\\top w + \\lambda \\lVert w \\rVert_1$ for every column $r$ of `cross`.

    Args:
        gram: $G$, `[S_1, S_1]`.
        cross: $R$, `[S_1, S_2]`.
        alpha: $\\lambda$.
        start: weights to begin with, `[S_1, S_2]`.
        tolerance: largest violation of the optimality conditions.
        max_iterations: maximum number of iterations of them.

    Returns:
        `[S_1, S_2]`.
    """
    if alpha == 0:
        values, vectors = torch.linalg.eigh(gram)
        significant = values > _CUTOFF * values[-1]
        return (vectors[:, significant] / values[significant]) @ (vectors[:, significant].T @ cross)
    step = 1 / float(torch.linalg.eigvalsh(gram)[-1])
    w = y = start
    t = 1.0
    for iteration in range(max_iterations):
        following = torch.nn.functional.softshrink(y - step * (gram @ y - cross), alpha * step)
        # Momentum that points uphill is dropped (O'Donoghue and Candes, 2015).
        if ((y - following) * (following - w)).sum() > 0:
            t = 1.0
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        w, y, t = following, following + (t - 1) / t_next * (following - w), t_next
        if iteration % 10 == 9 and violation(gram, cross, alpha, w) < tolerance:
            return w
    left = violation(gram, cross, alpha, w)
    if left >= tolerance:
        warnings.warn(
            f"sparse prediction at alpha {alpha}: conditions violated by {left:.1e} after {max_iterations} steps",
            stacklevel=3,
        )
    return w


def violation(gram: Tensor, cross: Tensor, alpha: float, w: Tensor) -> float:
    """Largest violation of the lasso's optimality conditions.

    $|g_i| \\le \\lambda$ everywhere and $g_i = -\\lambda \\operatorname{sign} w_i$ where $w_i \\ne 0$, with
    $g = G w - r$.
    """
    gradient = gram @ w - cross
    off = (gradient.abs() - alpha).clamp_min(0)
    on = (gradient + alpha * w.sign()).abs()
    return float(torch.where(w != 0, on, off).max())
