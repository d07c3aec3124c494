"""Draw a module of your own, every axis of every tensor a wire."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.insight.circuit_diagrams import draw


class GatedAttention(nn.Module):
    """Attention whose output is gated by the input."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(mixed * torch.sigmoid(self.gate(x)))


drawing = draw(GatedAttention(), torch.randn(2, 10, 32), names=["b x m"], dynamic=["x"])
print(drawing.signature())
drawing.svg("attention.svg")
cost = drawing.cost()
print("multiplications and additions:", cost.total(), "memory at the peak:", cost.peak())
drawing.backward().svg("backward.svg")  # the gradient, drawn in the same way
