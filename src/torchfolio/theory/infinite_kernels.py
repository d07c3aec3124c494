"""Kernels of infinitely wide networks: their covariance at random weights (NNGP) and their tangent kernel (NTK).

Fully connected networks (`nngp`, `ntk`) and convolutional ones without pooling (`conv_nngp`, `conv_ntk`), of any
activation that `dual_activation` takes. With variances $w^2$ of weights and $\\beta^2$ of biases (weights divided by
the square root of the fan-in), the first layer has $K^0 = w^2 x^\\top \\tilde x / d + \\beta^2$, $\\Theta^0 = K^0$, and
every further one

$$\\Sigma = E[\\varphi(u) \\varphi(v)], \\; (u, v) \\sim N(0, K^l), \\qquad K^{l+1} = w^2 \\Sigma + \\beta^2, \\qquad
\\Theta^{l+1} = K^{l+1} + w^2 \\dot\\Sigma \\Theta^l, \\; \\dot\\Sigma = E[\\varphi'(u) \\varphi'(v)].$$

The readout has a variance of its own and no bias. In a convolutional network whose readout takes all positions in one
vector, only covariances between the same position of two images matter: each layer averages them over its window, and
the readout over the image.

Variances of single inputs are followed apart from covariances, so that the diagonal of a symmetric kernel is exact;
its blocks are computed once. Without gradients the intermediate values fill a tile at a time.

Longer than most because fully connected and convolutional networks, with and without tangents, share one recursion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchfolio.theory.dual_activations import Activation
from torchfolio.theory.empirical_kernel import empirical_ntk
from torchfolio.theory.kernel_recursion import Conv, Dense, Number, checked_variances, kernel_diagonal, kernel_matrix

__all__ = ["conv_nngp", "conv_nngp_diagonal", "conv_ntk", "empirical_ntk", "nngp", "nngp_diagonal", "ntk"]


def nngp(
    x1: Tensor,
    x2: Tensor | None,
    activation: Activation,
    depth: int,
    *,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    normalized: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Covariance of the outputs of an infinitely wide fully connected network at random weights.

    Differentiable in inputs and variances, also where two inputs coincide.

    Args:
        x1: inputs `[n, d]`.
        x2: inputs `[m, d]`; `None` for those of `x1`, whose kernel is symmetric.
        activation: name, module, function, or its dual.
        depth: number of hidden layers, at least 1.
        weight_var: variance $w^2$ of weights times their fan-in; ReLU keeps the scale at 2.
        bias_var: variance $\\beta^2$ of biases.
        last_var: variance of the readout's weights times their fan-in.
        normalized: whether inputs have norm 1, the activation is divided by its root mean square and the first layer
            not by $\\sqrt d$: the recursion $\\Sigma^{l+1} = \\check\\varphi(\\Sigma^l)$ from $x^\\top \\tilde x$.
            The variances are then 1, 0 and 1.
        dtype: precision of the kernel.

    Returns:
        Kernel `[n, m]`.

    Raises:
        ValueError: on inputs that are empty, not finite or of unlike shapes, variances below 0, or, if normalised,
            norms other than 1.

    Reference:
        Lee et al., "Deep Neural Networks as Gaussian Processes", 2018, equations 4 and 5.

    Example:
        >>> x = torch.eye(2)
        >>> nngp(x, None, "relu", 1, weight_var=2.0)
        tensor([[0.5000, 0.1592],
                [0.1592, 0.5000]], dtype=torch.float64)
    """
    variances = checked_variances(weight_var, bias_var, last_var, normalized)
    return kernel_matrix(Dense(x1, x2, normalized, dtype), activation, depth, variances, normalized, tangent=False)


def nngp_diagonal(
    x: Tensor,
    activation: Activation,
    depth: int,
    *,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Variances `[n]` of the outputs, the diagonal of `nngp` without the rest; arguments and errors as there."""
    variances = checked_variances(weight_var, bias_var, last_var, False)
    return kernel_diagonal(Dense(x, None, False, dtype), activation, depth, variances)


def ntk(
    x1: Tensor,
    x2: Tensor | None,
    activation: Activation,
    depth: int,
    *,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    normalized: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Neural tangent kernel of an infinitely wide fully connected network, all layers trained.

    With `normalized` this is $\\Theta^{l+1} = \\Sigma^{l+1} + \\check\\varphi'(\\Sigma^l) \\Theta^l$. Arguments, returns
    and errors as for `nngp`.

    Reference:
        Jacot et al., "Neural Tangent Kernel", 2018, theorem 1.
    """
    variances = checked_variances(weight_var, bias_var, last_var, normalized)
    return kernel_matrix(Dense(x1, x2, normalized, dtype), activation, depth, variances, normalized, tangent=True)


def conv_nngp(
    x1: Tensor,
    x2: Tensor | None,
    activation: Activation,
    depth: int,
    *,
    kernel_size: int = 3,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Covariance of the outputs of a convolutional network of infinitely many channels at random weights.

    Its layers keep the image's size by zero padding (stride 1), and its readout takes all positions.

    Args:
        x1: images `[n, channels, height, width]`.
        x2: images `[m, channels, height, width]`; `None` for those of `x1`.
        activation: name, module, function, or its dual.
        depth: number of hidden convolutional layers, at least 1.
        kernel_size: side of the window, odd.
        weight_var: variance $w^2$ of weights times their fan-in.
        bias_var: variance $\\beta^2$ of biases.
        last_var: variance of the readout's weights times their fan-in.
        dtype: precision of the kernel.

    Returns:
        Kernel `[n, m]`.

    Raises:
        ValueError: as `nngp`, and on an even window.

    Reference:
        Novak et al., "Bayesian Deep Convolutional Networks with Many Channels are Gaussian Processes", 2019,
        equations 8 and 13.
    """
    variances = checked_variances(weight_var, bias_var, last_var, False)
    return kernel_matrix(Conv(x1, x2, kernel_size, dtype), activation, depth, variances, False, tangent=False)


def conv_nngp_diagonal(
    x: Tensor,
    activation: Activation,
    depth: int,
    *,
    kernel_size: int = 3,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Variances `[n]` of the outputs, the diagonal of `conv_nngp` without the rest; arguments and errors as there."""
    variances = checked_variances(weight_var, bias_var, last_var, False)
    return kernel_diagonal(Conv(x, None, kernel_size, dtype), activation, depth, variances)


def conv_ntk(
    x1: Tensor,
    x2: Tensor | None,
    activation: Activation,
    depth: int,
    *,
    kernel_size: int = 3,
    weight_var: Number = 1.0,
    bias_var: Number = 0.0,
    last_var: Number = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Neural tangent kernel of a convolutional network of infinitely many channels.

    Arguments, returns and errors as for `conv_nngp`.

    Reference:
        Arora et al., "On Exact Computation with an Infinitely Wide Neural Net", 2019, section 4.
    """
    variances = checked_variances(weight_var, bias_var, last_var, False)
    return kernel_matrix(Conv(x1, x2, kernel_size, dtype), activation, depth, variances, False, tangent=True)
