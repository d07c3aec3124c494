"""Classes go by their names, and equal weights mean equal things only in networks of one kind: `eval`, `train`, `adapt`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_model
from torch import nn
from typer.testing import CliRunner

from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.cli import app
from torchfolio.cli._inside import top_layers
from torchfolio.cli._network import _named_as
from torchfolio.models import build, spec

runner = CliRunner()


def call(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def colours(tmp_path, monkeypatch) -> Path:
    """Images that one pixel tells apart, in folders of three sets of names, and a network that knows `red` and `green`."""
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, names in (("same", ("green", "red")), ("other", ("x", "y")), ("some", ("blue", "red"))):
        for channel, name in enumerate(names):
            (tmp_path / folder / name).mkdir(parents=True)
            for k in range(20):
                image = rng.integers(0, 40, (4, 4, 3), dtype=np.uint8)
                image[..., channel] += 100
                Image.fromarray(image).save(tmp_path / folder / name / f"{k}.png")
    arguments = {"in_features": 48, "out_features": 2, "hidden": ()}
    net = build("mlp", **arguments)
    with torch.no_grad():  # answers 1 for images of `green`, 0 for those of `red`
        for p in net.parameters():
            p.zero_()
        next(iter(net.parameters()))[1, :16] = 1
        next(iter(net.parameters()))[0, 16:32] = 1
    save_bundle(net, tmp_path / "net", Manifest(spec("mlp"), arguments, (3, 4, 4), ("red", "green")))
    return tmp_path


def test_labels_are_numbered_as_the_network_does(colours):
    """The folder sorts green before red, the network has them the other way round."""
    for command in (("eval", "net"), ("adapt", "--method", "average", "net", "net", "-o", "merged")):
        done = call(*command, "--data", "same/", "--json")
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert result.get("accuracy", result.get("networks", [{}])[0].get("before")) == 1


@pytest.mark.parametrize("command", ["eval", "compress", "audit", "inspect"])
def test_a_class_that_the_network_does_not_know_is_told(colours, command):
    output = () if command == "eval" else ("-o", "out")
    done = call(command, "net", "--data", "some/", *output)
    assert done.exit_code == 2
    assert "some/ has the class blue, which net does not know; it knows red, green" in done.stderr


def test_classes_of_other_names_are_taken_in_their_order_with_a_word(colours):
    done = call("eval", "net", "--data", "other/", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["accuracy"] == 0, "x is red's place, and shows green"
    assert "the first, x, is taken for red" in done.stderr


@pytest.mark.parametrize("data", ["other", "some"])
def test_a_network_tells_apart_what_it_was_last_trained_on(colours, data):
    done = call("train", "--start", "net", "--data", f"{data}/", "--epochs", 1, "-o", "tuned")
    assert done.exit_code == 0, done.output
    names = tuple(sorted(p.name for p in (colours / data).iterdir()))
    assert load_bundle("tuned").manifest.classes == names
    done = call("adapt", "net", "--method", "naive_bayes_probe", "--data", f"{data}/", "-o", "headed", "--json")
    assert done.exit_code == 0, done.output
    assert load_bundle("headed").manifest.classes == names
    result = json.loads(done.stdout)
    assert (result["before"], result["after"]) == (None, 1)


def test_what_is_trained_on_keeps_the_numbers_of_known_classes(colours):
    done = call("train", "--start", "net", "--data", "same/", "--epochs", 1, "--lr", 0, "-o", "tuned", "--json")
    assert json.loads(done.stdout)["accuracy"] == 1
    assert load_bundle("tuned").manifest.classes == ("red", "green")
    done = call("adapt", "net", "--method", "naive_bayes_probe", "--data", "same/", "-o", "headed", "--json")
    result = json.loads(done.stdout)
    assert (result["before"], result["after"]) == (1, 1)
    assert json.loads(call("eval", "headed", "--data", "same/", "--json").stdout)["accuracy"] == 1


def test_a_teacher_numbers_classes_as_its_student(colours):
    done = call("train", "--model", "mlp", "--data", "same/", "--add", "dhkd", "--add-set", "teacher=net", "-o", "new")
    assert done.exit_code == 2
    assert "the teacher numbers its classes red, green, the network that is trained green, red" in done.stderr


# Merging


class Curved(nn.Module):
    """The same entries whatever the activation; a mask that is infinite in every copy."""

    def __init__(self, activation: str = "relu", outputs: int = 3, drop: float = 0.0) -> None:
        super().__init__()
        self.enter, self.head = nn.Linear(10, 8), nn.Linear(8, outputs)
        self.activation, self.drop = activation, drop
        self.register_buffer("mask", torch.full((2,), -torch.inf))

    def forward(self, x):
        return self.head(getattr(torch, self.activation)(self.enter(x.flatten(1))))


PATH = "tests.cli.test_classes:Curved"


@pytest.fixture
def curved(tmp_path, monkeypatch):
    """Writes networks of ten features."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, manifest: Manifest | None = None, net: nn.Module | None = None, **arguments: object) -> str:
        own = manifest or Manifest(PATH, {}, (10,), tuple("abc"), (0.0,), (1.0,))
        save_bundle(net or Curved(**arguments), tmp_path / name, replace(own, arguments=arguments))  # type: ignore[arg-type]
        return name

    return write


