"""What is no network, no loss, no scheduler and no device is told in one sentence, by `fit` and `evaluate` alike."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import Backprop, evaluate, fit

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def network():
    return nn.Linear(4, 3)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(reduction="none"),
        partial(F.cross_entropy, reduction="sum"),
        partial(partial(F.nll_loss, reduction="none"), ignore_index=1),
        nn.MSELoss(reduction="sum"),
    ],
    ids=["sum", "none", "partial sum", "partial of a partial", "squared error"],
)
def test_a_loss_that_would_depend_on_the_size_of_batches(loss):
    with pytest.raises(ValueError, match=r"the mean over a batch, got one with reduction='(sum|none)'"):
        evaluate(network(), (X, Y), loss=loss)
    with pytest.raises(ValueError, match=r"the mean over a batch, got one with reduction='(sum|none)'"):
        fit(network(), (X, Y), rule=Backprop(loss), progress=False)


@pytest.mark.parametrize(("loss", "said"), [("mse", "'mse'"), (nn.MSELoss, r"such as MSELoss\(\)")])
def test_no_loss(loss, said):
    with pytest.raises(TypeError, match=f"expected a loss to call.*{said}"):
        evaluate(network(), (X, Y), loss=loss)
    with pytest.raises(TypeError, match=f"expected a loss to call.*{said}"):
        Backprop(loss)


@pytest.mark.parametrize(("model", "said"), [("net", "the text 'net'"), (nn.Linear, "the class Linear"), (3, "a int")])
def test_no_network(model, said):
    for call in (evaluate, fit):
        with pytest.raises(TypeError, match=f"expected a network.*{said}"):
            call(model, (X, Y))


def test_no_rule():
    with pytest.raises(TypeError, match=r"expected a learning rule such as Backprop\(\), got the class Backprop"):
        evaluate(network(), (X, Y), rule=Backprop)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "nope", torch.device("cuda")])
def test_a_device_that_is_not_there(device):
    for call in (evaluate, partial(fit, progress=False)):
        with pytest.raises(ValueError, match="device") as caught:
            call(network(), (X, Y), device=device)
        assert "auto, cpu" in str(caught.value)
        assert "Fabric" not in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_scheduler():
    with pytest.raises(TypeError, match="expected a factory of a learning-rate scheduler, got 'cos'"):
        fit(network(), (X, Y), scheduler="cos", progress=False)
    with pytest.raises(TypeError, match="expected the scheduler factory to return a scheduler, got NoneType"):
        fit(network(), (X, Y), scheduler=lambda optimizer: None, progress=False)
