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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"callbacks": print}, "callbacks to be a list"),
        ({"callbacks": ["x"]}, "callbacks to be callables"),
        ({"early_stopping": "x"}, "early_stopping to be a number of epochs"),
        ({"early_stopping": True}, "early_stopping to be a number of epochs"),
        ({"augment": "x"}, "augment to be a function, got the text 'x'"),
        ({"evaluate": 3}, "evaluate to be a function"),
        ({"seed": "x"}, "seed to be a whole number"),
        ({"seed": 1.5}, "seed to be a whole number"),
    ],
)
def test_arguments_of_another_kind(arguments, said):
    with pytest.raises(TypeError, match=f"expected {said}"):
        fit(network(), (X, Y), val=(X, Y), progress=False, **arguments)


def test_rows_without_a_target_or_with_too_much():
    """Data sets of x alone, and of three values for a network of one input, gave errors of torch's modules."""

    class Rows(torch.utils.data.Dataset):
        def __init__(self, *parts):
            self.parts = parts

        def __len__(self):
            return len(X)

        def __getitem__(self, k):
            row = tuple(part[k] for part in self.parts)
            return row if len(row) > 1 else row[0]

    for call in (evaluate, fit):
        with pytest.raises(ValueError, match=r"expected (data|train) to hold inputs and targets, got 1 tensor"):
            call(network(), Rows(X))
        with pytest.raises(ValueError, match=r"the model cannot take .*takes 2 positional arguments but 3 were given"):
            call(network(), Rows(X, Y, Y))
    with pytest.raises(ValueError, match="expected val to hold inputs and targets, got 1 tensor"):
        fit(network(), (X, Y), val=Rows(X), progress=False)
