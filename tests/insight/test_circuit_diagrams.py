"""Drawings of real modules: which axes are one, which are not, and what is drawn of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from torchfolio.errors import TorchfolioError
from torchfolio.insight.circuit_diagrams import check_svg, draw
from torchfolio.models import BasicBlock, UNet


def kinds(drawing) -> list[str]:
    return [s.kind for column in drawing.sheet.columns for s in column]


def steps(drawing, kind):
    return [s for column in drawing.sheet.columns for s in column if s.kind == kind]


def test_keys_and_queries_of_equal_length_are_two_axes():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    drawing = draw(layer, torch.zeros(2, 5, 8))
    (softmax,) = steps(drawing, "softmax")
    names = [w.name for w in softmax.inputs[0].wires]
    assert len(set(names)) == len(names) == 4
    assert {"x", "y"} <= set(names)
    assert drawing.signature() == "b x m -> b x m"  # the residual connections give the axes back
    check = check_svg(drawing.svg())
    assert check.counts_agree
    assert not check.overlaps
    assert check.clear >= 0.98


def test_batch_norm_takes_the_batch_in_and_layer_norm_does_not():
    x = torch.zeros(2, 3, 4, 4)
    (norm,) = steps(draw(nn.Sequential(nn.BatchNorm2d(3)).train(), x), "norm")
    assert [w.name for w in norm.in_wires if w.axis in norm.core] == ["b", "h", "w"]
    assert not steps(draw(nn.Sequential(nn.BatchNorm2d(3)).eval(), x), "norm")
    (norm,) = steps(draw(nn.Sequential(nn.LayerNorm(4)), x), "norm")
    assert [w.name for w in norm.in_wires if w.axis in norm.core] == ["w"]


def test_square_weights_do_not_confuse_axes():
    drawing = draw(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.zeros(4, 4))
    assert drawing.signature() == "b m -> b n2"


def test_a_product_of_axes_gives_its_factors_back():
    class Net(nn.Module):
        def forward(self, x):
            return x.flatten(1, 2).unflatten(1, (3, 4)) + x

    assert draw(Net(), torch.zeros(2, 3, 4)).signature() == "b x m -> b x m"


@pytest.mark.parametrize(
    ("module", "shape"),
    [(BasicBlock(4, 8, 2), (2, 4, 8, 8)), (UNet(3, widths=(8, 16)), (2, 3, 8, 8)), (nn.Sequential(nn.GRUCell(3, 4)), (2, 3))],
    ids=["residual", "unet", "cell"],
)  # fmt: skip
def test_drawings_of_networks_are_sound(module, shape):
    drawing = draw(module.eval(), torch.zeros(shape))
    check = check_svg(drawing.svg())
    assert check.counts_agree
    assert not check.overlaps
    assert check.clear >= 0.98
    assert drawing.svg() == draw(module, torch.zeros(shape)).svg()
    assert drawing._repr_svg_() == drawing.svg()


def test_an_operation_without_a_sign_is_drawn_and_listed():
    class Net(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    drawing = draw(Net(), torch.zeros(2, 3))
    assert kinds(drawing) == ["cumsum"]
    assert drawing.unknown == ("cumsum",)


def test_bad_input_is_said():
    net, x = nn.Linear(3, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="'auto', 'full' or 'blocks', got 'all'"):
        draw(net, x, level="all")
    with pytest.raises(ValueError, match="for the 2 axes"):
        draw(net, x, names=["b c h"])
    with pytest.raises(ValueError, match="each of 1 inputs, got 2"):
        draw(net, x, names=["b m", "b m"])
    with pytest.raises(TorchfolioError, match="Linear cannot be traced"):
        draw(net, torch.zeros(2, 4))


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


@pytest.mark.parametrize(
    ("function", "shapes", "wanted"),
    [
        (lambda x: x.unbind(1)[0], [(2, 3, 4)], [[2, 4]]),
        (lambda x: x.unbind(2)[1], [(2, 3, 4)], [[2, 3]]),
        (torch.matmul, [(2, 3, 4, 5), (3, 5, 6)], [[2, 3, 4, 6]]),
        (torch.matmul, [(1, 4, 5), (3, 5, 6)], [[3, 4, 6]]),
        (lambda x: x.max(1)[0], [(2, 3, 4)], [[2, 4]]),
        (lambda x: x.topk(2, 1), [(2, 3, 4)], [[2, 2, 4], [2, 2, 4]]),
        (lambda x, y: x.pow(y), [(2, 3), (2, 3)], [[2, 3]]),
    ],
)
def test_what_comes_out_has_the_shape_that_torch_gives(function, shapes, wanted):
    """Axes of length one have no wire."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="drawn as plain boxes")
        drawing = draw(Of(function), [torch.rand(s) for s in shapes])
    got = [[int(w.size) for w in t.wires] for t in drawing.sheet.levels[-1]]
    assert got == wanted
    assert [[int(w.size) for w in t.wires] for t in drawing.sheet.levels[0]] == [
        [s for s in shape if s != 1] for shape in shapes
    ]


def test_operations_without_a_sign_are_named():
    with pytest.warns(UserWarning, match="topk"):
        draw(Of(lambda x: x.topk(2, 1)), torch.rand(2, 3))
