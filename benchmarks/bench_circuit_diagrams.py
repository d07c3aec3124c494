"""Time to a drawing: circuit diagrams, torchview, and the floor, which is torch.export alone.

A transformer encoder layer, an image network and a network of the shape of GPT-2 small (12 layers, 768 wide, 12 heads),
which is drawn with its layers as one and with every operation. torchview is timed to the text that it hands to Graphviz;
its layout, by Graphviz's `dot`, is not counted, so that its times are a floor.

    python benchmarks/bench_circuit_diagrams.py [--rounds 5] [--layers 12]     # with torchview: pip install torchview

Measured on one thread of a small cloud CPU, medians of three rounds: GPT-2 small takes 0.93 s folded and 1.49 s with all of
its 256 columns, of which torch.export alone is 0.96 s; the encoder layer 0.16 s (export 0.10), ResNet-20 0.66 s (export
0.64). torchview, which runs the network once and knows no axes, needs 0.47, 0.008 and 0.07 s before Graphviz.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.insight.circuit_diagrams import draw
from torchfolio.measure import alternate
from torchfolio.models import ResNetCIFAR


class Block(nn.Module):
    """Attention to what came before, and a small network for each word."""

    def __init__(self, m: int, h: int) -> None:
        super().__init__()
        self.h = h
        self.norm1, self.norm2 = nn.LayerNorm(m), nn.LayerNorm(m)
        self.attention, self.out = nn.Linear(m, 3 * m), nn.Linear(m, m)
        self.words = nn.Sequential(nn.Linear(m, 4 * m), nn.GELU(), nn.Linear(4 * m, m))

    def forward(self, x: Tensor) -> Tensor:
        b, t, m = x.shape
        parts = self.attention(self.norm1(x)).split(m, 2)
        q, k, v = (p.view(b, t, self.h, m // self.h).transpose(1, 2) for p in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(b, t, m))
        return x + self.words(self.norm2(x))


class Language(nn.Module):
    """A network of the shape of GPT-2."""

    def __init__(self, layers: int, m: int = 768, h: int = 12, words: int = 50257, length: int = 1024) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, m), nn.Embedding(length, m)
        self.blocks = nn.ModuleList(Block(m, h) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(m), nn.Linear(m, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def by_torchview(net: nn.Module, x: Tensor) -> Callable[[], object]:
    import torchview  # pyright: ignore[reportMissingImports]

    return lambda: torchview.draw_graph(net, input_data=x, depth=99, device="cpu").visual_graph.source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    networks: dict[str, tuple[nn.Module, Tensor]] = {
        "encoder layer": (nn.TransformerEncoderLayer(64, 4, batch_first=True), torch.rand(2, 16, 64)),
        "ResNet-20": (ResNetCIFAR(20), torch.rand(2, 3, 32, 32)),
        "GPT-2 small": (Language(arguments.layers), torch.zeros(1, 64, dtype=torch.long)),
    }
    for name, (net, x) in networks.items():
        net.eval()
        ways: dict[str, Any] = {
            "folded": lambda net=net, x=x: draw(net, x).svg(),
            "full": lambda net=net, x=x: draw(net, x, level="full").svg(),
            "export": lambda net=net, x=x: torch.export.export(net, (x,)),
        }
        try:
            ways["torchview"] = by_torchview(net, x)
        except ImportError:
            print("torchview is not installed: left out")
        print(f"\n{name}")
        print(alternate(**ways, repeats=arguments.rounds))


if __name__ == "__main__":
    main()
