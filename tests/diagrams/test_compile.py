"""Drawings that become modules again: the same numbers, other lengths, the same weights."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.insight.test_circuit_diagrams import Of
from torchfolio.diagrams import draw
from torchfolio.errors import TorchfolioError
from torchfolio.models import MLP, BasicBlock, UNet, ViT


class Causal(nn.Module):
    """Attention of words to those before them, with learned places."""

    def __init__(self):
        super().__init__()
        self.inner, self.place = nn.Linear(8, 24), nn.Embedding(10, 8)

    def forward(self, x):
        x = x + self.place(torch.arange(x.shape[1], device=x.device))
        q, k, v = (t.view(*t.shape[:2], 2, 4).transpose(1, 2) for t in self.inner(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)


class Masked(nn.Module):
    """A mask that is made of the length."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        n = x.shape[1]
        seen = torch.tril(torch.ones(n, n, dtype=torch.bool, device=x.device))
        return (self.layer(x) @ x.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1) @ x


class InPlace(nn.Module):
    """Tensors that are written into, by themselves and by way of a view."""

    def forward(self, x):
        y = x * 2
        y.relu_()
        z = y + x
        z[:, 0] = 1.0
        return z + y


class Shuffle(nn.Module):
    """Space that becomes channels: axes that are cut in two."""

    def forward(self, x):
        b, c, h, w = x.shape
        cut = x.view(b, c, h // 2, 2, w // 2, 2)
        return cut.permute(0, 1, 3, 5, 2, 4).reshape(b, c * 4, h // 2, w // 2)


def encoder():
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def convolutions():
    down = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.MaxPool2d(2))
    return nn.Sequential(
        down, nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, groups=2, dilation=2), nn.ConvTranspose2d(4, 2, 2, 2)
    )


def rand(*shapes):
    return tuple(torch.rand(s, generator=torch.Generator().manual_seed(i)) + 0.1 for i, s in enumerate(shapes))


CASES = {
    "mlp": (lambda: MLP(6, 3, (5,)), rand((4, 6)), rand((7, 6)), False),
    "encoder, eval": (lambda: encoder().eval(), rand((2, 5, 16)), rand((3, 7, 16)), False),
    "encoder, train": (lambda: encoder().train(), rand((2, 5, 16)), rand((3, 7, 16)), False),
    "causal": (Causal, rand((2, 5, 8)), rand((3, 7, 8)), True),
    "mask": (Masked, rand((2, 5, 8)), rand((3, 7, 8)), True),
    "in place": (InPlace, rand((2, 5)), rand((3, 4)), False),
    "shuffle": (Shuffle, rand((2, 3, 4, 6)), rand((3, 3, 8, 2)), False),
    "cell": (lambda: nn.GRUCell(3, 4), rand((2, 3), (2, 4)), rand((5, 3), (5, 4)), False),
    "lstm": (lambda: nn.LSTM(3, 4, batch_first=True), rand((2, 5, 3)), rand((3, 6, 3)), True),
    "residual": (lambda: BasicBlock(4, 8, 2).eval(), rand((2, 4, 8, 8)), rand((3, 4, 12, 6)), False),
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(True)).train(), rand((4, 3, 2, 2)), rand((5, 3, 4, 4)), False),
    "u-net": (lambda: UNet(1, widths=(4, 8)).eval(), rand((2, 1, 8, 8)), rand((3, 1, 16, 12)), False),
    "vit": (lambda: ViT(8, 4, 10, 1, dim=16, depth=1, heads=2).eval(), rand((2, 1, 8, 8)), rand((5, 1, 8, 8)), True),
    "convolutions": (convolutions, rand((2, 3, 8, 8)), rand((3, 3, 12, 16)), True),
    "arithmetic": (lambda: Of(lambda x, y: (1 - x) / y + torch.maximum(x, y) - x.sum(1, keepdim=True)), rand((3, 4), (3, 4)), rand((2, 5), (2, 5)), False),
    "symmetric": (lambda: Of(lambda x: (x + x.T) @ x), rand((4, 4)), rand((4, 4)), False),
    "two results": (lambda: Of(lambda x: x.topk(2, 1)), rand((3, 4)), rand((2, 6)), False),
    "cast": (lambda: Of(lambda x: x.to(torch.float64).cumsum(1)), rand((3, 4)), rand((2, 6)), False),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
@pytest.mark.parametrize("name", CASES)
def test_a_module_comes_back_and_runs_for_other_lengths(name):
    make, example, other, dynamic = CASES[name]
    net = make()
    module = draw(net, example, level="full", dynamic=dynamic).to_module()
    for inputs in (example, other):
        wanted, got = (torch.utils._pytree.tree_leaves(f(*inputs)) for f in (net, module))
        assert len(wanted) == len(got)
        for a, b in zip(wanted, got, strict=True):
            torch.testing.assert_close(b, a)
    assert set(module.state_dict()) <= set(net.state_dict())


def test_the_module_has_the_weights_of_the_drawn_one():
    net = MLP(6, 3, (5,))
    (x,) = rand((4, 6))
    drawing = draw(net, x)
    module = drawing.to_module()
    assert {n: id(p) for n, p in module.named_parameters()} == {n: id(p) for n, p in net.named_parameters()}
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    torch.testing.assert_close(module(x), net(x))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), net(x))
    torch.testing.assert_close(torch.compile(module, backend="eager", fullgraph=True)(x), net(x))
    assert module.double()(x.double()).dtype == torch.float64


def test_source_runs_by_itself():
    net = encoder().eval()
    (x,) = rand((2, 5, 16))
    source = draw(net, x).to_source("layer")
    space: dict = {}
    exec(source, space)
    torch.testing.assert_close(space["layer"](x, weights=net.state_dict()), net(x))
    assert '"""b x m -> b x m"""' in source
    assert "torch.einsum(" in source
    assert "b, x, m = src.shape" in source


class Conditional(nn.Module):
    """A branch that depends on values, as torch.export can trace it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.layer(x), lambda x: x - 1, (x,))


@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
def test_branches_are_run_but_not_written():
    net, (x,) = Conditional(), rand((2, 3))
    drawing = draw(net, x)
    for sign in (1, -1):
        torch.testing.assert_close(drawing.to_module()(sign * x), net(sign * x))
    with pytest.raises(TorchfolioError, match="only functions of torch can be written out, got true_graph_0, false"):
        drawing.to_source()


def test_running_statistics_move_as_they_do():
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    other = copy.deepcopy(net)
    (x,) = rand((4, 3))
    draw(other, x).to_module()(x)
    net(x)
    for a, b in zip(net.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_written_depends_on_the_weave():
    drawing = draw(encoder().eval(), rand((2, 5, 16)))
    for step in drawing.graph.steps:
        step.weave = set()
    with pytest.raises(TorchfolioError, match="weave is missing"):
        drawing.to_module()


def test_axes_that_are_to_vary():
    (x,) = rand((2, 5, 8))
    with pytest.raises(ValueError, match="no input has the axis 'y'"):
        draw(Masked(), x, dynamic=["y"])
    with pytest.raises(TorchfolioError, match="fixes the length of the axis m"):
        draw(Masked(), x, dynamic=["m"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = draw(Masked(), x, names=["batch word model"], dynamic=["word"]).to_module()
    (y,) = rand((2, 3, 8))
    assert module(y).shape == y.shape
