"""Networks and expressions that circuit diagrams are drawn of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchfolio.diagrams import Expression, ncd, op
from torchfolio.models import MLP, BasicBlock, ConvNet, UNet, ViT

SIZES = {"b": 2, "y": 5, "x": 7, "m": 32, "k": 8, "h": 4, "n": 32, "a": 3, "c": 6, "p": 8, "q": 6}


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another."""

    def __init__(self, m: int = 32, k: int = 8, h: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(m, m) for _ in range(4))
        self.shape = (k, h)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        q, k, v = (layer(t).unflatten(-1, self.shape) for layer, t in ((self.q, y), (self.k, x), (self.v, x)))
        score = torch.einsum("ykh,xkh->yxh", q, k) / self.shape[0] ** 0.5
        return self.o(torch.einsum("yxh,xkh->ykh", score.softmax(1), v).flatten(-2))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, for a batch."""

    def __init__(self, m: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(m, m) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        score = torch.einsum("byc,bxc->byx", self.q(x), self.k(x)).softmax(-1)
        return torch.einsum("byx,bxc->byc", score, self.v(x))


class Branching(nn.Module):
    """Control flow that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _convolutions() -> nn.Module:
    depthwise, dilated = nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 3, dilation=2)
    return nn.Sequential(depthwise, dilated, nn.ReLU(), nn.ConvTranspose2d(6, 3, 2, 2))


class Attention(nn.Module):
    """Scaled dot-product attention."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Recurrent(nn.Module):
    """A gated cell, run over three steps: half of what it remembers is kept, half comes from the input."""

    def __init__(self, m: int = 6, n: int = 8) -> None:
        super().__init__()
        self.gate, self.new = nn.Linear(m + n, n), nn.Linear(m + n, n)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        for word in x.unbind(1):
            both = torch.cat([word, state], -1)
            gate = self.gate(both).sigmoid()
            state = gate * state + (1 - gate) * self.new(both).tanh()
        return state


@dataclass(frozen=True)
class Piece:
    """A module of the gallery.

    Attributes:
        make: the module.
        inputs: names of the axes of each input.
        sizes: sizes of the axes.
        other: other sizes of those axes that may vary.
    """

    make: Callable[[], nn.Module]
    inputs: tuple[str, ...]
    sizes: dict[str, int]
    other: dict[str, int]

    def tensors(self, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        known = {**self.sizes, **sizes}
        return tuple(torch.randn([known[a] for a in axes.split()]) for axes in self.inputs)

    def varied(self) -> list[dict[str, int]]:
        """No other size, each one by itself, and all."""
        return [{}, *({a: n} for a, n in self.other.items()), self.other]


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True).train()


IMAGE = {"b": 3, "h": 12, "w": 16}


MODULES: dict[str, Piece] = {
    "mlp": Piece(lambda: MLP(64, 10, (32, 16)), ("b m",), {"b": 4, "m": 64}, {"b": 7}),
    "attention": Piece(Attention, ("b y k", "b x k", "b x k"), {"b": 2, "y": 5, "x": 7, "k": 8},
                       {"b": 3, "y": 6, "x": 4, "k": 5}),
    "cross attention": Piece(CrossAttention, ("y m", "x m"), {"y": 5, "x": 7, "m": 32}, {"y": 6, "x": 3}),
    "self attention": Piece(SelfAttention, ("b x m",), {"b": 2, "x": 5, "m": 16}, {"b": 3, "x": 9}),
    "encoder layer": Piece(_encoder, ("b x m",), {"b": 2, "x": 5, "m": 16}, {"b": 3, "x": 7}),
    "convolutions": Piece(_convolutions, ("b c h w",), {"b": 2, "c": 4, "h": 12, "w": 12}, {"b": 3, "h": 16, "w": 14}),
    "conv net": Piece(lambda: ConvNet(10, 1, (8, 16)).eval(), ("b c h w",), {"b": 2, "c": 1, "h": 8, "w": 8}, {"b": 3}),
    "residual block": Piece(lambda: BasicBlock(8, 8).train(), ("b c h w",), {"b": 2, "c": 8, "h": 8, "w": 8}, IMAGE),
    "u-net": Piece(lambda: UNet(1, widths=(4, 8)).eval(), ("b c h w",), {"b": 2, "c": 1, "h": 8, "w": 8}, IMAGE),
    "vit": Piece(lambda: ViT(8, 4, 10, 1, dim=16, depth=1, heads=2).eval(), ("b c h w",),
                 {"b": 2, "c": 1, "h": 8, "w": 8}, {"b": 3}),
    "recurrent cell": Piece(Recurrent, ("b t m", "b n"), {"b": 2, "t": 3, "m": 6, "n": 8}, {"b": 5}),
}  # fmt: skip


def _attention() -> Expression:
    scores = ncd("y k h, x k h -> y x h") @ op.scale(8**-0.5) @ op.softmax("x")
    return scores * op.identity("x k h") @ ncd("y x h, x k h -> y k h")


def _heads() -> Expression:
    own = {"m": 32, "k": 8, "h": 4}
    query = op.identity("y m") @ op.linear("m -> k h", name="Q", **own)
    both = op.linear("m -> k h", name="K", **own) * op.linear("m -> k h", name="V", **own)
    context = op.identity("x m") @ op.copy() @ both
    return query * context @ _attention() @ op.linear("k h -> n", bias=True, name="O", k=8, h=4, n=32)


def _branches() -> Expression:
    down = op.conv("c p q -> n i j", kernel=3, stride=2, padding=1, bias=True, c=6, n=4)
    back = op.conv("n i j -> e p q", kernel=4, stride=2, padding=1, transposed=True, n=4, e=2)
    same = op.conv("c p q -> d p q", kernel=3, padding=1, groups=2, c=6, d=2)
    both = (op.identity("c p q") @ down @ back) * (op.identity("c p q") @ same)
    return op.identity("c p q") @ op.copy() @ both @ op.concat("e, d -> f") @ op.elementwise("tanh")


def _residual() -> Expression:
    hidden = op.identity("a m") @ op.linear("m -> c", bias=True, m=32, c=6) @ op.elementwise("tanh")
    inner = hidden @ op.linear("c -> m", c=6, m=32) @ ncd("a m -> m a")
    return op.identity("a m") @ op.copy() @ (inner * op.identity("a m")) @ op.add()


EXPRESSIONS: dict[str, Callable[[], Expression]] = {
    "attention": _attention,
    "batched attention": lambda: _attention() >> "b",
    "cross attention": _heads,
    "residual": _residual,
    "branches": lambda: _branches() >> "b",
}
