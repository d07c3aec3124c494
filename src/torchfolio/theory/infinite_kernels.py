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

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation

__all__ = ["conv_nngp", "conv_nngp_diagonal", "conv_ntk", "empirical_ntk", "nngp", "nngp_diagonal", "ntk"]

TILE = 1 << 16  # covariances followed at a time: half a megabyte of each intermediate value
Number = float | Tensor


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
    variances = _variances(weight_var, bias_var, last_var, normalized)
    return _kernel(_Dense(x1, x2, normalized, dtype), activation, depth, variances, normalized, tangent=False)


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
    variances = _variances(weight_var, bias_var, last_var, False)
    return _diagonal(_Dense(x, None, False, dtype), activation, depth, variances)


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
    variances = _variances(weight_var, bias_var, last_var, normalized)
    return _kernel(_Dense(x1, x2, normalized, dtype), activation, depth, variances, normalized, tangent=True)


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
    variances = _variances(weight_var, bias_var, last_var, False)
    return _kernel(_Conv(x1, x2, kernel_size, dtype), activation, depth, variances, False, tangent=False)


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
    variances = _variances(weight_var, bias_var, last_var, False)
    return _diagonal(_Conv(x, None, kernel_size, dtype), activation, depth, variances)


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
    variances = _variances(weight_var, bias_var, last_var, False)
    return _kernel(_Conv(x1, x2, kernel_size, dtype), activation, depth, variances, False, tangent=True)


