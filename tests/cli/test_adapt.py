"""`adapt`: bundles are merged into a bundle, with accuracies before and after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from torchfolio.adaptation.adapter import Adapted, Adapter
from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.cli import app
from torchfolio.data import load
from torchfolio.engine import fit
from torchfolio.models import build, spec

runner = CliRunner()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A network of digits and two that were trained on from it."""
    folder = tmp_path_factory.mktemp("networks")
    digits = load("digits")
    arguments = {"in_features": 64, "out_features": 10, "hidden": (16,)}
    mean, std = digits.mean.flatten().tolist(), digits.std.flatten().tolist()
    manifest = Manifest(spec("mlp"), arguments, digits.shape, digits.classes, tuple(mean), tuple(std))
    torch.manual_seed(0)
    net = build("mlp", **arguments)
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        fit(net, digits.train, epochs=2, seed=seed, progress=False)
        save_bundle(net, folder / name, manifest)
        if name == "base":
            start = {k: v.clone() for k, v in net.state_dict().items()}
        net.load_state_dict(start)
    return folder


def call(*arguments: object):
    return runner.invoke(app, ["adapt", *map(str, arguments)])


def test_average_needs_neither_base_nor_data(networks, tmp_path):
    done = call("--method", "average", networks / "a", networks / "b", "-o", tmp_path / "merged")
    assert done.exit_code == 0, done.output
    merged, a, b = (load_bundle(p).model.state_dict() for p in (tmp_path / "merged", networks / "a", networks / "b"))
    assert all(torch.allclose(merged[k], (a[k] + b[k]) / 2) for k in merged)


@pytest.mark.parametrize("method", ["task_arithmetic", "adamerging", "concrete", "dam"])
def test_merges_and_measures(networks, tmp_path, method):
    settings = [] if method == "task_arithmetic" else ["--set", "steps=2"]
    settings += ["--set", "adapt_steps=0"] if method in ("concrete", "dam") else []
    done = call(
        *("--method", method, networks / "a", networks / "b", "--base", networks / "base", "--data", "digits"),
        *("-o", tmp_path / "merged", "--json", *settings),
    )
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["networks"]
    assert [row["bundle"] for row in rows] == [str(tmp_path / "merged")] * 2
    assert all(row["after"] > 0.3 for row in rows)
    assert load_bundle(tmp_path / "merged").manifest.training["method"] == method


def test_heads_may_be_kept(networks, tmp_path):
    last = list(dict(load_bundle(networks / "a").model.named_children()))[-1]
    done = call(
        *("--method", "dam", networks / "a", networks / "b", "--base", networks / "base", "--data", "digits"),
        *("-o", tmp_path / "merged", "--keep", last, "--set", "steps=2", "--set", "adapt_steps=0", "--json"),
    )
    assert done.exit_code == 0, done.output
    folders = [row["bundle"] for row in json.loads(done.stdout)["networks"]]
    assert folders == [str(tmp_path / "merged" / name) for name in ("0-a", "1-b")]
    kept, a = (load_bundle(p).model.get_submodule(last).state_dict() for p in (folders[0], networks / "a"))
    assert all(torch.equal(kept[k], a[k]) for k in a)


class Widened(nn.Module):
    """A network of a structure of its own."""

    def __init__(self, inner: nn.Module, factor: float = 1.0) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.factor * self.inner(x)


class Doubled(Adapter):
    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor

    def recipe(self, network):
        return {"build": "tests.cli.test_adapt:Widened", "arguments": {"inner": network, "factor": self.factor}}

    def _adapt(self, model, data, run):
        assert run.num_classes == 10
        return Adapted(Widened(model, self.factor), {"examples": float(len(data))})


def test_one_network_is_adapted_to_data(networks, tmp_path, monkeypatch):
    from torchfolio import catalog

    monkeypatch.setattr(catalog, "offering", lambda kind: {"doubled": "x:y"} if kind == "adapter" else {})
    monkeypatch.setattr(catalog, "offered", lambda slug, kind: Doubled)
    arguments = ("--method", "doubled", networks / "a", "--data", "digits", "-o", tmp_path / "wide", "--json")
    done = call(*arguments, "--set", "factor=3", "--allow", "tests.cli.test_adapt:Widened")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["before"] == result["after"]
    assert result["examples"] > 100
    wide = load_bundle(tmp_path / "wide", allow=["tests.cli.test_adapt:Widened"])
    assert wide.manifest.training["method"] == "doubled"
    assert isinstance(wide.model, Widened)
    assert wide.model.factor == 3
    for extra, message in (("--base", "leave --base out"), ("--keep", "leave --keep out")):
        done = call(*arguments, extra, networks / "base")
        assert done.exit_code == 2
        assert message in done.stderr
    done = call("--method", "doubled", networks / "a", networks / "b", "-o", tmp_path / "c")
    assert done.exit_code == 2
    assert "adapts one network" in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nosuch"], "expected average"),
        (["--method", "dam"], "--base"),
        (["--method", "dam", "--base", "base"], "--data"),
        (["--method", "average", "--data", "wine"], "takes inputs of shape"),
        (["--method", "average", "--keep", "nosuch"], "to keep"),
        (["--method", "average", "--set", "x=1"], "no setting"),
    ],
)
def test_errors_are_one_sentence(networks, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(networks)
    done = call(*arguments, "a", "b", "-o", tmp_path / "merged")
    assert done.exit_code == 2
    assert message in done.stderr


def test_spiking_networks_are_measured_by_their_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spiking = ("--model", "torchfolio.spiking.nets:SpikingConvNet", "--rule", "sltt", "--rule-set", "timesteps=2")
    done = runner.invoke(app, ["train", *spiking, "--data", "digits", "--epochs", "1", "-o", "net"])
    assert done.exit_code == 0, done.output
    done = call("--method", "average", "net", "net", "--data", "digits", "-o", "merged", "--json")
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["networks"][0]
    asked = json.loads(runner.invoke(app, ["eval", "net", "--data", "digits", "--json"]).stdout)["accuracy"]
    again = json.loads(runner.invoke(app, ["eval", "merged", "--data", "digits", "--json"]).stdout)["accuracy"]
    assert row["before"] == asked == row["after"] == again
