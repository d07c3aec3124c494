"""Targets that the loss ignores count nowhere, and weights of classes count the same at every size of a batch."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.engine import Backprop, evaluate, fit
from torchfolio.local import AugLocal
from torchfolio.local.heads import PredSimHead

LABELS = torch.tensor([0, 1, 0, 1, -100, -100, -100, 1])
WEIGHT = torch.tensor([1.0, 5.0, 0.5])
LOSSES = [
    None,
    F.cross_entropy,
    nn.CrossEntropyLoss(weight=WEIGHT),
    nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1),
    partial(F.cross_entropy, weight=WEIGHT),
    nn.CrossEntropyLoss(ignore_index=1),
    lambda output, target: F.cross_entropy(output, target, label_smoothing=0.1),
]


def network(width=5):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def inputs(n=8, width=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("wrap", [tuple, lambda d: TensorDataset(*d), lambda d: DataLoader(TensorDataset(*d), 2)])
def test_scores_are_those_of_one_batch(loss, wrap):
    net, x = network(), inputs()
    y = LABELS.clamp_min(0) if getattr(loss, "ignore_index", -100) == 1 else LABELS
    ignored = 1 if y is not LABELS else -100
    with torch.no_grad():
        expected = float((loss or F.cross_entropy)(net(x), y))
        hits = net(x).argmax(1)[y != ignored] == y[y != ignored]
    for size in (1, 2, 3, 4, 8):
        scores = evaluate(net, wrap((x, y)), loss=loss, batch_size=size)
        assert scores["loss"] == pytest.approx(expected, rel=1e-5)
        assert scores["accuracy"] == pytest.approx(float(hits.float().mean()))


def test_every_target_ignored_is_told():
    with pytest.raises(ValueError, match="counts"):
        evaluate(network(), (inputs(), torch.full((8,), -100)))
    with pytest.raises(ValueError, match="every label of the 8 examples is one that the loss ignores"):
        fit(network(), (inputs(), torch.full((8,), -100)), progress=False)
    loader = DataLoader(TensorDataset(inputs(), torch.full((8,), -100)), 4)
    with pytest.raises(ValueError, match="no batch of the epoch holds a target"):
        fit(network(), loader, max_steps=3, progress=False)


def step(net, data, loss, accumulate, batch_size, rule=None):
    net = copy.deepcopy(net)
    sgd = partial(torch.optim.SGD, lr=0.5)
    fit(net, data, rule=rule or Backprop(loss), optimizer=sgd, epochs=1, accumulate=accumulate, batch_size=batch_size,
        progress=False)  # fmt: skip
    return net.state_dict()


@pytest.mark.parametrize("loss", [*LOSSES[:5], LOSSES[6]])
@pytest.mark.parametrize("loader", [False, True])
def test_accumulated_batches_step_like_one(loss, loader):
    data = inputs(), LABELS
    whole = step(network(), data, loss, 1, 8)
    for size in (1, 2, 3):
        given = DataLoader(TensorDataset(*data), size) if loader else data
        parts = step(network(), given, loss, 8, size)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


def test_accumulated_batches_of_local_losses_step_like_one():
    data = inputs(), LABELS
    rule = partial(AugLocal, 0, head_norm=False)
    whole, parts = (step(network(), data, None, k, 8 // k, rule()) for k in (1, 4))
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loader", [False, True])
def test_a_batch_of_ignored_targets_alone_is_passed_over(loader):
    x, y = inputs(), torch.tensor([0, 1, -100, -100, 2, 1, -100, -100])
    rows = torch.tensor([0, 1, 4, 5])
    given = DataLoader(TensorDataset(x, y), 2) if loader else (x, y)
    if loader:
        after = step(network(), given, None, 1, 2)
        kept = step(network(), DataLoader(TensorDataset(x[rows], y[rows]), 2), None, 1, 2)
        for name, value in kept.items():
            torch.testing.assert_close(after[name], value)
    else:
        assert all(v.isfinite().all() for v in step(network(), given, None, 1, 1).values())


def test_positions_of_dense_targets_count():
    net = nn.Conv1d(2, 3, 1)
    x, y = torch.randn(6, 2, 4), torch.randint(3, (6, 4))
    y[:3, 1:] = -100
    expected = float(F.cross_entropy(net(x), y).detach())
    assert evaluate(net, (x, y), batch_size=4)["loss"] == pytest.approx(expected, rel=1e-5)


def test_similarity_of_predsim_is_among_those_that_have_a_label():
    head = PredSimHead((4,), 3)
    h, y = inputs(8, 4), LABELS
    whole, counted = head.loss(h, h, y), head.loss(h[y >= 0], h, y[y >= 0])
    torch.testing.assert_close(whole, counted)


def test_numbers_that_are_no_labels_count_all():
    """-100 is a target like any other for a loss of torch's that knows no labels."""
    x, y = inputs(8, 1), LABELS[:, None]
    expected = float(F.l1_loss(x, y))
    for loss in (nn.L1Loss(), F.l1_loss, partial(F.l1_loss)):
        assert evaluate(nn.Identity(), (x, y), loss=loss, batch_size=3)["loss"] == pytest.approx(expected)


def test_labels_that_do_not_fit_are_told():
    pixels = torch.randn(6, 1, 4, 4)
    net = nn.Conv2d(1, 3, 1)
    for y, message in ((torch.full((6, 4, 4), 255), "from 0 to 2, the model's 3 outputs, got 255 to 255"),
                       (torch.zeros(6, 2, 2).long(), r"of shape \[N, 4, 4\] for outputs \[N, 3, 4, 4\]")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            fit(net, (pixels, y), progress=False)
        with pytest.raises(ValueError, match=message):
            evaluate(net, (pixels, y))
    with pytest.raises(TypeError, match="int64"):
        evaluate(network(), (inputs(), LABELS.int()))
    with pytest.raises(ValueError, match="got 0 to 7"):
        evaluate(network(), DataLoader(TensorDataset(inputs(), torch.arange(8)), 8))


def test_outputs_of_nan_name_no_class():
    scores = evaluate(nn.Identity(), DataLoader(TensorDataset(torch.full((4, 3), float("nan")), torch.zeros(4).long())))
    assert scores["accuracy"] == 0


def test_cross_entropy_of_one_output_is_refused():
    with pytest.raises(ValueError, match="cross-entropy of a single output is 0"):
        fit(nn.Linear(5, 1), (inputs(), torch.randn(8, 1)), rule=Backprop(F.cross_entropy), progress=False)