def empirical_ntk(model: nn.Module, x1: Tensor, x2: Tensor | None = None) -> Tensor:
    """Tangent kernel of a finite network, $\\sum_\\theta \\partial_\\theta f(x) \\, \\partial_\\theta f(\\tilde x)$.

    Contracted a parameter at a time: the Jacobian of one lies in memory beside those of the others, their products do
    not.

    Args:
        model: network from `[n, ...]` to `[n]` or `[n, outputs]`.
        x1: inputs `[n, ...]`.
        x2: inputs `[m, ...]`; `x1` by default.

    Returns:
        Kernel `[n, m]`, or `[n, m, outputs, outputs]` for more than one output.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, (parameters, buffers), (x[None],)).flatten()

    jacobian = torch.func.vmap(torch.func.jacrev(output), (None, 0))
    first = jacobian(parameters, x1)
    second = first if x2 is None else jacobian(parameters, x2)
    kernel = sum(torch.einsum("nop,mqp->nmoq", first[name].flatten(2), second[name].flatten(2)) for name in parameters)
    assert isinstance(kernel, Tensor)
    return kernel[..., 0, 0] if kernel.shape[-1] == 1 else kernel


# How covariances of inputs are taken, spread by a layer and read out


class _Dense:
    def __init__(self, x1: Tensor, x2: Tensor | None, normalized: bool, dtype: torch.dtype) -> None:
        self.x1, self.x2 = _inputs(x1, x2, 2, "[n, d]", dtype)
        self.symmetric = x2 is None
        self.normalized = normalized
        self.scale = 1 if normalized else self.x1.shape[1]
        self.size = 1
        for x in (self.x1, self.x2) if normalized else ():
            error = float((x.detach().norm(dim=1) - 1).abs().max())
            if not error < 1e-6 + 10 * torch.finfo(dtype).eps:
                raise ValueError(f"expected inputs of norm 1, got one that is {error:.2g} off; normalise them")

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        inner = self.x1[rows] @ self.x2[columns].T
        if not self.normalized:
            return inner / self.scale
        # Deep kernels grow what rounding leaves of 1 - ξ at equal inputs.
        return torch.where(inner > 1 - 8 * torch.finfo(inner.dtype).eps, 1.0, inner).clamp(-1, 1)

    def variance(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[:, 0]) if self.normalized else x.square().sum(1) / self.scale

    def spread(self, c: Tensor) -> Tensor:
        return c

    def read_out(self, c: Tensor) -> Tensor:
        return c


class _Conv:
    def __init__(self, x1: Tensor, x2: Tensor | None, kernel_size: int, dtype: torch.dtype) -> None:
        if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"expected kernel_size to be odd and at least 1, got {kernel_size!r}")
        self.x1, self.x2 = _inputs(x1, x2, 4, "[n, channels, height, width]", dtype)
        self.symmetric = x2 is None
        self.kernel_size = kernel_size
        self.size = self.x1[0, 0].numel()

    def covariance(self, rows: slice, columns: slice) -> Tensor:
        return torch.einsum("nchw,mchw->nmhw", self.x1[rows], self.x2[columns]) / self.x1.shape[1]

    def variance(self, x: Tensor) -> Tensor:
        return x.square().mean(1)

    def spread(self, c: Tensor) -> Tensor:
        # Zeros of the padding count: the window's weights have the same fan-in at the border.
        flat = c.reshape(-1, 1, *c.shape[-2:])
        return F.avg_pool2d(flat, self.kernel_size, 1, self.kernel_size // 2).view(c.shape)

    def read_out(self, c: Tensor) -> Tensor:
        return c.mean((-2, -1))


def _inputs(x1: Tensor, x2: Tensor | None, ndim: int, shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    for name, x in (("x1", x1), ("x2", x2)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"expected {name} to be a tensor, got {type(x).__name__}")
        if x.ndim != ndim or not x.numel() or x.shape[1:] != x1.shape[1:]:
            unlike = f" and of shape {tuple(x1.shape[1:])} each" if x.ndim == ndim else ""
            raise ValueError(f"expected {name} of shape {shape}{unlike}, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"expected {name} to be finite")
    x1 = x1.to(dtype)
    return x1, x1 if x2 is None else x2.to(dtype)


# The recursion


def _kernel(
    net: _Dense | _Conv,
    activation: Activation,
    depth: int,
    variances: tuple[Number, Number, Number],
    normalized: bool,
    tangent: bool,
) -> Tensor:
    dual = _Normalized(dual_activation(activation)) if normalized else dual_activation(activation)
    layers = _layers(_checked_depth(depth), *variances)
    first, diagonal = _diagonals(net, dual, net.x1, layers, variances, tangent)
    second = first if net.symmetric else _diagonals(net, dual, net.x2, layers, variances)[0]

    def tile(rows: slice, columns: slice) -> Tensor:
        p = [v[rows, None] for v in first]
        q = [v[None, columns] for v in second]

        def expectations(l: int, c: Tensor) -> tuple[Tensor, Tensor | None]:
            return dual.both(p[l], q[l], c) if tangent else (dual.covariance(p[l], q[l], c), None)

        c = variances[0] * net.spread(net.covariance(rows, columns)) + variances[1]
        return _ascend(net, c, layers, expectations)

    n, m = len(net.x1), len(net.x2)
    rows = list(_rows(n, m * net.size, (*first, *second, net.x1, net.x2, *variances)))
    if not net.symmetric:
        blocks = [tile(r, slice(0, m)) for r in rows]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)
    kernel = _mirrored([tile(r, slice(r.start, n)) for r in rows], rows)
    return torch.diagonal_scatter(kernel, diagonal)


def _ascend(
    net: _Dense | _Conv,
    c: Tensor,
    layers: Sequence[tuple[Number, Number]],
    expectations: Callable[[int, Tensor], tuple[Tensor, Tensor | None]],
    trail: list[Tensor] | None = None,
) -> Tensor:
    """Follow covariances through the layers: the NNGP, or the tangent kernel where slopes come along.

    Args:
        net: how a layer spreads covariances.
        c: covariances in the first layer.
        layers: variances of the weights and biases of each further one.
        expectations: function of the layer's number and covariances that gives $\\Sigma$ and $\\dot\\Sigma$ or `None`.
        trail: list that takes the covariances in every hidden layer.
    """
    theta = c
    for l, (weight, bias) in enumerate(layers):
        if trail is not None:
            trail.append(c)
        spread = net.read_out if l == len(layers) - 1 else net.spread
        sigma, slope = expectations(l, c)
        if slope is None:
            theta = c = _affine(spread(sigma), weight, bias)
        else:
            moved = spread(slope * theta)
            c = _affine(spread(sigma), weight, bias)
            theta = c + _affine(moved, weight, 0)
    return theta


def _rows(n: int, width: int, values: Sequence[Number]) -> Iterator[slice]:
    """Slices of rows that make a tile; all rows where gradients keep every intermediate value anyway."""
    tracked = torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)
    step = n if tracked else max(1, TILE // width)
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _mirrored(blocks: Sequence[Tensor], rows: Sequence[slice]) -> Tensor:
    """The symmetric matrix of its block rows from the diagonal to the right; equal to its transpose to the bit."""
    parts = []
    for k, (block, row) in enumerate(zip(blocks, rows, strict=True)):
        side = row.stop - row.start
        corner = block[:, :side]
        corner = corner.triu() + corner.triu(1).mT
        left = [blocks[j][:, row.start - rows[j].start : row.stop - rows[j].start].mT for j in range(k)]
        parts.append(torch.cat([*left, corner, block[:, side:]], 1))
    return torch.cat(parts)


def _checked_depth(depth: int) -> int:
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"expected depth to be a whole number of at least 1, got {depth!r}")
    return depth


def _layers(depth: int, weight: Number, bias: Number, last: Number) -> list[tuple[Number, Number]]:
    return [(weight, bias)] * (depth - 1) + [(last, 0.0)]


def _affine(x: Tensor, weight: Number, bias: Number) -> Tensor:
    x = x if isinstance(weight, float) and weight == 1 else x * weight
    return x if isinstance(bias, int | float) and bias == 0 else x + bias


def _diagonals(
    net: _Dense | _Conv,
    dual: DualActivation | _Normalized,
    x: Tensor,
    layers: Sequence[tuple[Number, Number]],
    variances: tuple[Number, Number, Number],
    tangent: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """Variances of the neurons of every layer, and the diagonal of the kernel."""

    def expectations(l: int, c: Tensor) -> tuple[Tensor, Tensor | None]:
        return dual.diagonal(c), dual.diagonal_derivative(c) if tangent else None

    trail: list[Tensor] = []
    start = variances[0] * net.spread(net.variance(x)) + variances[1]
    return trail, _ascend(net, start, layers, expectations, trail)


def _diagonal(
    net: _Dense | _Conv, activation: Activation, depth: int, variances: tuple[Number, Number, Number]
) -> Tensor:
    layers = _layers(_checked_depth(depth), *variances)
    return _diagonals(net, dual_activation(activation), net.x1, layers, variances)[1]


class _Normalized:
    """A dual at unit variances, of the activation divided by its root mean square."""

    def __init__(self, dual: DualActivation) -> None:
        self._dual = dual

    def covariance(self, p: Tensor, q: Tensor, c: Tensor) -> Tensor:
        return self._dual(c)

    def both(self, p: Tensor, q: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return self._dual.both_normalized(c)

    def diagonal(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)

    def diagonal_derivative(self, q: Tensor) -> Tensor:
        return self._dual.derivative(torch.ones_like(q))


def _variances(weight: Number, bias: Number, last: Number, normalized: bool) -> tuple[Number, Number, Number]:
    for name, value in (("weight_var", weight), ("bias_var", bias), ("last_var", last)):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not 0 <= number < float("inf"):
            raise ValueError(f"expected {name} of at least 0, got {number!r}")
    if normalized and not (
        all(isinstance(v, int | float) for v in (weight, bias, last)) and (weight, bias, last) == (1, 0, 1)
    ):
        raise ValueError("expected variances 1, 0 and 1 with normalized=True, got others")
    return weight, bias, last
