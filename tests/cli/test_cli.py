"""The command line: quick to answer, one sentence for an error, exit codes that programs can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from torchfolio.bundle import load_bundle
from torchfolio.cli import app

runner = CliRunner()


def call(*arguments: str):
    return runner.invoke(app, list(arguments))


@pytest.mark.parametrize(
    "arguments", [["list"], ["show", "auglocal"], ["cite", "man"], ["--help"], ["--version"], ["run", "--help"]]
)
def test_quick_commands_import_nothing_heavy(arguments):
    code = (
        "import sys\nfrom torchfolio.cli import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'sklearn', 'pandas', 'matplotlib', 'datasets', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


def test_list_and_json():
    assert "auglocal" in call("list").stdout
    table = json.loads(call("list", "--family", "local", "--in", "--json").stdout)
    assert {"auglocal", "man"} <= {p["slug"] for p in table}
    assert call("list", "--family", "nosuch").exit_code == 2


def test_show_search_cite():
    shown = call("show", "auglocal").stdout
    assert "ICLR 2024" in shown
    assert "torchfolio run auglocal" in shown
    assert json.loads(call("search", "local", "learning", "--json").stdout)[0]["slug"] in (
        "auglocal",
        "man",
        "forwardgnn",
    )
    assert call("cite", "auglocal", "man").stdout.count("@inproceedings") == 2


def test_show_settings():
    settings = json.loads(call("show", "auglocal", "--settings", "--json").stdout)
    assert settings["epochs"]["meaning"] == "passes over the training examples"
    assert settings["epochs"]["smoke"] < settings["epochs"]["quick"]
    assert "epochs" in call("show", "auglocal", "--settings").stdout


def test_errors_are_one_sentence():
    done = call("show", "auglocla")
    assert done.exit_code == 2
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean auglocal" in done.stderr
    assert "Traceback" in call("--debug", "show", "auglocla").stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "auglocal", "--all"],
        ["run", "--family", "nosuch"],
        ["run", "auglocal", "--scale", "huge"],
        ["run", "auglocal", "--scale", "smoke", "--set", "nosuch=1"],
        ["report", "no/such/folder"],
        ["train", "--model", "nosuch", "--data", "digits", "-o", "x"],
        ["train", "--model", "mlp", "--data", "nosuch", "-o", "x"],
        ["train", "--model", "mlp", "--data", "digits", "--rule", "nosuch", "-o", "x"],
        ["train", "--model", "mlp", "--data", "digits", "--rule", "auglocal", "--rule-set", "nosuch=1", "-o", "x"],
        ["train", "--model", "mlp", "--data", "digits", "--model-set", "nosuch=1", "-o", "x"],
        ["train", "--model", "mlp", "--data", "digits", "--resume", "-o", "x"],
        ["train", "--data", "digits", "-o", "x"],
        ["train", "--model", "mlp", "--start", "net", "--data", "digits", "-o", "x"],
        ["eval", "no/such/bundle", "--data", "digits"],
    ],
)
def test_bad_usage_is_told_in_a_sentence(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert not list(tmp_path.glob("x*"))


def test_train_eval_and_your_own_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n"
        "def make(num_classes=2):\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),\n"
        "        nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )
    make_photos(tmp_path / "photos")
    done = call(
        "train", "--model", "mynet:make", "--data", "photos/", "--image-size", "12", "--rule", "auglocal", "--rule-set",
        "aux_depth=1", "--epochs", "2", "--batch-size", "8", "-o", "net", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) == {"bundle", "loss", "accuracy"}
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["bundle.json", "history.csv", "model.safetensors"]
    assert not (tmp_path / "net.training").exists()
    refused = call("eval", "net", "--data", "photos/")
    assert refused.exit_code == 2
    assert "--allow mynet:make" in refused.stderr
    scores = json.loads(call("eval", "net", "--data", "photos/", "--allow", "mynet:make", "--json").stdout)
    assert scores["accuracy"] == pytest.approx(json.loads(done.stdout)["accuracy"])


def test_training_goes_on_from_a_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ("--data", "digits", "--epochs", "1", "--json")
    done = call("train", "--model", "mlp", *short, "-o", "net")
    assert done.exit_code == 0, done.output
    tuned = call("train", "--start", "net", *short, "--lr", "0", "--schedule", "constant", "-o", "tuned")
    assert tuned.exit_code == 0, tuned.output
    assert json.loads(tuned.stdout)["accuracy"] == json.loads(done.stdout)["accuracy"]
    manifest, start = (json.loads((tmp_path / name / "bundle.json").read_text()) for name in ("tuned", "net"))
    assert manifest["training"]["start"] == "net"
    assert {k: manifest[k] for k in ("build", "mean", "std")} == {k: start[k] for k in ("build", "mean", "std")}


def test_other_classes_get_a_classifier_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_photos(tmp_path / "photos")
    make_photos(tmp_path / "more", ("a", "b", "c"))
    image = ("--image-size", "12", "--epochs", "1", "--batch-size", "8")
    net = ("--model", "convnet", "--model-set", "widths=[4,4]")
    done = call("train", *net, "--data", "photos/", *image, "-o", "net")
    assert done.exit_code == 0, done.output
    short = ("--lr", "0", "--schedule", "constant")
    tuned = call("train", "--start", "net", "--data", "more/", *image, *short, "-o", "tuned")
    assert tuned.exit_code == 0, tuned.output
    states = [load_bundle(tmp_path / name).model.state_dict() for name in ("net", "tuned")]
    changed = [k for k in states[0] if "running" not in k and "tracked" not in k and not same(states, k)]
    assert [states[1][k].shape[0] for k in changed] == [3, 3]


def same(states, key):
    return states[0][key].shape == states[1][key].shape and torch.equal(states[0][key], states[1][key])


def make_photos(folder, names=("dark", "light")):
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for k, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(60 * k, 60 * k + 120, (14 + i % 3, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_run_and_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("run", "auglocal", "--scale", "smoke", "--set", "epochs=1", "--set", "train_size=64", "--json")
    assert done.exit_code == 0, done.output
    (outcome,) = json.loads(done.stdout)
    assert outcome["settings"]["train_size"] == 64
    assert {claim["id"] for claim in outcome["claims"]} == {"accuracy", "memory", "pyramid", "negative_control"}
    done = call("report", "runs", "-o", "report.html")
    assert done.exit_code == 0
    assert "Augmented Auxiliary" in (tmp_path / "report.html").read_text()
