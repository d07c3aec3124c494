"""Random features by which an input and the parameters of a feed-forward layer meet in one dot product only.

Each class maps inputs (`forward`, called $\\Phi$) and weights (`psi`, called $\\Psi$) so that
$\\Phi(x) \\cdot \\Psi(w, b)$ estimates a function of both: `URF` any $f(w \\cdot x + b)$ with a Fourier transform,
`ArcCosineFeatures` the arc-cosine kernel.

Reference:
    Sehanobish et al., Scalable Neural Network Kernels, ICLR 2024, arXiv 2310.13225.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchfolio.checks import finite, number, one_of
from torchfolio.layers.feature_map import RandomFeatures, gaussian_matrix
from torchfolio.layers.fourier_measures import FourierMeasure
from torchfolio.layers.universal_features import URF, best_damping

__all__ = [
    "URF",
    "ArcCosineFeatures",
    "FourierMeasure",
    "RandomFeatures",
    "best_damping",
    "features_of",
    "kernel_error",
]


class ArcCosineFeatures(RandomFeatures):
    """Features of the arc-cosine kernel: $\\Phi(x) = \\mathrm{ReLU}(Gx)/\\sqrt m$, and $\\Psi(w)$ the same of w.

    Their dot product tends to $\\lVert x\\rVert \\lVert w\\rVert (\\sin\\theta + (\\pi - \\theta)\\cos\\theta) / 2\\pi$
    with the angle $\\theta$: no approximation of $\\mathrm{ReLU}(w \\cdot x)$, but a kernel that no $f(w \\cdot x)$ is.
    With biases it is that of $(x, 1)$ and $(w, b)$.

    Args:
        in_features: size d of an input.
        m: number of features, at least 1.
        orthogonal: whether the rows of G are orthogonal in blocks of d, with the norms of Gaussian ones.
        floor: constant c of $\\max(Gx, c)$; 0 is the ReLU, and the exact kernel is known for it alone.
        bias: whether inputs get a constant 1, and weights their bias.
        radius: norm that inputs are brought to.
        seed: seed of G; drawn from torch's global generator by default.

    Shapes:
        `[..., d]` to `[..., m]`; `psi`: `[l, d]` to `[l, m]`.
    """

    offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        m: int,
        orthogonal: bool = False,
        *,
        floor: float = 0.0,
        bias: bool = False,
        radius: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(in_features, m, bias, radius)
        matrix, _ = gaussian_matrix(m, in_features + bias, seed, orthogonal)
        matrix = (matrix / math.sqrt(m)).to(torch.get_default_dtype())
        self.width, self.floor = m, float(number("floor", floor))
        self.register_buffer("projection", matrix[:, :in_features].contiguous())
        self.register_buffer("offset", matrix[:, -1].clone() if bias else None)

    def _activation(self, z: Tensor) -> Tensor:
        return z.relu() if self.floor == 0 else z.clamp(min=self.floor / math.sqrt(self.m))

    def scaled(self, x: Tensor) -> tuple[Tensor, None]:
        return self._activation(F.linear(self._inputs(x), self.projection, self.offset)), None

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self._check_weights(weight, bias)
        z = F.linear(weight, self.projection)
        if bias is not None and self.offset is None:
            raise ValueError("expected no biases for features made with bias=False, got some")
        return self._activation(z if bias is None or self.offset is None else z + bias[:, None] * self.offset)

    @staticmethod
    def exact(x: Tensor, weight: Tensor) -> Tensor:
        """The kernel itself for all pairs (without biases), `[..., l]`."""
        norms = x.norm(dim=-1, keepdim=True) * weight.norm(dim=1)
        cosine = (x @ weight.mT / norms.clamp(min=torch.finfo(x.dtype).tiny)).clamp(-1, 1)
        theta = cosine.arccos()
        return norms / (2 * math.pi) * (theta.sin() + (math.pi - theta) * cosine)


def features_of(
    kind: str | FourierMeasure | Callable[..., RandomFeatures], in_features: int, m: int, **arguments: Any
) -> RandomFeatures:
    """Features by name (`"relu"`, `"sin"`, `"cos"`), of a measure, or of `kind(in_features, m, bias=, radius=, seed=)`."""
    if isinstance(kind, FourierMeasure):
        return URF(in_features, m, kind, **arguments)
    if callable(kind):
        try:
            features = kind(in_features, m, **arguments)
        except TypeError as error:
            raise TypeError(
                "expected features to be a factory called as (in_features, m, bias=, radius=, seed=); an elementwise "
                f"function is given as FourierMeasure.from_function(f) ({error})"
            ) from None
        if not isinstance(features, RandomFeatures):
            raise TypeError(f"expected features to make RandomFeatures, got {type(features).__name__}")
        return features
    one_of("features", kind, ("relu", "sin", "cos"))
    if kind == "relu":
        return ArcCosineFeatures(in_features, m, **arguments)
    return URF(in_features, m, FourierMeasure.sin() if kind == "sin" else FourierMeasure.cos(), **arguments)


@torch.no_grad()
def kernel_error(
    features: RandomFeatures | Iterable[RandomFeatures], x: Tensor, w: Tensor, exact: Tensor | None = None
) -> dict[int, float]:
    """Relative error of the estimate over all pairs, by number of features m.

    Args:
        features: one feature map or several; maps of the same m are averaged (root mean square).
        x: inputs `[N, d]`.
        w: weights `[l, d]`.
        exact: values `[N, l]`; those of the map's own `exact` by default.

    Returns:
        $\\lVert \\text{estimate} - \\text{exact} \\rVert / \\lVert \\text{exact} \\rVert$ for every m.

    Raises:
        ValueError: if there is no map, the exact values are of another shape, or all of them are 0.
    """
    maps: Any = [features] if isinstance(features, RandomFeatures) else list(features)
    if not maps:
        raise ValueError("expected at least one feature map, got none")
    squares: dict[int, list[float]] = {}
    for one in maps:
        values = finite("exact", one.exact(x, w) if exact is None else exact)
        estimate = one.kernel(x, w)
        if values.shape != estimate.shape:
            raise ValueError(f"expected exact values of shape {list(estimate.shape)}, got {list(values.shape)}")
        norm = float(values.double().norm())
        if norm == 0:
            raise ValueError("expected exact values that are not all 0, to which an error could be relative")
        squares.setdefault(one.m, []).append((float((estimate - values).double().norm()) / norm) ** 2)
    return {m: math.sqrt(sum(own) / len(own)) for m, own in sorted(squares.items())}
