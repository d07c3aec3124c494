"""Parts that are repeated or put into boxes: what is drawn of them, and that costs count all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchfolio.diagrams import check_svg, draw
from torchfolio.errors import TorchfolioError


def encoder(layers=4, **more):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False, **more).eval()


X = torch.rand(2, 5, 16)


class Chain(nn.Module):
    """Maps of one width, or of several, with an addition between them or none."""

    def __init__(self, widths, skip=False, keep=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.skip, self.keep = skip, keep

    def forward(self, x):
        kept = []
        for layer in self.layers:
            x = layer(x) + x if self.skip else layer(x)
            kept.append(x)
        return tuple(kept) if self.keep else x


def repeats(drawing):
    return [f.repeat for f in drawing.sheet.fences if f.repeat > 1]


def test_layers_built_alike_are_one_between_parentheses():
    net = encoder()
    folded, whole = draw(net, X, repeats=3), draw(net, X, level="full")
    assert repeats(folded) == [4]
    assert repeats(whole) == []
    assert len(folded.sheet.columns) * 3 < len(whole.sheet.columns)
    assert folded.cost().total() == whole.cost().total()
    assert folded.signature() == whole.signature() == "b x m -> b x m"
    check = check_svg(folded.svg())
    assert check.counts_agree
    assert not check.overlaps
    assert "λ = 1…4" in folded.svg()
    torch.testing.assert_close(folded.to_module()(X), net(X))
    assert {o["times"] for column in folded.json()["operations"] for o in column} == {4}


@pytest.mark.parametrize(
    ("net", "found"),
    [
        (Chain([6] * 5), [4]),
        (Chain([6] * 5, skip=True), [4]),
        (Chain([6, 6, 6, 5, 5, 5, 5]), [3]),  # two of one width, one between, three of another
        (Chain([6, 7, 8, 9]), []),
        (Chain([6] * 3), []),  # two are too few
        (Chain([6] * 5, keep=True), []),  # what is inside is used after
    ],
)
def test_what_is_repeated_and_what_is_not(net, found):
    x = torch.rand(3, 6)
    drawing = draw(net, x)
    assert repeats(drawing) == found
    assert drawing.cost().total() == draw(net, x, level="full").cost().total()
    assert check_svg(drawing.svg()).counts_agree


def test_boxes_are_opened_and_closed():
    net = nn.Sequential(encoder(2), nn.Linear(16, 3))
    drawing = draw(net, X, level="blocks")
    kinds = [s.kind for column in drawing.sheet.columns for s in column]
    assert kinds == ["block", "linear"]
    opened = drawing.expand("0.layers.1")
    inside = [s for column in opened.sheet.columns for s in column]
    assert [s.path for s in inside if s.kind == "block"] == ["0.layers.0"]
    assert any(s.kind == "softmax" for s in inside)
    assert opened.fold().svg() == drawing.svg()
    assert drawing.fold(2).cost().total() == drawing.cost().total() == draw(net, X, level="full").cost().total()
    with pytest.raises(ValueError, match=r"one of 0, .*0\.layers\.1.*, got 'layers'"):
        drawing.expand("layers")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        drawing.fold(-1)
    with pytest.raises(ValueError, match="at least two repeats"):
        draw(net, X, repeats=1)


def test_the_batch_can_be_left_out():
    net = encoder(1)
    drawing, whole = draw(net, X, hide_batch=True), draw(net, X)
    assert drawing.signature() == "x m -> x m"
    assert drawing.cost().total() == whole.cost().total()
    assert check_svg(drawing.svg()).counts_agree
    with pytest.raises(TorchfolioError, match=r"the norm of .* is about it"):
        draw(nn.Sequential(nn.BatchNorm1d(3)).train(), torch.rand(2, 3), hide_batch=True)
