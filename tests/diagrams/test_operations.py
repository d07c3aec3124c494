"""Operations one by one: which axes come out, whether they have a sign, and that the diagram computes what they do."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.diagrams.test_modules import Of, R
from torchfolio.diagrams import check_svg, draw

X, INDEX = R(3, 4, 6), torch.tensor([0, 2, 1, 0, 1])
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


def W(*shape):
    return nn.Parameter(R(*shape))


SIGNED = {
    "matrix and vector": (Of(lambda s, x: x @ s.w, w=W(6)), (X,), "b x m -> b x"),
    "vector and matrix": (Of(lambda s, x: s.w @ x, w=W(4)), (X,), "b x m -> b m"),
    "two vectors": (Of(lambda s, x: x[0, 0] @ s.w, w=W(6)), (X,), "b x m -> 1"),
    "batched weights": (Of(lambda s, x: torch.bmm(x, s.w), w=W(3, 6, 5)), (X,), "b x m -> b x n1"),
    "a weight for each head": (Of(lambda s, x: torch.einsum("bhi,hio->bho", x, s.w), w=W(4, 6, 5)), (X,), "b x m -> b x n1"),
    "einsum of two weights": (Of(lambda s, x: torch.einsum("bti,io,o->bto", x, s.w, s.v), w=W(6, 5), v=W(5)), (X,), "b x m -> b x n1"),
    "bilinear": (nn.Bilinear(6, 6, 5), (R(3, 6), R(4, 6)[:3]), "b m, b n1 -> b n2"),
    "tensordot": (Of(lambda s, x: torch.tensordot(x, s.w, ([1, 2], [0, 2])), w=W(4, 5, 6)), (X,), "b x m -> b n1"),
    "inner": (Of(lambda s, x, y: torch.inner(x, y)), (X, R(5, 6)), "b x m, b1 m -> b x b1"),
    "hypernetwork": (Of(lambda s, x, w: F.linear(x, w)), (X, R(5, 6)), "b x m, b1 m -> b x b1"),
    "addmm": (Of(lambda s, x: torch.addmm(s.b, x, s.w), w=W(6, 5), b=W(5)), (R(4, 6),), "b m -> b n1"),
    "movedim": (Of(lambda s, x: x.movedim(0, 2)), (X,), "b x m -> x m b"),
    "swapaxes": (Of(lambda s, x: x.swapaxes(0, 1)), (X,), "b x m -> x b m"),
    "mT": (Of(lambda s, x: x.mT), (X,), "b x m -> b m x"),
    "narrow": (Of(lambda s, x: x.narrow(2, 1, 3)), (X,), "b x m -> b x m1"),
    "glu": (nn.GLU(), (X,), "b x m -> b x m1"),
    "stack": (Of(lambda s, x, y: torch.stack([x, y], 1)), (X, X), "b x m, b x m -> b a x m"),
    "outer": (Of(lambda s, x, y: torch.outer(x, y)), (R(3), R(4)), "b, b1 -> b b1"),
    "where": (Of(lambda s, x, y: torch.where(x > 0, x, y)), (X, R(6)), "b x m, m -> b x m"),
    "masked_fill": (Of(lambda s, x, y: x.masked_fill(y > 0, 2.0)), (X, R(4, 1)), "b x m, x -> b x m"),
    "lerp": (Of(lambda s, x, y: x.lerp(y, 0.3)), (X, R(4, 6)), "b x m, x m -> b x m"),
    "std": (Of(lambda s, x: x.std(1)), (X,), "b x m -> b m"),
    "max": (Of(lambda s, x: x.max(-1)[0]), (X,), "b x m -> b x"),
    "min, kept": (Of(lambda s, x: x - x.min(1, keepdim=True).values), (X,), "b x m -> b x m"),
    "repeat": (Of(lambda s, x: x.repeat(2, 1, 3)), (R(4, 6),), "b m -> a b m1"),
    "expand_as": (Of(lambda s, x, y: x[:, None].expand_as(y).exp()), (R(3, 6), X), "b m, b x n1 -> b x m"),
    "3d pool": (nn.MaxPool3d(2), (R(2, 3, 4, 4, 4),), "b c t h w -> b c t1 h1 w1"),
    "gru": (nn.GRU(6, 5, batch_first=True), (X,), "b x m -> b x n1, b n2"),
    "lstm of a state": (nn.LSTM(6, 5, 2), (X,), "b x m -> b x n1, l x n2, l1 x n3"),
    "comparison": (Of(lambda s, x, y: (x > y) & (x <= 1)), (X, X), "b x m, b x m -> b x m"),
}  # fmt: skip
BOXED = {
    "topk": (Of(lambda s, x: x.topk(2, 1)), (X,), "b x m -> b y m, b z m"),
    "sort": (Of(lambda s, x: x.sort(-1)), (X,), "b x m -> b x m, b x m"),
    "max and its place": (Of(lambda s, x: x.max(1)), (X,), "b x m -> b m, b m"),
    "flip": (Of(lambda s, x: x.flip(1)), (X,), "b x m -> b x m"),
    "cdist": (Of(lambda s, x, y: torch.cdist(x, y)), (X, R(3, 5, 6)), "b x m, b y m -> b x y"),
    "cosine": (Of(lambda s, x, y: F.cosine_similarity(x, y, -1)), (X, X), "b x m, b x m -> b x"),
    "index_select": (Of(lambda s, x, i: x.index_select(1, i)), (X, INDEX), "b x m, b1 -> b b1 m"),
    "indexing": (Of(lambda s, x, i: x[:, i]), (X, INDEX), "b x m, b1 -> b b1 m"),
    "gather": (Of(lambda s, x, i: x.gather(1, i)), (R(3, 4), torch.randint(0, 4, (3, 2))), "b m, b x -> b x"),
    "scatter": (
        Of(lambda s, x, i: x.new_zeros(4, 6).scatter_add(0, i[:, None].expand_as(x), x)),
        (R(5, 6), INDEX),
        "b m, b -> n1 m",
    ),
    "pixel shuffle": (nn.PixelShuffle(2), (R(2, 8, 3, 3),), "b c h w -> b c1 h1 w1"),
}


@pytest.mark.parametrize("name", [*SIGNED, *BOXED])
def test_axes_come_out_under_their_names(name):
    net, inputs, signature = {**SIGNED, **BOXED}[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawing = draw(net, inputs, level="full")
    assert drawing.signature() == signature
    assert bool(drawing.unknown) == (name in BOXED), [str(w.message) for w in said]
    check = check_svg(drawing.svg())
    assert check.counts_agree
    assert not check.overlaps
    wanted, got = (torch.utils._pytree.tree_leaves(f(*inputs)) for f in (net, drawing.to_module()))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["GCNConv", "SAGEConv", "GATConv", "GINConv"])
def test_convolutions_of_graphs(kind):
    """How many edges there are depends on values: self-loops are taken out first."""
    geometric = pytest.importorskip("torch_geometric.nn")
    net = getattr(geometric, kind)(*((nn.Linear(8, 6),) if kind == "GINConv" else (8, 6))).eval()
    drawing = draw(net, (R(5, 8), EDGES), names=["v m", "s e"])
    assert drawing.signature().startswith("v m, s e -> ")
    assert check_svg(drawing.svg()).counts_agree
    torch.testing.assert_close(drawing.to_module()(R(5, 8), EDGES), net(R(5, 8), EDGES))
