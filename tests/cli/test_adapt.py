"""`adapt`: bundles are merged into a bundle, with accuracies before and after."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from torchfolio import bundle
from torchfolio.adaptation.adapter import Adapted, Adapter
from torchfolio.adaptation.merge import Average, Merge, TaskArithmetic
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


class Shared(nn.Module):
    """Tied weights, batch norm, a frozen layer."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(64, width), nn.BatchNorm1d(width), nn.Linear(64, width)
        self.leave.weight = self.enter.weight
        self.fixed = nn.Linear(width, 10).requires_grad_(False)

    def forward(self, x):
        return self.fixed(self.norm(self.enter(x.flatten(1))) + self.leave(x.flatten(1)))


@pytest.fixture
def shared(tmp_path) -> list[Path]:
    """A base and three that were trained on, the last of them in half precision."""
    base = Shared()
    base.fixed.half().float()
    folders = []
    for k in range(4):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(k * torch.randn(p.shape) * p.requires_grad)
            net.norm.running_var.add_(k)
            net.norm.num_batches_tracked.add_(k)
        manifest = Manifest("tests.cli.test_adapt:Shared", {"width": 5}, (1, 8, 8), tuple("0123456789"))
        folders.append(save_bundle(net.half() if k == 3 else net, tmp_path / str(k), manifest))
    return folders


@pytest.mark.parametrize(("method", "last"), [("average", 2), ("task_arithmetic", 2), ("task_arithmetic", 3)])
def test_networks_merged_on_disk_are_those_merged_in_memory(shared, tmp_path, monkeypatch, method, last):
    """A network in half precision, which it takes into its own type when it is read, is merged in memory either way."""
    opened = []
    monkeypatch.setattr(Merge, "fit", lambda self, *a, fit=Merge.fit, **k: (opened.append(self), fit(self, *a, **k))[1])
    written = []
    for streams in (True, False):
        monkeypatch.setattr(Average if method == "average" else TaskArithmetic, "streams", streams)
        based = [] if method == "average" else ["--base", shared[0]]
        output = tmp_path / f"merged-{streams}"
        done = call(
            *("--method", method, shared[1], shared[last], *based, "--data", "digits", "--json"),
            *("-o", output, "--allow", "tests.cli.test_adapt:Shared"),
        )
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout)["networks"]
        one = load_bundle(output, allow=["tests.cli.test_adapt:Shared"])
        assert one.manifest.tied == {"leave.weight": "enter.weight"}
        assert one.model.norm.running_var[0] == (2.5 if method == "average" else 1)
        assert len(opened) == (0 if streams and last == 2 else 1)
        opened.clear()
        written.append((one, [(row["before"], row["after"]) for row in rows]))
    (streamed, scores), (held, others) = written
    assert scores == others
    assert streamed.manifest == held.manifest
    assert all(
        torch.equal(a, b) for a, b in zip(*(m.model.state_dict().values() for m in (streamed, held)), strict=True)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda net: net.fixed.weight.data.add_(1), "changed fixed.weight, which is frozen"),
        (lambda net: net.enter.weight.data.mul_(3e38), "infinity in enter.weight"),
    ],
)
def test_merging_on_disk_refuses_what_merging_in_memory_does(shared, tmp_path, monkeypatch, change, said):
    allow = ["tests.cli.test_adapt:Shared"]
    one = load_bundle(shared[2], allow=allow)
    change(one.model)
    monkeypatch.setattr(bundle.writing, "check_finite", lambda model, state: None)
    save_bundle(one.model, shared[2], one.manifest)
    done = call(
        *("--method", "task_arithmetic", *shared[1:3], "--base", shared[0], "-o", tmp_path / "merged"),
        *("--allow", allow[0]),
    )
    assert done.exit_code == 2
    assert said in done.stderr
    assert not (tmp_path / "merged").exists()


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
