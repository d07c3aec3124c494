"""Steps that have no useful derivative, with the surrogate that training uses in its place.

A quantiser is flat almost everywhere, so its derivative teaches nothing. Each function here computes the quantiser
$q(x)$ in the forward pass and multiplies the incoming gradient by a chosen slope $s(x)$ in the backward pass:

$$y = q(x), \\qquad \\frac{\\partial L}{\\partial x} := \\frac{\\partial L}{\\partial y}\\, s(x).$$

A second derivative of such a pair means nothing; asking for it raises an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["polynomial_sign", "round_ste", "sign", "sign_ste", "square_wave", "surrogate"]

Elementwise = Callable[[Tensor], Tensor]


class _Surrogate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Elementwise, slope: Elementwise | None) -> Tensor:
        ctx.slope = slope
        if slope is not None:
            ctx.save_for_backward(x)
        return quantize(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():  # only where a graph of the backward pass is wanted
            raise RuntimeError("a straight-through gradient has no second derivative; do not ask for create_graph=True")
        (gradient,) = gradients
        return gradient if ctx.slope is None else gradient * ctx.slope(*ctx.saved_tensors), None, None


def surrogate(x: Tensor, quantize: Elementwise, slope: Elementwise | None = None) -> Tensor:
    """`quantize(x)`, whose gradient is multiplied by `slope(x)` on its way back.

    Args:
        x: any shape.
        quantize: element-wise forward pass.
        slope: element-wise factor of the gradient; `None` passes the gradient straight through.

    Raises:
        RuntimeError: in the backward pass, if a second derivative is asked for (`create_graph=True`).
    """
    output = _Surrogate.apply(x, quantize, slope)
    assert isinstance(output, Tensor)
    return output


def sign(x: Tensor) -> Tensor:
    """$+1$ where $x \\ge 0$, $-1$ below, without a gradient. NaN and infinity give NaN: a diverged network shows."""
    # A zero must not vanish from a binary sum, as it would under torch.sign; adding 0.0 takes the sign off -0.0.
    with torch.no_grad():
        positive = x + 0.0
        return torch.copysign(torch.ones((), dtype=x.dtype, device=x.device), positive).add_(positive, alpha=0)


def sign_ste(x: Tensor, clip: float = 1.0) -> Tensor:
    """The sign with a clipped straight-through gradient: slope 1 where $|x| \\le$ `clip`, else 0.

    Reference:
        Hubara et al., "Binarized Neural Networks", NeurIPS 2016, equation 4.
    """
    return surrogate(x, sign, lambda v: (v.abs() <= clip).to(v.dtype))


def polynomial_sign(x: Tensor) -> Tensor:
    """The sign with the slope $\\max(0, 2 - 2|x|)$, of a piecewise quadratic that is close to it.

    Reference:
        Liu et al., "Bi-Real Net", ECCV 2018, section 3.3.
    """
    return surrogate(x, sign, lambda v: (2 - 2 * v.abs()).clamp_min(0))


def square_wave(x: Tensor, frequency: float) -> Tensor:
    """$\\operatorname{sign}(\\sin \\omega x)$ with the slope of the sine, $\\omega \\cos \\omega x$.

    Reference:
        Vargas et al., "BiPer", CVPR 2024, equations 5 and 8.
    """
    return surrogate(x, lambda v: sign((frequency * v).sin()), lambda v: frequency * (frequency * v).cos())


def round_ste(x: Tensor) -> Tensor:
    """The nearest whole number, half to even, with the gradient passed straight through."""
    return surrogate(x, torch.round)
