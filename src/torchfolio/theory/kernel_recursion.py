"""Covariances through the layers of infinitely wide networks: taken of inputs, spread by a layer, read out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.shown import Shown
from torchfolio.theory.dual_activations import Activation, dual_activation
from torchfolio.theory.dual_base import DualActivation

__all__ = ["Conv", "Dense", "checked_depth", "checked_variances", "kernel_diagonal", "kernel_matrix"]

TILE = 1 << 16  # covariances followed at a time: half a megabyte of each intermediate value


Number = float | Tensor


class Dense(Shown):
    """Inputs `[n, d]` of a fully connected network, and their covariances.

    Raises:
        ValueError: on inputs of another shape, or, normalized, of another length than 1.
    """

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


class Conv(Shown):
    """Inputs `[n, channels, height, width]` of a convolutional network, and the covariances of their places.

    Raises:
        ValueError: on inputs of another shape, or an even kernel size.
    """

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


def kernel_matrix(
    net: Dense | Conv,
    activation: Activation,
    depth: int,
    variances: tuple[Number, Number, Number],
    normalized: bool,
    tangent: bool,
) -> Tensor:
    """The kernel of a network's outputs between all inputs `[n1, n2]`: of the tangent, or of the Gaussian process."""
    dual = _Normalized(dual_activation(activation)) if normalized else dual_activation(activation)
    layers = _layers(checked_depth(depth), *variances)
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
    net: Dense | Conv,
    c: Tensor,
    layers: Sequence[tuple[Number, Number]],
    expectations: Callable[[int, Tensor], tuple[Tensor, Tensor | None]],
    trail: list[Tensor] | None = None,
) -> Tensor:
    """Follow covariances through the layers: the NNGP, or the tangent kernel where slopes come along.

    Args:
        net: kind of layer, which spreads covariances.
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


def checked_depth(depth: int) -> int:
    """The depth.

    Raises:
        ValueError: unless it is a whole number of at least 1.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"expected depth to be a whole number of at least 1, got {depth!r}")
    return depth


def _layers(depth: int, weight: Number, bias: Number, last: Number) -> list[tuple[Number, Number]]:
    return [(weight, bias)] * (depth - 1) + [(last, 0.0)]


def _affine(x: Tensor, weight: Number, bias: Number) -> Tensor:
    x = x if isinstance(weight, float) and weight == 1 else x * weight
    return x if isinstance(bias, int | float) and bias == 0 else x + bias


def _diagonals(
    net: Dense | Conv,
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


def kernel_diagonal(
    net: Dense | Conv, activation: Activation, depth: int, variances: tuple[Number, Number, Number]
) -> Tensor:
    """Variances of the outputs `[n]`, the diagonal of `kernel_matrix`."""
    layers = _layers(checked_depth(depth), *variances)
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


def checked_variances(weight: Number, bias: Number, last: Number, normalized: bool) -> tuple[Number, Number, Number]:
    """The variances of weights, biases and last weights.

    Raises:
        ValueError: if one is negative or not finite, or, normalized, other than 1, 0 and 1.
    """
    for name, value in (("weight_var", weight), ("bias_var", bias), ("last_var", last)):
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not 0 <= number < float("inf"):
            raise ValueError(f"expected {name} of at least 0, got {number!r}")
    if normalized and not (
        all(isinstance(v, int | float) for v in (weight, bias, last)) and (weight, bias, last) == (1, 0, 1)
    ):
        raise ValueError("expected variances 1, 0 and 1 with normalized=True, got others")
    return weight, bias, last
