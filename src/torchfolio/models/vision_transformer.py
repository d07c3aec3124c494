"""A small vision transformer (Dosovitskiy et al., ICLR 2021)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.models.chain import remembered


class PatchEmbedding(nn.Module):
    """Patches as tokens, with learned positions: `[B, C, H, W] -> [B, (H/p)(W/p), D]`."""

    def __init__(self, image_size: int, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"expected image_size {image_size} to be a multiple of patch_size {patch_size}")
        self.project = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.positions = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, dim))
        nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2) + self.positions


@remembered
class EncoderBlock(nn.Module):
    """A pre-norm transformer block: attention and a two-layer perceptron, each on a residual path.

    Args:
        dim: width of the tokens.
        heads: number of attention heads.
        mlp_ratio: hidden width of the perceptron over `dim`.
        dropout: probability of dropout on both residual paths.

    Shapes:
        `[B, T, dim]` to `[B, T, dim]`.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected dim {dim} to be a multiple of heads {heads}")
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        hidden = round(mlp_ratio * dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self._attend(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).flatten(2))


class TokenMean(nn.Module):
    """The mean over tokens: `[B, T, D] -> [B, D]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


@remembered
class ViT(nn.Sequential):
    """A small vision transformer: `embed`, `block1`, …, `blockL`, `head` (norm, mean over tokens, linear).

    Args:
        image_size: side of the square images.
        patch_size: side of a patch; divides `image_size`.
        num_classes: width of the output.
        in_channels: channels of the images.
        dim: width of the tokens.
        depth: number of blocks.
        heads: attention heads; divide `dim`.
        mlp_ratio: hidden width of the perceptrons over `dim`.
        dropout: probability of dropout on residual paths.

    Shapes:
        `[B, in_channels, image_size, image_size]` to `[B, num_classes]`.

    Reference:
        Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, with mean pooling in place of a class token
        (Beyer et al., "Better plain ViT baselines for ImageNet-1k", 2022).
    """

    def __init__(
        self,
        image_size: int = 32,
        patch_size: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        dim: int = 128,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
    ) -> None:
        children: OrderedDict[str, nn.Module] = OrderedDict()
        children["embed"] = PatchEmbedding(image_size, patch_size, in_channels, dim)
        for k in range(depth):
            children[f"block{k + 1}"] = EncoderBlock(dim, heads, mlp_ratio, dropout)
        children["head"] = nn.Sequential(nn.LayerNorm(dim), TokenMean(), nn.Linear(dim, num_classes))
        super().__init__(children)
