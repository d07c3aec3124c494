"""Similarity of representations: how alike two layers see the same examples."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from torchfolio import checks
from torchfolio.shown import Shown

_ROUNDING = 32  # what is left of constant features after centring, in units of the rounding error


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment with linear kernels, differentiable.

    $$\\mathrm{CKA}(K, L) = \\frac{\\mathrm{HSIC}(K, L)}{\\sqrt{\\mathrm{HSIC}(K, K)\\,\\mathrm{HSIC}(L, L)}},
      \\qquad K = X X^\\top,\\; L = Y Y^\\top.$$

    Invariant to orthogonal maps, isotropic scaling and shifts of either side, not to general linear maps. On
    column- centred features it equals
    $\\lVert Y^\\top X \\rVert_F^2 / (\\lVert X^\\top X \\rVert_F \\lVert Y^\\top Y \\rVert_F)$, which is
    computed where it is cheaper. Half precision is computed in float32, also under autocast.

    Args:
        x: features `[N, ...]`, flattened to rows.
        y: features of the same examples `[N, ...]`; their number per example may differ.
        unbiased: whether to take the U-statistic of HSIC, which does not drift towards 1 with more features than
            examples; N >= 4.

    Returns:
        A scalar, in [0, 1] for the biased estimate. Features that are the same for every example carry
        nothing to
        compare: the result is 0 with zero gradient, with a warning.

    Raises:
        ValueError: if the numbers of examples differ or are too few, or a value is not finite.

    Reference:
        Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019; unbiased: Song
        et al., "Feature Selection via Dependence Maximization", JMLR 2012, equation 5.
    """
    a, b = _rows(x, y, 4 if unbiased else 2)
    with torch.autocast(a.device.type, enabled=False):
        a, b = _Centred(a), _Centred(b)
        if not unbiased or not (a.varies and b.varies):
            return _linear_alignment(a, b)
        return _alignment(a.rows @ a.rows.T, b.rows @ b.rows.T, unbiased)


def linear_cka_pairs(
    xs: Mapping[str, Tensor], ys: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]
) -> list[Tensor]:
    """`linear_cka` of several pairs of layers; what belongs to one layer is computed once.

    Args:
        xs: features `[N, ...]` by name.
        ys: features of the same examples by name.
        pairs: (name in `xs`, name in `ys`).

    Returns:
        A scalar for each pair, differentiable.

    Raises:
        ValueError: see `linear_cka`.
    """
    left: dict[tuple[str, torch.dtype], _Centred] = {}
    right: dict[tuple[str, torch.dtype], _Centred] = {}
    values = []
    for i, j in pairs:
        x, y = _rows(xs[i], ys[j], 2)
        with torch.autocast(x.device.type, enabled=False):
            for known, name, side in ((left, i, x), (right, j, y)):
                if (name, side.dtype) not in known:
                    known[name, side.dtype] = _Centred(side)
            values.append(_linear_alignment(left[i, x.dtype], right[j, y.dtype]))
    return values


