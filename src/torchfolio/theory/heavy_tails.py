"""Finite networks that start with heavy tails: a random scale on the last layer.

Part of Lee et al., "Scale Mixtures of Neural Network Gaussian Processes", ICLR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, InverseGamma

from torchfolio import checks
from torchfolio.theory.scale_priors import check_prior, draw

__all__ = ["sample_prior", "scale_mixture_init_"]


@torch.no_grad()
def scale_mixture_init_(
    layer: nn.Linear, prior: Distribution | None = None, generator: torch.Generator | None = None
) -> float:
    """Initialise a network's last layer with heavy tails, in place: one variance drawn, then normal weights.

    Args:
        layer: linear layer; its weights become $N(0, \\sigma^2 / \\text{fan-in})$, its bias 0.
        prior: distribution of $\\sigma^2$; `InverseGamma(2, 2)` by default.
        generator: source of the draws; torch's global one by default.

    Returns:
        $\\sigma^2$.

    Raises:
        TypeError: if the layer is no linear layer, or the prior no distribution.

    Reference:
        Lee et al., section 3.1.
    """
    if not isinstance(layer, nn.Linear):
        raise TypeError(f"expected layer to be an nn.Linear, got {type(layer).__name__}")
    chosen = InverseGamma(torch.tensor(2.0), torch.tensor(2.0)) if prior is None else check_prior("prior", prior)
    variance = float(draw(chosen, 1, generator))
    layer.weight.normal_(0, math.sqrt(variance / layer.in_features), generator=generator)
    if layer.bias is not None:
        layer.bias.zero_()
    return variance


@torch.no_grad()
def sample_prior(module_factory: Callable[[], nn.Module], X: Tensor, n: int) -> Tensor:
    """Outputs of `n` networks at the same inputs, `[n, ...]`.

    Args:
        module_factory: function that makes a freshly initialised network.
        X: inputs.
        n: number of networks.
    """
    return torch.stack([module_factory()(X) for _ in range(checks.whole("n", n, 1))])
