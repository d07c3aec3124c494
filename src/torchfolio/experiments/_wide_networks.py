"""Wide networks whose last layer has a random scale, against Student's t: at random weights, and with it trained."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import stats
from torch import nn
from torch.distributions import InverseGamma

from torchfolio.theory.infinite_kernels import nngp
from torchfolio.theory.nngp_scale_mixture import sample_prior, scale_mixture_init_

PRIOR = InverseGamma(torch.tensor(2.0), torch.tensor(2.0))


def at_random_weights(draws: int, width: int) -> dict[str, float]:
    """Kolmogorov-Smirnov tests of the outputs at 3 inputs: the least p against t, the largest against the normal."""
    x = torch.randn(3, 5)

    def network() -> nn.Module:
        hidden, last = nn.Linear(5, width, bias=False), nn.Linear(width, 1, bias=False)
        nn.init.normal_(hidden.weight, 0, math.sqrt(2 / 5))
        scale_mixture_init_(last, PRIOR)
        return nn.Sequential(hidden, nn.ReLU(), last)

    outputs = sample_prior(network, x, draws)[..., 0].double().numpy()
    standard = outputs / nngp(x, None, "relu", 1, weight_var=2.0).diagonal().sqrt().numpy()
    t_p = [stats.kstest(column, stats.t(4).cdf).pvalue for column in standard.T]
    normal_p = [stats.kstest(column, stats.norm(0, math.sqrt(2)).cdf).pvalue for column in standard.T]
    return {"t_p": min(t_p), "normal_p": max(normal_p)}


def last_layer_trained(nets: int, width: int, n: int) -> dict[str, float]:
    """Gradient flow on the last layer ends at the interpolation nearest to its start; that is solved for.

    Targets are small, so that the posterior, whose scale follows them, differs from the start by more than its tails:
    300 networks would not tell tails of 4 and 14 degrees of freedom apart.
    """
    x = torch.randn(n + 1, 5, dtype=torch.float64)
    y = 0.3 * torch.sin(2 * x[:n, 0])
    K = nngp(x, None, "relu", 1, weight_var=2.0)
    solved = torch.linalg.solve(K[:n, :n], K[:n, n])
    location, rest = solved @ y, K[n, n] - solved @ K[:n, n]
    ends = []
    for _ in range(nets):
        last = nn.Linear(width, 1, bias=False, dtype=torch.float64)
        scale_mixture_init_(last, PRIOR)
        phi = torch.relu(x @ torch.randn(5, width, dtype=torch.float64) * math.sqrt(2 / 5))
        start = last.weight[0].detach()
        v = start + torch.linalg.lstsq(phi[:n], (y - phi[:n] @ start)[:, None], driver="gelsd").solution[:, 0]
        ends.append(float(phi[n] @ v))
    residuals = (np.asarray(ends) - float(location)) / float(rest.sqrt())
    quadratic = float(y @ torch.linalg.solve(K[:n, :n], y))
    posterior = stats.t(4 + n, scale=math.sqrt((4 + quadratic) / (4 + n)))
    return {
        "prior_p": float(stats.kstest(residuals, stats.t(4).cdf).pvalue),
        "posterior_p": float(stats.kstest(residuals, posterior.cdf).pvalue),
    }
