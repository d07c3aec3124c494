"""Duals of rectifiers and of the step function: arc-cosine kernels (Cho and Saul, NeurIPS 2009)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchfolio.theory.dual_base import ClosedFormDual

__all__ = ["RectifierDual", "StepDual"]


def _correlation(p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    scale = (p * q).sqrt()
    return scale, (c / scale.clamp_min(torch.finfo(c.dtype).tiny)).clamp(-1, 1)


class _StepKernel(torch.autograd.Function):
    """$(\\pi - \\theta) / 2\\pi$. Its derivative is infinite at $\\theta = 0$ and $\\pi$, and taken as 0 there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return (math.pi - torch.acos(_correlation(p, q, c)[1])) / (2 * math.pi)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        p, q, c = ctx.saved_tensors
        rest = p * q - c * c
        apart = rest > 4 * torch.finfo(c.dtype).eps * (p * q)
        slope = torch.where(apart, 1 / (2 * math.pi * torch.where(apart, rest, 1.0).sqrt()), 0.0) * grads[0]
        one = torch.ones((), dtype=c.dtype, device=c.device)
        safe_p, safe_q = torch.where(apart, p, one), torch.where(apart, q, one)
        return -slope * c / (2 * safe_p), -slope * c / (2 * safe_q), slope


class _RampKernel(torch.autograd.Function):
    """$\\sqrt{pq} (\\sin\\theta + (\\pi - \\theta) \\cos\\theta) / 2\\pi$: smooth although the arccosine in it is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        scale, cos = _correlation(p, q, c)
        sin = ((1 - cos) * (1 + cos)).sqrt_()
        return (scale * sin + (math.pi - torch.acos(cos)) * (scale * cos)) / (2 * math.pi)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        p, q, c = ctx.saved_tensors
        rest = p * q - c * c
        apart = rest > torch.finfo(c.dtype).eps * (p * q)
        half = torch.where(apart, torch.where(apart, rest, 1.0).sqrt() / (4 * math.pi), 0.0) * grads[0]
        one = torch.ones((), dtype=c.dtype, device=c.device)
        return (
            half / torch.where(apart, p, one),
            half / torch.where(apart, q, one),
            grads[0] * _StepKernel.apply(p, q, c),
        )


class RectifierDual(ClosedFormDual):
    """Dual of $\\max(z, 0) + s \\min(z, 0)$: ReLU at $s = 0$, leaky ReLU, the identity at 1, $|z|$ at -1.

    With $\\cos\\theta = c / \\sqrt{pq}$ its covariance is
    $(1 - s)^2 \\sqrt{pq} (\\sin\\theta + (\\pi - \\theta) \\cos\\theta) / 2\\pi + sc$, the arc-cosine kernel of order 1.

    Args:
        negative_slope: $s$.
    """

    def __init__(self, negative_slope: float = 0.0) -> None:
        self.negative_slope = float(negative_slope)
        super().__init__(_Rectifier(self.negative_slope), 1.0)

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        s = self.negative_slope
        if s == 1:
            return c
        ramp = _RampKernel.apply(*torch.broadcast_tensors(p, q, c))
        return ramp if s == 0 else (1 - s) ** 2 * ramp + s * c

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        s = self.negative_slope
        if s == 1:
            return torch.ones_like(c)
        step = _StepKernel.apply(*torch.broadcast_tensors(p, q, c))
        return step if s == 0 else (1 - s) ** 2 * step + s

    def both(self, p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        s = self.negative_slope
        if s == 1 or (torch.is_grad_enabled() and any(t.requires_grad for t in (p, q, c))):
            return super().both(p, q, c)
        scale, cos = _correlation(p, q, c)
        step = (math.pi - torch.acos(cos)).mul_((1 - s) ** 2 / (2 * math.pi)).add_(s)
        sin = cos.square().neg_().add_(1).clamp_min_(0).sqrt_()
        return cos.mul_(step).add_(sin, alpha=(1 - s) ** 2 / (2 * math.pi)).mul_(scale), step

    def diagonal(self, q: Tensor) -> Tensor:
        return (1 + self.negative_slope**2) / 2 * q

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return torch.full_like(q, (1 + self.negative_slope**2) / 2)


class _Rectifier:
    def __init__(self, slope: float) -> None:
        self.slope = slope

    def __call__(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, self.slope * z)


class StepDual(ClosedFormDual):
    """Dual of the step function, 1 above 0 and 0 below: $(\\pi - \\theta) / 2\\pi$. It has no tangent kernel."""

    def __init__(self) -> None:
        super().__init__(_step, math.inf)

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return _StepKernel.apply(*torch.broadcast_tensors(p, q, c))

    def covariance_derivative(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        raise ValueError("the step function has no derivative, hence no tangent kernel; use its NNGP")

    def diagonal(self, q: Tensor) -> Tensor:
        return torch.full_like(q, 0.5)

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return self.covariance_derivative(q, q, q)


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)
