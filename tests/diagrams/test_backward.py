"""Backward passes as diagrams: the gradients of autograd, from rules alone."""

from __future__ import annotations

import copy

import pytest
import sympy
import torch
from torch import nn

from tests.diagrams.test_compile import CASES, Of, rand
from torchfolio.diagrams import check_svg, draw
from torchfolio.errors import TorchfolioError

MORE = {
    **CASES,
    "conv, transposed": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, 1, groups=2), rand((2, 4, 5)), rand((3, 4, 7)), False),
    "conv, dilated": (lambda: nn.Conv2d(4, 6, 3, (2, 1), 2, (1, 2), groups=2), rand((2, 4, 8, 9)), rand((3, 4, 7, 8)), False),
    "concat": (lambda: Of(lambda x, y: torch.cat([x, y.exp(), x], 1).tanh()), rand((2, 3, 4), (2, 5, 4)), rand((3, 2, 4), (3, 1, 4)), False),
    "reductions": (lambda: Of(lambda x: x.mean((1, 2)) + x.sum(1).amax(1)), rand((2, 3, 4)), rand((3, 2, 5)), False),
    "broadcast": (lambda: Of(lambda x, y: (x.unsqueeze(1) * y).sum(2) - y.mean(2)), rand((2, 4), (2, 3, 4)), rand((1, 4), (1, 5, 4)), False),
}  # fmt: skip


class Residual(nn.Module):
    """A linear map of an axis to itself beside the axis."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.map(x)


MORE["residual map"] = (Residual, rand((2, 4)), rand((3, 4)), False)


def leaves(found):
    return [t for t in torch.utils._pytree.tree_leaves(found) if t is not None]


@pytest.mark.filterwarnings("ignore:drawn as plain boxes")
@pytest.mark.parametrize("name", [n for n in MORE if n not in ("lstm", "cell")])
def test_gradients_are_those_of_autograd(name):
    make, example, other, dynamic = MORE[name]
    net = make().double()
    example, other = ([t.double() for t in inputs] for inputs in (example, other))
    backward = draw(net, example, level="full", dynamic=dynamic).backward()
    for inputs in (example, other):
        given = [x.clone().requires_grad_() for x in inputs]
        outputs = leaves(net(*[x.clone() for x in given]))
        cotangents = [torch.randn_like(o) if o.is_floating_point() else torch.zeros_like(o) for o in outputs]
        pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.is_floating_point()]
        weights = dict(net.named_parameters())
        wanted = torch.autograd.grad(
            [o for o, _ in pairs], [*given, *weights.values()], [c for _, c in pairs], allow_unused=True
        )
        found, by_name = backward.gradients(list(inputs), cotangents)
        for a, b in zip([*found, *(by_name.get(n) for n in weights)], wanted, strict=True):
            zero = torch.zeros(())
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["mlp", "encoder, eval", "residual map", "concat", "conv, dilated"])
def test_backward_passes_are_drawn(name):
    make, example, _, dynamic = MORE[name]
    backward = draw(make().eval(), example, level="full", dynamic=dynamic).backward()
    check = check_svg(backward.svg())
    assert check.counts_agree
    assert not check.overlaps
    assert check.clear >= 0.98
    assert "′" not in {s.kind for s in backward.graph.steps if s.kind in ("linear", "conv", "concat", "softmax")}


def test_an_elementwise_map_stays_diagonal():
    (x,) = rand((3, 4))
    drawing = draw(nn.Tanh(), x)
    forward, backward = (sum(d.cost().operations) for d in (drawing, drawing.backward()))
    assert sympy.expand(forward - backward) == 0


def test_a_convolution_costs_as_much_each_way():
    (x,) = rand((2, 3, 8, 8))
    drawing = draw(nn.Conv2d(3, 5, 3, 2), x)
    costs = drawing.backward().cost()
    flops = [costs._value(f, {}) for f in costs.flops if f != 0]
    assert flops == [drawing.cost().total()] * 2


def test_random_operations_have_none():
    with pytest.raises(TorchfolioError, match=r"dropout 0\.5 is random"):
        draw(nn.Dropout(0.5).train(), torch.zeros(2, 3)).backward()
    backward = draw(nn.Linear(3, 2), torch.zeros(2, 3)).backward()
    with pytest.raises(ValueError, match="expected 1 inputs, got 0"):
        backward.gradients([], [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="expected 1 cotangents, got 2"):
        backward.gradients([torch.zeros(2, 3)], [torch.zeros(2, 2)] * 2)
    assert backward.signature() == copy.deepcopy(backward).signature()
