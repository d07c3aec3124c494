"""Validation data that do not fit are refused before the first step, whatever form they come in."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchfolio.engine import Backprop, fit

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3


class Pairs(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        return self.x[k], self.y[k]


FORMS = {
    "tensors": lambda x, y: (x, y),
    "data set": Pairs,
    "loader": lambda x, y: DataLoader(Pairs(x, y), batch_size=5),
    "batches": lambda x, y: [(x[:5], y[:5]), (x[5:], y[5:])],
}
BAD = {
    "labels too large": (X, Y + 5, "val.*0 to 2.*5 to 7"),
    "labels below zero": (X, Y - 3, "val.*0 to 2.*-3 to -1"),
    "width": (torch.randn(24, 7), Y, r"val.*\(8, 7\)|val.*\(\d, 7\)"),
    "shape of labels": (X, Y[:, None], "val.*shape"),
    "type of labels": (X, Y.int(), "val.*int64"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("x", "y", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_is_told_before_the_first_step(x, y, message, form, tmp_path):
    seen = []
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=message):
        fit(net, (X, Y), val=form(x, y), device="cpu", callbacks=[seen.append], checkpoint=tmp_path / "c")
    assert not seen
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_looking_at_validation_data_changes_nothing(form):
    results = []
    for val in (form(X, Y), None):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
        fit(net, (X, Y), val=val, epochs=2, batch_size=7, device="cpu")
        results.append(net.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_what_may_differ_is_taken():
    net = nn.Sequential(nn.Conv1d(1, 3, 3), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    ignored = torch.where(torch.arange(24) < 8, -100, Y)
    fit(net, (X[:, None], Y), val=(torch.randn(24, 1, 9), ignored), device="cpu")
    fit(nn.Linear(4, 1), (X, X[:, :1]), val=(X, X[:, :1]), device="cpu")
    fit(nn.Linear(4, 1), (X, X[:, :1]), val=(X, Y - 9), evaluate=lambda model, val: {"a": 1}, device="cpu")
    fit(nn.Linear(4, 9), (X, Y), val=(X, Y + 5), device="cpu", rule=Backprop())


def test_regression_targets_of_another_width_are_refused():
    with pytest.raises(ValueError, match="val"):
        fit(nn.Linear(4, 1), (X, X[:, :1]), val=TensorDataset(X, X[:, :2]), device="cpu")
