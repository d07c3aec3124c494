"""A network that answers by its learning rule, over time, is judged by those answers in every command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from torchfolio.backdoor import BaDExpert
from torchfolio.cli import app
from torchfolio.efficiency.bit_conversion import convert
from torchfolio.engine import blocks
from torchfolio.models.stateful import state_modules
from torchfolio.spiking import LIF, Unrolled

runner = CliRunner()


def call(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def spiking(tmp_path_factory) -> Path:
    """A spiking network of digits."""
    folder = tmp_path_factory.mktemp("spiking")
    model = ("--model", "torchfolio.spiking.nets:SpikingConvNet", "--rule", "sltt", "--rule-set", "timesteps=3")
    done = call("train", *model, "--data", "digits", "--epochs", 1, "--train-size", 400, "-o", folder / "net")
    assert done.exit_code == 0, done.output
    return folder


def test_the_audited_network_answers_over_time(spiking, monkeypatch):
    def fit(detector, model, clean):
        assert isinstance(model, Unrolled)
        raise ValueError("that is enough")

    monkeypatch.setattr(BaDExpert, "fit", fit)
    done = call("audit", spiking / "net", "--data", "digits", "--size", 50, "-o", spiking / "filter")
    assert "that is enough" in done.stderr


def test_what_trains_plain_outputs_does_not_adapt_it(spiking):
    for method in ("sara", "bt2", "naive_bayes_probe"):
        done = call("adapt", spiking / "net", "--method", method, "--data", "digits", "-o", spiking / "adapted")
        assert done.exit_code == 2
        assert f"answers by its learning rule, sltt, and {method} adapts networks that answer by" in done.stderr


def test_it_is_made_smaller_by_its_own_rule(spiking, monkeypatch):
    from torchfolio.efficiency import compression
    from torchfolio.spiking import SLTT

    rules = []
    fine_tune = compression.compress
    monkeypatch.setattr(compression, "compress", lambda *a, **k: (rules.append(k["rule"]), fine_tune(*a, **k))[1])
    shared = ("--data", "digits", "--epochs", 1, "--train-size", 200, "--json")
    done = call("compress", spiking / "net", "--method", "biper", "-o", spiking / "small", *shared)
    assert done.exit_code == 0, done.output
    assert isinstance(rules[0], SLTT)
    again = json.loads(call("eval", spiking / "small", "--data", "digits", "--json").stdout)["accuracy"]
    assert f"{again}" in done.stdout
    kept = json.loads((spiking / "small" / "bundle.json").read_text())["training"]
    assert kept["compressed"]["rule"] == kept["rule"] == "sltt"
    done = call("compress", spiking / "net", "--method", "double_rounding", "-o", spiking / "rounded", *shared)
    assert done.exit_code == 2
    assert "trains by a rule of its own" in done.stderr


class Foreign(nn.Module):
    """A neuron of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.v = 0.0

    def reset(self) -> None:
        self.v = 0.0

    def forward(self, x):
        self.v = self.v + x
        return self.v


@pytest.mark.parametrize("neuron", [LIF, Foreign])
def test_tracing_leaves_no_state_behind(neuron):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), neuron(), nn.Flatten(), nn.Linear(72, 3))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        expected = net(x)
        for part in state_modules(net):
            part.reset()  # pyright: ignore[reportCallIssue]
        blocks(net, 2)
        assert torch.equal(net(x), expected)
        assert convert(net)(x).shape == expected.shape
