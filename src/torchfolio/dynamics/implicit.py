"""Layers whose output is the solution of a problem: a fixed point, a minimum, a quadratic program.

Their gradient comes from the implicit function theorem and does not see how the problem was solved. With
$F(w^*, p) = 0$,

$$\\frac{dw^*}{dp} = -\\Big(\\frac{\\partial F}{\\partial w}\\Big)^{-1} \\frac{\\partial F}{\\partial p},$$

which costs one linear solve and the memory of a single evaluation of F.

Reference:
    Kidger, On Neural Differential Equations, 2021 (arXiv 2202.02435), Chapter 6; Bai et al., Deep Equilibrium Models,
    NeurIPS 2019; Amos and Kolter, OptNet, ICML 2017.
"""

from __future__ import annotations

from torchfolio.dynamics.equilibrium import DEQ, jacobian_penalty
from torchfolio.dynamics.fixed_points import Anderson, FixedPoint
from torchfolio.dynamics.minimizers import argmin_layer
from torchfolio.dynamics.quadratic_program import QPLayer, attach_gradient

__all__ = ["DEQ", "Anderson", "FixedPoint", "QPLayer", "argmin_layer", "attach_gradient", "jacobian_penalty"]
