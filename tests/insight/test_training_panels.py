"""Records of trainings and the panels that read them: limits, groups that were planted, what is said where nothing is seen."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data import Examples
from torchfolio.engine import fit
from torchfolio.insight.example_losses import example_losses
from torchfolio.insight.size_panel import size_panel
from torchfolio.insight.training_panels import group_panel, sharpness_panel
from torchfolio.insight.training_record import (
    TrainingRecord,
    TrainingRecorder,
    losses_of,
    sharpness_of,
    step_limits,
)


def record(losses, sharpness=(1.0, 2.0, 3.0), lr=(0.1, 0.1, 0.1), **changes):
    losses = np.asarray(losses, dtype=float)
    steps = tuple(range(len(losses)))
    settings = {"momentum": 0.0, "nesterov": False, "optimizer": "SGD", "followed": 64} | changes
    return TrainingRecord(steps, losses, tuple(float(k % 2) for k in range(losses.shape[1])), (0, 1, 2), sharpness, lr,
                          **settings)  # fmt: skip


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_limits_are_those_of_the_optimizer(momentum, nesterov):
    """On a quadratic just below the limit it converges, just above it diverges."""
    for share, converges in ((0.99, True), (1.01, False)):
        x = torch.ones(1, dtype=torch.float64, requires_grad=True)
        lr = 0.1
        optimizer = torch.optim.SGD([x], lr=lr, momentum=momentum, nesterov=nesterov)
        curvature = share * step_limits(lr, momentum, nesterov)[1]
        for _ in range(3000):
            optimizer.zero_grad()
            (0.5 * curvature * x.square()).sum().backward()
            optimizer.step()
        assert (abs(x.item()) < 1) == converges
    assert step_limits(0.0)[0] == float("inf")


def test_a_recorder_follows_a_training_and_leaves_it_as_it_was():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(0, 3, (60,))
    nets = [
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3)) for _ in "ab"
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    recorder = TrainingRecorder((x[:40], y[:40]), 12)
    before = F.cross_entropy(nets[0].eval()(x[:40]), y[:40], reduction="none").detach()
    for net, callbacks in zip(nets, (recorder.parts, ()), strict=True):
        fit(net, (x, y), epochs=4, batch_size=20, callbacks=callbacks)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    kept = recorder.record()
    assert kept.steps == tuple(range(13))
    assert np.allclose(kept.losses[0], before, atol=1e-6)
    assert len(kept.measured) == len(kept.sharpness) >= 4
    again = TrainingRecord.from_text(kept.to_text())
    assert np.allclose(again.losses, kept.losses, rtol=1e-5)
    assert again.sharpness == kept.sharpness


def test_sharpness_of_batch_norm_is_that_of_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = 10 * torch.randn(32, 4, dtype=torch.float64), torch.randint(0, 3, (32,))
    parameters = dict(net.named_parameters())

    def loss(flat):
        parts = flat.split([p.numel() for p in parameters.values()])
        given = {n: q.view_as(p) for (n, p), q in zip(parameters.items(), parts, strict=True)}
        buffers = {n: b.clone() for n, b in net.named_buffers()}
        return F.cross_entropy(torch.func.functional_call(net.train(), {**given, **buffers}, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    wanted = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1]
    value, _ = sharpness_of(net.eval(), x, y)
    assert value == pytest.approx(float(wanted), rel=0.02)
    assert not any(m.training for m in net.modules())


def test_losses_of_numbers_and_of_labels():
    z, t = torch.randn(5, 2), torch.randn(5, 2)
    assert torch.allclose(losses_of(z, t), (z - t).square().mean(1))
    assert torch.allclose(losses_of(z[:, :1], t[:, 0]), (z[:, 0] - t[:, 0]).square())
    assert torch.allclose(losses_of(z[:, 0], t[:, 0]), (z[:, 0] - t[:, 0]).square())
    with pytest.raises(ValueError, match="labels"):
        losses_of(z[:, 0], torch.zeros(5, dtype=torch.long))


def test_a_network_without_a_second_derivative_has_no_sharpness():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sign()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return g

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x):
            return Once.apply(self.a(x))

    value, vector = sharpness_of(Net(), torch.randn(8, 3), torch.randint(0, 2, (8,)))
    assert value != value
    assert vector is None


@pytest.mark.parametrize("change", [{"losses": [[1, 2]]}, {"steps": [1, 0, 2]}, {"momentum": "x"}, {"more": 1},
                                    {"lr": [0.1]}, {"followed": -1}, {"losses": [["a"]]}, {"sharpness": 5}])  # fmt: skip
def test_a_record_of_a_stranger_is_not_believed(change):
    body = json.loads(record(np.ones((3, 4))).to_text())
    with pytest.raises(ValueError, match="cannot be read"):
        TrainingRecord.from_text(json.dumps(body | change))


def test_groups_that_oppose_each_other_are_told_from_those_that_do_not():
    rng = np.random.default_rng(0)
    losses = 2 - 0.02 * np.arange(30)[:, None] + 1e-3 * rng.standard_normal((30, 100))
    swing = np.where(np.arange(30) % 2, 1.0, -1.0) * np.exp(0.2 * np.arange(30)) / 100
    losses[:, :5] += swing[:, None]
    losses[:, 5:10] -= swing[:, None]
    losses[25:] += 0.5
    panel = group_panel(record(losses), ("dog", "cat"))
    assert panel.record["step"] == 24
    assert "rose most, by" in panel.sentences[0]
    assert "go against each other" in panel.sentences[1]
    assert set(panel.record["positive"]) | set(panel.record["negative"]) >= set(range(10))
    calm = 2 - 0.02 * np.arange(30)[:, None] - 0.001 * np.arange(30)[:, None] * rng.random((1, 100))
    said = " ".join(group_panel(record(calm)).sentences)
    assert "No instability was seen" in said
    assert "no opposing signals" in said
    with pytest.raises(ValueError, match="not shown"):
        group_panel(record(np.ones((2, 40))))


def test_what_the_sharpness_says_depends_on_the_optimizer():
    losses = np.ones((3, 40))
    edge = sharpness_panel(record(losses, (5.0, 12.0, 19.5)), {})
    assert "at the edge of stability" in edge.sentences[0]
    assert "small enough" in sharpness_panel(record(losses, (1.0, 2.0, 3.0)), {}).sentences[0]
    adam = sharpness_panel(record(losses, optimizer="AdamW"), {})
    assert "no limit" in adam.sentences[0]
    assert "2 / lr" not in adam.tables[0].columns
    with pytest.raises(ValueError, match="--record"):
        sharpness_panel(None, {})
    assert "cannot be told" in sharpness_panel(None, {"lr": 0.1, "optimizer": "sgd"}, 3.0).notes[0]


def test_outliers_of_the_loss():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x = torch.randn(200, 4)
    y = net(x).argmax(1)
    y[17] = (y[17] + 1) % 3
    x[17] *= 50
    panel = example_losses(net, Examples((x, y)), ("a", "b", "c"))
    assert panel.record["worst"][0] == 17
    assert "a few outliers set the mean" in panel.sentences[0]
    assert panel.record["wrong"] == pytest.approx(1 / 200)
    blind = nn.Sequential(nn.Linear(4, 3))
    nn.init.zeros_(blind[0].weight)
    assert "most frequent label" in example_losses(blind, Examples((x, y))).notes[0]
    with pytest.raises(ValueError, match="not finite"):
        example_losses(net, Examples((x * torch.inf, y)))


def test_size_against_what_is_to_be_fitted():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x = torch.randn(60, 4)
    y = net(x).argmax(1)
    panel = size_panel(net, (x[:30], y[:30]), (x[30:], y[30:]), 30)
    assert panel.record["ratio"] == pytest.approx(15 / 90)
    assert panel.record["fitted"]
    assert "may sit at the peak" in panel.sentences[1]
    wide = nn.Sequential(net, nn.Linear(3, 1000), nn.Linear(1000, 3))
    answers = wide(x).argmax(1)
    assert "to the right" in size_panel(wide, (x, answers), (x, answers), 60).sentences[1]
    wrong = size_panel(net, (x[:30], (y[:30] + 1) % 3), (x[30:], y[30:]), None)
    assert "does not fit" in wrong.sentences[1]
    assert "not recorded" in wrong.sentences[0]
    numbers = size_panel(nn.Linear(4, 1), (x, torch.randn(60, 1)), (x, torch.randn(60, 1)), 60)
    assert "accuracy" not in numbers.tables[0]
