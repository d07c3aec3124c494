"""How far real weights are from binary ones: measured, for Laplace weights in closed form, and the frequency for an error.

Reference:
    Vargas et al., "BiPer: Binary Neural Networks using a Periodic Function", CVPR 2024, section 3.
"""

from __future__ import annotations

import math
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from torch import Tensor, nn

from torchfolio.checks import finite
from torchfolio.efficiency.binarization import Where, choose_layers
from torchfolio.efficiency.binary import BinaryLayer
from torchfolio.efficiency.periodic_layers import BiPerLayer

__all__ = ["frequency_for", "laplace_qe", "quantization_error"]

PEAK_U, PEAK_QE = 0.9548824, 0.1028346
"""Where the quantisation error of Laplace weights is largest, and how large."""


@overload
def quantization_error(model_or_weight: Tensor, frequency: float | None = None) -> dict[str, float]: ...
@overload
def quantization_error(model_or_weight: nn.Module, frequency: None = None) -> dict[str, dict[str, float]]: ...


def quantization_error(
    model_or_weight: nn.Module | Tensor, frequency: float | None = None
) -> dict[str, float] | dict[str, dict[str, float]]:
    """How far real weights are from the best scaled binary ones,

    $$\\mathrm{QE} = \\min_\\gamma \\operatorname{E}(\\hat w - \\gamma w^q)^2
    = \\operatorname{E}\\hat w^2 - (\\operatorname{E}|\\hat w|)^2, \\qquad \\hat w = \\sin \\omega_0 w.$$

    Args:
        model_or_weight: weights, or a network with binary layers.
        frequency: $\\omega_0$ of the weights; `None` takes $\\hat w = w$, the plain sign. Layers of a network have
            their own.

    Returns:
        `{"qe", "normalized", "u"}`: the error, the error over $\\operatorname{E}\\hat w^2$, and $u = b\\,\\omega_0$
        with $b = \\operatorname{E}|w|$ (NaN for the plain sign). For a network, one such dict for every layer.

    Raises:
        ValueError: if a network has no binary layer, or weights are not finite or none.
    """
    if isinstance(model_or_weight, Tensor):
        return _quantization_error(model_or_weight, frequency)
    errors = {
        name: _quantization_error(layer.weight, layer.frequency if isinstance(layer, BiPerLayer) else None)
        for name, layer in model_or_weight.named_modules()
        if isinstance(layer, BinaryLayer)
    }
    if not errors:
        raise ValueError("the network has no binary layer; convert it with binarize first")
    return errors


def _quantization_error(weight: Tensor, frequency: float | None) -> dict[str, float]:
    weight = finite("weights", weight.detach().double())
    if not weight.numel():
        raise ValueError("expected at least one weight, got none")
    seen = weight if frequency is None else (frequency * weight).sin()
    power, size = float(seen.square().mean()), float(seen.abs().mean())
    error = power - size**2
    u = math.nan if frequency is None else frequency * float(weight.abs().mean())
    return {"qe": error, "normalized": error / power if power else math.nan, "u": u}


def laplace_qe(u: ArrayLike) -> Any:
    """Quantisation error of Laplace weights of scale $b$ at frequency $\\omega_0$, with $u = b\\,\\omega_0$:

    $$\\mathrm{QE}(u) = \\frac{2u^2}{1 + 4u^2} - \\left[\\frac{u}{1 + u^2} \\coth\\frac{\\pi}{2u}\\right]^2.$$

    It grows as $u^2$, is largest (0.102835) at $u = 0.954882$ and tends to $1/2 - 4/\\pi^2$.

    Args:
        u: value of at least 0, any shape.

    Returns:
        A float for a number, else an array.

    Raises:
        ValueError: if `u` is negative or not finite.
    """
    u_ = finite("u", np.asarray(u, dtype=float))
    if (u_ < 0).any():
        raise ValueError(f"expected u of at least 0, got {u_.min():g}")
    with np.errstate(divide="ignore"):
        coth = 1 / np.tanh(np.pi / (2 * u_))
    qe = 2 * u_**2 / (1 + 4 * u_**2) - (u_ / (1 + u_**2) * coth) ** 2
    return float(qe) if qe.ndim == 0 else qe


def frequency_for(model: nn.Module, qe: float = 0.05, where: Where | None = None) -> dict[str, float]:
    """For every layer the frequency at which Laplace weights of its size have a given quantisation error.

    `laplace_qe` is inverted on its rising branch, $u < 0.955$.

    Args:
        model: a network, converted or not.
        qe: error wanted, between 0 and 0.102835.
        where: layers of a network that has no BiPer layer yet; as in `binarize`.

    Returns:
        $\\omega_0 = u / \\operatorname{E}|w|$ by the name of the layer.

    Raises:
        ValueError: if no weights have such an error, or a layer's weights are all zero.
    """
    if not 0 < qe < PEAK_QE:
        raise ValueError(f"expected qe between 0 and {PEAK_QE}, the largest error of Laplace weights, got {qe!r}")
    u = float(brentq(lambda v: laplace_qe(v) - qe, 0.0, PEAK_U))  # pyright: ignore[reportArgumentType]
    converted = {name for name, m in model.named_modules() if isinstance(m, BiPerLayer)}
    frequencies: dict[str, float] = {}
    for name in sorted(converted or choose_layers(model, where)):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        size = float(weight.detach().abs().mean())
        if not size:
            raise ValueError(f"the weights of {name} are all zero; no frequency changes their error")
        frequencies[name] = u / size
    return frequencies