def rbf_cka(x: Tensor, y: Tensor, *, bandwidth: float = 0.5, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment with Gaussian kernels $\\exp(-\\lVert x_i - x_j \\rVert^2 / 2\\sigma^2)$,
    differentiable.

    $\\sigma$ is `bandwidth` times the median distance between two examples, which keeps the invariances of
    `linear_cka`.

    Args:
        x: features `[N, ...]`, flattened to rows.
        y: features of the same examples `[N, ...]`.
        bandwidth: width over the median distance; 0.2, 0.4 and 0.8 are the published choices.
        unbiased: whether the estimate is unbiased, see `linear_cka`.

    Returns:
        A scalar, see `linear_cka`.

    Raises:
        ValueError: see `linear_cka`; also if the bandwidth is not positive, or half of the examples coincide.

    Reference:
        Kornblith et al., ICML 2019.
    """
    checks.positive("bandwidth", bandwidth)
    a, b = _rows(x, y, 4 if unbiased else 2)
    with torch.autocast(a.device.type, enabled=False):
        a, b = _Centred(a), _Centred(b)
        if not (a.varies and b.varies):
            return _nothing_to_compare(a.rows, b.rows)
        return _alignment(_rbf(a.rows, bandwidth), _rbf(b.rows, bandwidth), unbiased)


def cka_from_kernels(k_x: Tensor, k_y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Centred kernel alignment of two kernel matrices, differentiable.

    Args:
        k_x: symmetric `[N, N]`, not necessarily centred.
        k_y: symmetric `[N, N]`, over the same examples.
        unbiased: whether the estimate is unbiased, see `linear_cka`.

    Returns:
        A scalar, see `linear_cka`.

    Raises:
        ValueError: if the kernels are not square, of different size, too small, or not finite.
    """
    return _alignment(*_kernels(k_x, k_y, unbiased), unbiased)


def _alignment(k_x: Tensor, k_y: Tensor, unbiased: bool) -> Tensor:
    centre = _u_centred if unbiased else centred_kernel
    a, b = centre(k_x), centre(k_y)
    if _vanished(a, k_x) or _vanished(b, k_y):
        return _nothing_to_compare(a, b)
    return (a / a.norm() * (b / b.norm())).sum()


def hsic(k_x: Tensor, k_y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Hilbert-Schmidt independence criterion of two kernel matrices, differentiable.

    Biased, with $H = I - \\mathbf{1}\\mathbf{1}^\\top / N$: $\\operatorname{tr}(K H L H) / (N - 1)^2$.
    Unbiased: the sum of $\\tilde K \\tilde L$ over $N (N - 3)$, of kernels without diagonal, centred so that
        their rows sum to zero.

    Args:
        k_x: symmetric `[N, N]`.
        k_y: symmetric `[N, N]`.
        unbiased: whether to take the U-statistic; N >= 4. It may be negative.

    Reference:
        Gretton et al., ALT 2005; Song et al., JMLR 2012, equation 5.
    """
    centre = _u_centred if unbiased else centred_kernel
    a, b = (centre(k) for k in _kernels(k_x, k_y, unbiased))
    n = len(a)
    return (a * b).sum() / (n * (n - 3) if unbiased else (n - 1) ** 2)


def rsa(x: Tensor, y: Tensor) -> Tensor:
    """Representational similarity: Pearson's correlation of the two matrices of cosines, differentiable.

    Args:
        x: features `[N, ...]`, flattened to rows.
        y: features of the same examples `[N, ...]`.

    Returns:
        A scalar in [-1, 1]; 0 with zero gradient and a warning if all cosines of one side are equal.

    Raises:
        ValueError: if the numbers of examples differ or are below 3, or a value is not finite.

    Reference:
        Kriegeskorte et al., "Representational Similarity Analysis", Frontiers in Systems Neuroscience 2008.
    """
    a, b = _rows(x, y, 3)
    with torch.autocast(a.device.type, enabled=False):
        a, b = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
        k_x, k_y = _kernels(a @ a.T, b @ b.T, unbiased=False)
        p, q = k_x - k_x.mean(), k_y - k_y.mean()
        if _vanished(p, k_x) or _vanished(q, k_y):
            return _nothing_to_compare(p, q)
        return (p / p.norm() * (q / q.norm())).sum()


class StreamingCKA(Shown):
    """Linear CKA over more examples than fit in one kernel, from the unbiased HSIC of every batch.

    The three averages of HSIC over batches converge to those of all examples, where the average of the
    batches' CKA does not.

    Reference:
        Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?", ICLR 2021, equation 3.
    """

    def __init__(self) -> None:
        self.batches = 0
        self._sums = torch.zeros(3, dtype=torch.float64)

    def update(self, x: Tensor, y: Tensor) -> StreamingCKA:
        """Add the features of one batch, `[N, ...]` each, at least 4 examples, one size throughout."""
        a, b = (part.detach() for part in _rows(x, y, 4))
        a, b = a.double(), b.double()
        a, b = a - a.mean(0), b - b.mean(0)
        k_x, k_y = _u_centred(a @ a.T), _u_centred(b @ b.T)
        scale = len(a) * (len(a) - 3)
        self._sums += torch.stack([(k_x * k_y).sum(), k_x.square().sum(), k_y.square().sum()]).cpu() / scale
        self.batches += 1
        return self

    def compute(self) -> float:
        """The similarity over all batches so far; NaN if one side never varied."""
        if not self.batches:
            raise ValueError("expected at least one batch, got none")
        between, within_x, within_y = self._sums
        return (between / (within_x * within_y).sqrt()).item()


def _rows(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.dim() < 2 or y.dim() < 2:
        raise ValueError(f"expected features [N, ...], got shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if len(x) != len(y):
        raise ValueError(f"expected features of the same examples, got {len(x)} and {len(y)}")
    if len(x) < least:
        raise ValueError(f"expected at least {least} examples, got {len(x)}")
    x, y = at_least_float32(x), at_least_float32(y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.flatten(1).to(dtype), y.flatten(1).to(dtype)


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor itself in 32 or 64 bits, in 32 otherwise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class _Centred:
    """Features minus their mean, at a size that can be squared twice.

    Attributes:
        rows: `[N, d]`.
        varies: whether they differ between examples by more than rounding.
    """

    def __init__(self, features: Tensor) -> None:
        mean = features.mean(0)
        self.rows = features - mean
        size, level = self.rows.detach().norm(), len(features) ** 0.5 * mean.detach().norm()
        if not size.isfinite():
            raise ValueError("the features, or their squares, are not finite")
        self.varies = bool(size > _ROUNDING * torch.finfo(features.dtype).eps * level)
        if self.varies and not 1e-4 < size < 1e4:
            self.rows = self.rows / size  # a constant: the similarity does not depend on the scale

    @cached_property
    def kernel(self) -> Tensor:
        """The linear kernel `[N, N]`, of norm 1."""
        k = self.rows @ self.rows.T
        return k / k.norm()

    @cached_property
    def covariance_norm(self) -> Tensor:
        """The norm of the kernel, from the `[d, d]` side."""
        return (self.rows.T @ self.rows).norm()


def _linear_alignment(a: _Centred, b: _Centred) -> Tensor:
    if not (a.varies and b.varies):
        return _nothing_to_compare(a.rows, b.rows)
    n, p, q = len(a.rows), a.rows.shape[1], b.rows.shape[1]
    if n * (p + q) < p * p + q * q + p * q:
        return (a.kernel * b.kernel).sum()
    return (a.rows.T @ b.rows).square().sum() / (a.covariance_norm * b.covariance_norm)


def _vanished(centred: Tensor, x: Tensor) -> bool:
    """Whether what is left after centring is rounding error."""
    return bool(centred.detach().norm() <= _ROUNDING * torch.finfo(centred.dtype).eps * x.detach().norm())


def _nothing_to_compare(a: Tensor, b: Tensor) -> Tensor:
    warnings.warn("features that do not vary over the examples have similarity 0 to any other", stacklevel=3)
    return 0 * (a.sum() + b.sum())  # keeps the graph, so that a loss of it alone can go backward


def _rbf(x: Tensor, bandwidth: float) -> Tensor:
    gram = x @ x.T
    norms = gram.diagonal()
    square = (norms + norms[:, None] - 2 * gram).clamp_min(0)
    above = torch.triu_indices(len(x), len(x), 1, device=x.device)
    median = square[above[0], above[1]].median()
    if median <= 0:
        raise ValueError("the median distance between examples is 0: at least half of the pairs coincide")
    return torch.exp(-square / (2 * bandwidth**2 * median))


def _kernels(k_x: Tensor, k_y: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    k_x, k_y = torch.as_tensor(k_x), torch.as_tensor(k_y)
    if k_x.dim() != 2 or k_x.shape != k_y.shape or k_x.shape[0] != k_x.shape[1]:
        raise ValueError(f"expected two kernels [N, N], got shapes {tuple(k_x.shape)} and {tuple(k_y.shape)}")
    least = 4 if unbiased else 2
    if len(k_x) < least:
        raise ValueError(f"expected at least {least} examples, got {len(k_x)}")
    if not (k_x.isfinite().all() and k_y.isfinite().all()):
        raise ValueError("the kernels are not finite")
    return at_least_float32(k_x), at_least_float32(k_y)


def centred_kernel(k: Tensor) -> Tensor:
    """A kernel matrix whose rows and columns have mean 0."""
    return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()


def _u_centred(k: Tensor) -> Tensor:
    n = len(k)
    k = k - torch.diag(k.diagonal())
    rows = k.sum(1)
    k = k - rows / (n - 2) - rows[:, None] / (n - 2) + rows.sum() / ((n - 1) * (n - 2))
    return k - torch.diag(k.diagonal())