PLAIN = Manifest(PATH, {}, (10,), tuple("abc"), (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("manifest", "arguments", "said"),
    [
        (None, {"activation": "sigmoid"}, "it is built with activation 'sigmoid', not 'relu'"),
        (replace(PLAIN, mean=(5.0,)), {}, "it normalises its inputs by (5.0, 1.0), not (0.0, 1.0)"),
        (replace(PLAIN, classes=tuple("bac")), {}, "it tells apart ('b', 'a', 'c'), not ('a', 'b', 'c')"),
        (replace(PLAIN, input_shape=(1, 10)), {}, "it takes inputs of shape (1, 10), not (10,)"),
    ],
)
@pytest.mark.parametrize("method", ["average", "task_arithmetic", "dam"])
def test_networks_of_other_kinds_are_not_merged(curved, manifest, arguments, said, method):
    names = curved("a"), curved("b", manifest, **arguments)
    based = () if method == "average" else ("--base", curved("base"))
    done = call("adapt", "--method", method, *names, *based, "--data", "digits", "-o", "merged", "--allow", PATH)
    assert done.exit_code == 2
    assert f"b is not of the same kind as a: {said}" in done.stderr
    assert not Path("merged").exists()


def test_what_is_said_and_what_is_the_default_are_one_and_dropout_changes_no_meaning(curved):
    names = curved("a", activation="relu", drop=0.2), curved("b")
    done = call("adapt", "--method", "average", *names, "-o", "merged", "--allow", PATH)
    assert done.exit_code == 0, done.output


def test_heads_of_other_classes_may_be_kept_and_the_base_may_have_others(curved):
    a, b = curved("a"), curved("b", replace(PLAIN, classes=tuple("vwxyz")), outputs=5)
    base = curved("base", replace(PLAIN, classes=tuple("01")), outputs=2)
    done = call(
        *("adapt", "--method", "task_arithmetic", a, b, "--base", base, "--keep", "head", "-o", "kept", "--allow", PATH)
    )
    assert done.exit_code == 0, done.output
    kept = [load_bundle(f"kept/{name}", allow=[PATH]).manifest.classes for name in ("0-a", "1-b")]
    assert kept == [tuple("abc"), tuple("vwxyz")]
    base = curved("base", replace(PLAIN, classes=tuple("012")))
    done = call("adapt", "--method", "task_arithmetic", a, a, "--base", base, "-o", "one", "--allow", PATH)
    assert done.exit_code == 0, done.output
    assert load_bundle("one", allow=[PATH]).manifest.classes == tuple("abc")


@pytest.mark.parametrize("keep", [(), ("--keep", "head")])
def test_a_mask_that_is_infinite_in_all_stays(curved, keep):
    names = curved("a"), curved("b")
    done = call("adapt", "--method", "average", *names, "-o", "merged", "--allow", PATH, *keep)
    assert done.exit_code == 0, done.output
    merged = load_bundle("merged/0-a" if keep else "merged", allow=[PATH]).model
    assert merged.mask.tolist() == [-torch.inf, -torch.inf]


def test_regressions_are_merged_and_measured_by_their_loss(curved):
    target = replace(PLAIN, classes=())
    names = [curved(name, target, outputs=1) for name in "ab"]
    based = ("--base", curved("base", target, outputs=1), "--data", "diabetes", "--allow", PATH, "-o", "merged")
    done = call("adapt", "--method", "average", *names, *based, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)["networks"]
    for row, name in zip(rows, ("a", "b"), strict=True):
        assert row["measure"] == "loss"
        for key, folder in (("before", name), ("after", "merged")):
            scores = json.loads(call("eval", folder, "--data", "diabetes", "--allow", PATH, "--json").stdout)
            assert row[key] == pytest.approx(scores["loss"])
    for method in ("adamerging", "dam", "concrete"):
        done = call("adapt", "--method", method, *names, *based, "--force")
        assert done.exit_code == 2
        assert "learns from the entropy over classes, and these networks tell none apart" in done.stderr
    done = call("adapt", "--method", "sara", "a", "--data", "diabetes", "--allow", PATH, "-o", "tuned", "--json",
                "--set", "epochs=1")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) >= {"before", "after"}


class Tied(nn.Module):
    """One weight under two names, one layer under two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)
        self.b.weight = self.a.weight
        self.c = self.b


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_known_by_any_of_their_names(tmp_path, prefix):
    """Files of safetensors' `save_model`, of wrapped and of compiled networks."""
    net, other = Tied(), Tied()
    save_model(net, str(tmp_path / "one"))
    state = {prefix + name: value for name, value in load_file(tmp_path / "one").items()}
    assert len(state) < len(net.state_dict())
    other.load_state_dict(_named_as(other, state))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())


def test_a_layer_that_runs_twice_is_no_layer_to_show():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.inner(self.inner(x)))

    assert top_layers(Twice(), torch.randn(3, 4)) == ["head"]


def test_eval_says_that_a_network_saw_no_labels(curved):
    arguments = ("--data", "diabetes", "--allow", PATH, "--json")
    regression = replace(PLAIN, classes=(), training={"rule": "amcl", "test": {}})
    done = call("eval", curved("features", regression, outputs=1), *arguments)
    assert done.exit_code == 0, done.output
    assert "features was trained by amcl, which sees no labels" in done.stderr
    done = call("eval", curved("answers", replace(regression, training={}), outputs=1), *arguments)
    assert "labels" not in done.stderr
