"""Networks whose embedding is comparable with an old one by learnable orthonormal changes of basis, and ordinary ones.

Reference:
    Zhou et al., BT²: Backward-compatible Training with Basis Transformation, ICCV 2023 (arXiv 2211.03989), Section 4.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import positive, whole

__all__ = ["BT2Output", "BackwardCompatible", "BasisTransformation", "Embed", "Embedder", "Rotation"]


class Rotation(nn.Module):
    """A learnable orthonormal map, $x \\mapsto x (Q e^{S - S^\\top})^\\top$ with a random orthonormal Q and S below the diagonal.

    Args:
        dim: dimension of the vectors.
    """

    base: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("base", torch.linalg.qr(torch.randn(dim, dim))[0])
        self.skew = nn.Parameter(torch.zeros(dim, dim))

    @property
    def matrix(self) -> Tensor:
        """The orthonormal matrix, in float32 at least."""
        below = (self.skew if self.skew.dtype == torch.float64 else self.skew.float()).tril(-1)
        return self.base.to(below) @ torch.matrix_exp(below - below.T)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


class BT2Output(NamedTuple):
    """What a backward-compatible network gives.

    Attributes:
        logits: `[B, K]`; `None` from the transformation alone.
        compatible: first m coordinates of the embedding, `[B, m]`.
        new: new branch $f$ of unit length, `[B, n]`.
        embedding: $\\phi_{new}$, `[B, d + n]`.
    """

    logits: Tensor | None
    compatible: Tensor
    new: Tensor
    embedding: Tensor


class BasisTransformation(nn.Module):
    """From features to an embedding whose first coordinates are comparable with an old one.

    Args:
        new_dim: n, coordinates of the new branch.
        old_dim: m, coordinates of the old embedding.
        extra_dim: d, from 0 to m; d + n must be at least m.
        scale: C, weight of the new branch.

    Shapes:
        features `[B, n + m]` to a `BT2Output`.

    Raises:
        ValueError: if d is above m, or d + n below m.
    """

    def __init__(self, new_dim: int, old_dim: int, extra_dim: int = 32, scale: float = 2.0) -> None:
        super().__init__()
        self.new_dim, self.old_dim = whole("new_dim", new_dim, 1), whole("old_dim", old_dim, 1)
        self.extra_dim = whole("extra_dim", extra_dim, 0, old_dim)
        self.scale = positive("scale", scale)
        if extra_dim + new_dim < old_dim:
            raise ValueError(
                f"expected extra_dim + new_dim to be at least old_dim {old_dim}, got {extra_dim + new_dim}"
            )
        self.old = nn.Linear(new_dim + old_dim, old_dim)
        self.rotate_new, self.rotate_compatible = Rotation(new_dim), Rotation(old_dim)

    def forward(self, z: Tensor) -> BT2Output:
        if z.shape[-1] != self.new_dim + self.old_dim:
            raise ValueError(f"expected {self.new_dim + self.old_dim} features, got shape {tuple(z.shape)}")
        new = F.normalize(z[..., : self.new_dim], dim=-1)
        # The old branch is normalised before and after the cut; the first has no effect on the second.
        old = F.normalize(self.old(z.relu())[..., : self.extra_dim], dim=-1)
        u = torch.cat([old, self.scale * self.rotate_new(new)], -1)
        compatible = self.rotate_compatible(u[..., : self.old_dim])
        return BT2Output(None, compatible, new, torch.cat([compatible, u[..., self.old_dim :]], -1))

    def extra_repr(self) -> str:
        return f"new_dim={self.new_dim}, old_dim={self.old_dim}, extra_dim={self.extra_dim}, scale={self.scale}"


class BackwardCompatible(nn.Module):
    """A classifier on a backward-compatible embedding.

    Args:
        backbone: network from inputs to n + m features `[B, n + m]`.
        new_dim: number of new features, see `BasisTransformation`.
        old_dim: number of old features, see `BasisTransformation`.
        num_classes: number of classes.
        extra_dim: number of extra features, see `BasisTransformation`.
        scale: scale, see `BasisTransformation`.

    Shapes:
        inputs to logits `[B, K]`; `outputs(x)` gives everything, `embed(x)` the embedding `[B, d + n]`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        new_dim: int,
        old_dim: int,
        num_classes: int,
        extra_dim: int = 32,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformation = BasisTransformation(new_dim, old_dim, extra_dim, scale)
        self.head = nn.Linear(new_dim, whole("num_classes", num_classes, 2), bias=False)

    def outputs(self, x: Tensor) -> BT2Output:
        """Logits, compatible part, new branch and embedding."""
        transformed = self.transformation(self.backbone(x).flatten(1))
        return transformed._replace(logits=self.head(transformed.new))

    def embed(self, x: Tensor) -> Tensor:
        """The embedding, of constant length: to be compared whole with its like, by its first m coordinates with the old."""
        return self.outputs(x).embedding

    def forward(self, x: Tensor) -> Tensor:
        logits = self.outputs(x).logits
        assert logits is not None
        return logits

    @torch.no_grad()
    def folded(self) -> BackwardCompatible:
        """A copy whose changes of basis are plain linear maps, for inference."""
        net = copy.deepcopy(self)
        for name in ("rotate_new", "rotate_compatible"):
            matrix = getattr(net.transformation, name).matrix
            plain = nn.Linear(*matrix.shape, bias=False, device=matrix.device, dtype=net.head.weight.dtype)
            plain.weight.copy_(matrix)
            setattr(net.transformation, name, plain)
        return net


class Embedder(nn.Module):
    """The ordinary classifier on unit embeddings, $y = Af$: the independent model, and that of BCT.

    Args:
        backbone: network from inputs to features `[B, dim]`.
        dim: coordinates of the embedding.
        num_classes: number of classes.
    """

    def __init__(self, backbone: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, num_classes, bias=False)

    def embed(self, x: Tensor) -> Tensor:
        """Unit embeddings `[B, dim]`."""
        return F.normalize(self.backbone(x).flatten(1), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Embed(nn.Module):
    """A network that answers with its embedding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.embed(x)
