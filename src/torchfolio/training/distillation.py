"""Losses between the logits of a student and of its teacher.

Penghui Yang, Chen-Chen Zong, Sheng-Jun Huang, Lei Feng, Bo An, "Dual-Head Knowledge Distillation: Enhancing Logits
Utilization with an Auxiliary Head", KDD 2025, https://arxiv.org/abs/2411.08937.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import one_of, positive

__all__ = ["binary_kl", "binary_kl_norm", "kd_loss"]

Reduction = Literal["batchmean", "sum", "none"]


def binary_kl(student: Tensor, teacher: Tensor, tau: float = 2.0, reduction: Reduction = "batchmean") -> Tensor:
    """Divergence of the student's from the teacher's probabilities, each class for itself:

    $$\\tau^2 \\frac1N \\sum_{i,k} \\mathrm{KL}\\bigl(\\mathrm{Bern}(\\sigma(v_{ik}/\\tau)) \\,\\|\\,
      \\mathrm{Bern}(\\sigma(z_{ik}/\\tau))\\bigr).$$

    Args:
        student: logits $z$.
        teacher: logits $v$.
        tau: temperature $\\tau > 0$.
        reduction: `"batchmean"` (sum over classes, mean over examples), `"sum"`, or `"none"` for `[N, K]`.

    Shapes:
        `[N, K]` twice; half precision is computed in, and returned as, float32.

    Raises:
        ValueError: on other shapes, a temperature that is not positive, or another reduction.

    Reference:
        Yang et al., KDD 2025, section 3.
    """
    z, v = (logits / tau for logits in _logits(student, teacher, tau))
    # KL = softplus(z) - softplus(v) - σ(v)(z - v): finite for any logits, and no probability is ever rounded to 1.
    return _reduced(tau**2 * (_softplus(z) - _softplus(v) - v.sigmoid() * (z - v)), reduction)


def binary_kl_norm(student: Tensor, teacher: Tensor, tau: float = 2.0, reduction: Reduction = "batchmean") -> Tensor:
    """The binary divergence centred on the teacher, whose gradient does not vanish where the teacher is sure:

    $$\\tau^2 \\frac1N \\sum_{i,k} \\mathrm{KL}\\bigl(\\mathrm{Bern}(\\tfrac12) \\,\\|\\,
      \\mathrm{Bern}(\\sigma(\\delta_{ik}/\\tau))\\bigr) = \\tau^2 \\frac1N \\sum_{i,k}
      \\log\\cosh\\frac{\\delta_{ik}}{2\\tau}, \\qquad \\delta = z - v.$$

    A Huber-like regression of logits: $\\delta^2/8$ near the teacher, slope $\\tau/2$ far from it. It is a sum over
    classes, so its weight does not carry over from 10 classes to 1,000.

    Args:
        student: logits $z$.
        teacher: logits $v$, in float32 rather than half precision: small differences count.
        tau: temperature $\\tau > 0$.
        reduction: `"batchmean"` (sum over classes, mean over examples), `"sum"`, or `"none"` for `[N, K]`.

    Shapes:
        `[N, K]` twice; half precision is computed in, and returned as, float32.

    Raises:
        ValueError: on other shapes, a temperature that is not positive, or another reduction.

    Reference:
        Yang et al., KDD 2025, section 3; the closed form is this library's.
    """
    z, v = _logits(student, teacher, tau)
    u = (z - v).abs() / (2 * tau)
    # log cosh u, the first form accurate near 0, the second without overflow.
    near = -0.5 * torch.log1p(-u.clamp(max=1).tanh().square())
    far = u + _softplus(-2 * u) - math.log(2)
    return _reduced(tau**2 * torch.where(u < 1, near, far), reduction)


def kd_loss(student: Tensor, teacher: Tensor, tau: float = 4.0, reduction: Reduction = "batchmean") -> Tensor:
    """Ordinary distillation, $\\tau^2\\,\\mathrm{KL}(\\mathrm{softmax}(v/\\tau) \\| \\mathrm{softmax}(z/\\tau))$.

    Args:
        student: logits $z$ `[N, K]`.
        teacher: logits $v$ `[N, K]`.
        tau: temperature $\\tau > 0$.
        reduction: `"batchmean"`, `"sum"`, or `"none"` for `[N, K]`.

    Raises:
        ValueError: on other shapes, a temperature that is not positive, or another reduction.

    Reference:
        Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    z, v = _logits(student, teacher, tau)
    terms = F.kl_div((z / tau).log_softmax(1), (v / tau).log_softmax(1), reduction="none", log_target=True)
    return _reduced(tau**2 * terms, reduction)


def _softplus(x: Tensor) -> Tensor:
    return -F.logsigmoid(-x)  # `F.softplus` is linear above 20, which float64 can tell


def _logits(student: Tensor, teacher: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    positive("tau", tau)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"expected logits [N, K] of student and teacher, got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    exact = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(exact), teacher.to(exact)


def _reduced(terms: Tensor, reduction: Reduction) -> Tensor:
    one_of("reduction", reduction, ("batchmean", "sum", "none"))
    return terms if reduction == "none" else terms.sum() / (len(terms) if reduction == "batchmean" else 1)
