"""What random features have in common: a map of inputs and one of weights, whose dot product estimates a function."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive, whole

__all__ = ["RandomFeatures", "gaussian_matrix"]


def gaussian_matrix(rows: int, columns: int, seed: int | None, orthogonal: bool = False) -> tuple[Tensor, int]:
    """A float64 matrix of standard normal rows, and the seed that draws it; orthogonal ones in blocks of `columns`."""
    seed = int(torch.randint(2**62, ())) if seed is None else whole("seed", seed, 0)
    generator = torch.Generator().manual_seed(seed)
    plain = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if not orthogonal:
        return plain, seed
    blocks = torch.randn(-(-rows // columns), columns, columns, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(blocks)
    Q = Q * R.diagonal(dim1=1, dim2=2).sign()[:, None]  # uniform only with these signs
    directions = Q.mT.reshape(-1, columns)[:rows]
    return directions * plain.norm(dim=1, keepdim=True), seed


class RandomFeatures(nn.Module):
    """Base of the feature maps: `forward` maps inputs, `psi` maps weights, both to `width` real numbers.

    Args:
        in_features: size d of an input.
        m: number of random features.
        bias: whether the layer has biases.
        radius: norm r that inputs are brought to, $r x / \\lVert x \\rVert$; they stay as they are by default.
    """

    projection: Tensor
    width: int

    def __init__(self, in_features: int, m: int, bias: bool, radius: float | None) -> None:
        super().__init__()
        self.in_features, self.m = whole("in_features", in_features, 1), whole("m", m, 1)
        self.bias, self.radius = bool(bias), None if radius is None else float(positive("radius", radius))

    def forward(self, x: Tensor) -> Tensor:
        """$\\Phi(x)$: `[..., d]` to `[..., width]`."""
        features, log_scale = self.scaled(x)
        return features if log_scale is None else features * log_scale.exp()

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """$\\Phi(x)$ divided by a positive factor for every input, and the factor's logarithm, `None` for 1."""
        raise NotImplementedError

    def psi(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """$\\Psi(w, b)$ for weights `[l, d]` and biases `[l]` (0 by default): `[l, width]`."""
        raise NotImplementedError

    def kernel(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """$\\Phi(x) \\cdot \\Psi(w, b)$ for all pairs, `[..., l]`."""
        return self(x) @ self.psi(weight, bias).mT

    def _inputs(self, x: Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected inputs of {self.in_features} features, got shape {tuple(x.shape)}")
        return x if self.radius is None else self.radius * F.normalize(x, dim=-1)

    def _check_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        if weight.dim() != 2 or weight.shape[1] != self.in_features:
            raise ValueError(f"expected weights [l, {self.in_features}], got {list(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"expected {len(weight)} biases, got {list(bias.shape)}")

    def extra_repr(self) -> str:
        radius = "" if self.radius is None else f", radius={self.radius}"
        return f"{self.in_features}, m={self.m}, bias={self.bias}{radius}"
