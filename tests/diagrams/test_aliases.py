"""One tensor in several places: given twice, returned twice, changed in place beside its views."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchfolio.diagrams import draw
from torchfolio.errors import TorchfolioError


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.arange(6.0).view(2, 3))

    def forward(self, a):
        return a * self.w


def agrees(module, args, others):
    """That the diagram of a module on some inputs computes what the module does on others."""
    drawing = draw(module, args)
    assert len(drawing.graph.inputs) == len(others)
    wanted, got = module(*(o.clone() for o in others)), drawing.to_module()(*(o.clone() for o in others))
    torch.testing.assert_close(got, wanted)
    return drawing


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_attention_of_one_tensor_as_key_and_value_has_three_inputs():
    net = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x, y = rand(2, 3, 8), rand(2, 5, 8, seed=1)
    drawing = agrees(net, (x, y, y), (x, y, rand(2, 5, 8, seed=2)))
    assert drawing.equals(draw(net, (x, y, y.clone())))
    assert drawing.signature().split(" -> ")[0].count(",") == 2
    agrees(net, (x, x, x), (x, rand(2, 3, 8, seed=1), rand(2, 3, 8, seed=2)))


@pytest.mark.parametrize("function", [lambda a, b: a - b, lambda a, b: a @ b.T, lambda a, b: a.relu() + 2 * b])
def test_one_tensor_given_twice_is_two_inputs(function):
    z = rand(2, 3)
    agrees(Of(function), (z, z), (z, rand(2, 3, seed=1)))
    agrees(Of(function), (z, z.view(2, 3)), (z, rand(2, 3, seed=1)))


def test_a_weight_that_is_given_is_an_input():
    net = Weighted()
    agrees(net, (net.w,), (rand(2, 3),))


@pytest.mark.parametrize(
    "function",
    [lambda a: (a.relu(),) * 2, lambda a: (a, a.relu(), a), lambda a: (a.relu(), a.sum(-1), a.relu())],
)
def test_what_is_returned_twice_comes_out_twice(function):
    drawing = agrees(Of(function), (rand(2, 3),), (rand(2, 3, seed=1),))
    assert drawing.signature().split(" -> ")[1].count(",") == len(function(rand(2, 3))) - 1


def shifted(a):
    b = a + 1
    flat = b.view(-1)
    b.mul_(3)
    return flat, b


def turned(a):
    b = a + 1
    kept, turned = b.detach(), b.t()
    torch.relu_(b)
    b.add_(1)
    return turned, kept


def named_twice(a):
    b = c = a + 1
    b.mul_(3)
    return c, b


def through_a_view(a):
    b = a + 1
    b[:, 0].mul_(5)
    return b


def through_a_part(a):
    left, right = (a + 1).split([1, 2], 1)
    left.mul_(7)
    return left, right


def through_its_input(a):
    b = a.view(-1)
    a.add_(1)
    return b * 2


def beside_a_copy(a):
    b = a.clone()
    b.mul_(2)
    return a + b


def of_its_copy(a):
    b = a * 3
    c = b.clone()
    b.add_(1)
    return b * c


CHANGED = [shifted, turned, named_twice, through_a_view, through_a_part, through_its_input, beside_a_copy, of_its_copy]


@pytest.mark.parametrize("function", CHANGED)
def test_a_change_in_place_is_seen_by_every_view(function):
    agrees(Of(function), (rand(2, 3),), (rand(2, 3, seed=1),))


def test_the_signature_has_the_code_s_order():
    assert draw(Of(lambda a: (a.relu(), a.sum(-1))), rand(2, 3)).signature() == "b m -> b m, b"
    assert draw(Of(lambda a: (a.sum(-1), a.relu())), rand(2, 3)).signature() == "b m -> b, b m"
    net = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 7)])
    drawing = draw(Of(lambda a: (net[1](a), a, net[0](a), a.sum(-1))), rand(2, 3))
    sizes = {t.key: tuple(int(w.size) for w in t.wires) for t in drawing.sheet.outputs}
    assert [sizes[t.key] for t in drawing.sheet.outputs] == [(2, 7), (2, 3), (2, 5), (2,)]
    assert draw(Of(lambda a, b: b.sum(-1) + a), (rand(2), rand(2, 3))).signature() == "b, b m -> b"


@pytest.mark.parametrize("given", [[[torch.zeros(2, 3)] * 2], [{"a": torch.zeros(2, 3)}], [3], "x"])
def test_inputs_that_are_no_tensors_are_refused(given):
    with pytest.raises(TypeError, match=r"expected tensors as inputs, got (list|dict|int|str) as input 0"):
        draw(nn.ReLU(), given)


def test_outputs_that_no_input_leads_to_are_told():
    """Left out in silence, the diagram would be that of another module."""
    net = Weighted()
    for function in (
        lambda a: (a.sum(-1), torch.ones(3)),
        lambda a: (a.sum(-1), net.w),
        lambda a: (net.w * 2, a.sum(-1)),
    ):
        module = Of(function)
        module.net = net
        with pytest.warns(UserWarning, match=r"left out of the drawing, as no input leads to it: output [01]$"):
            assert draw(module, rand(2, 3)).signature() == "b m -> b"
    with pytest.raises(TorchfolioError, match="returns a tensor made of its inputs, got none"):
        draw(Of(lambda a: torch.ones(3)), rand(2, 3))


@pytest.mark.parametrize("other", [nn.Dropout().eval(), nn.Identity(), torch.clone, torch.Tensor.contiguous])
def test_a_tensor_by_two_other_names_is_used_twice(other):
    drawing = agrees(Of(lambda a: (other(a) @ other(a).mT).softmax(-1)), (rand(2, 3, 4),), (rand(2, 3, 4, seed=1),))
    (scores,) = drawing.sheet.outputs
    assert len({w.axis for w in scores.wires}) == 3  # queries and keys have axes of their own
