"""An objective over several environments that asks their risks to be equal.

David Krueger, Ethan Caballero, Joern-Henrik Jacobsen, Amy Zhang, Jonathan Binas, Dinghuai Zhang, Remi Le Priol, Aaron
Courville, "Out-of-Distribution Generalization via Risk Extrapolation (REx)", ICML 2021, https://arxiv.org/abs/2003.00688.
"""

from __future__ import annotations

from torch import Tensor

from torchfolio.checks import at_least

__all__ = ["vrex_penalty"]


def vrex_penalty(risks: Tensor, beta: float) -> Tensor:
    """The objective of vREx over environments: mean risk and $\\beta$ times their variance.

    Args:
        risks: one mean loss for each environment, `[E]`, at least two.
        beta: weight of the variance, at least 0.

    Raises:
        ValueError: on other shapes, or a negative weight.

    Reference:
        Krueger et al., "Out-of-Distribution Generalization via Risk Extrapolation", ICML 2021, equation 8.
    """
    if risks.dim() != 1 or len(risks) < 2:
        raise ValueError(f"expected risks [E] of at least two environments, got shape {tuple(risks.shape)}")
    return risks.mean() + at_least("beta", beta, 0) * risks.var(correction=0)
