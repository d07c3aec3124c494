"""Gradients that refuse to be differentiated again."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchfolio.engine.first_order import first_order, once


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @first_order("the gradient of a cube")
    def backward(ctx, saved, gradient):
        assert not torch.is_grad_enabled()
        return gradient * 3 * saved[0] ** 2


def test_the_first_derivative_is_the_function_s():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    Cube.apply(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([3.0, 12.0]))
    (grad,) = torch.autograd.grad(
        checkpoint(lambda v: Cube.apply(v).sum(), x, use_reentrant=False), x, create_graph=True
    )
    torch.testing.assert_close(grad.detach(), torch.tensor([3.0, 12.0]))


@pytest.mark.parametrize("way", ["backward", "grad", "partial", "in the incoming gradient"])
def test_a_second_derivative_is_refused(way):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    loss = scale * Cube.apply(x).sum() + (x**4).sum() * (way == "partial")
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    inputs = scale if "incoming" in way else x
    again = grad.sum().backward if way == "backward" else lambda: torch.autograd.grad(grad.sum(), inputs)
    with pytest.raises(RuntimeError, match="the gradient of a cube cannot be differentiated again"):
        again()


def test_nothing_is_linked_to_constants():
    assert not once(torch.ones(2), torch.zeros(2)).requires_grad
