"""`train` and `eval`: what is reported is what was held out, whatever the seed."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from torchfolio.bundle import load_bundle
from torchfolio.cli import app
from torchfolio.cli._network import fitting_splits
from torchfolio.errors import TorchfolioError

runner = CliRunner()


def call(*arguments: object):
    return runner.invoke(app, [str(a) for a in arguments])


@pytest.fixture
def noise(tmp_path, monkeypatch):
    """Images without anything to learn: what scores above chance on them was trained on."""
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "noise" / name).mkdir(parents=True)
        for k in range(60):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "noise" / name / f"{k}.png")
    return "noise/"


TRAIN = ("train", "--model", "mlp", "--epochs", 30, "--batch-size", 32, "--optimizer", "adamw", "--lr", 0.01, "--json")


@pytest.mark.parametrize("test_size", [None, 10])
def test_eval_scores_what_train_held_out(noise, test_size):
    size = () if test_size is None else ("--test-size", test_size)
    done = call(*TRAIN, "--data", noise, "--seed", 1, "-o", "net", *size)
    assert done.exit_code == 0, done.output
    trained = json.loads(done.stdout)
    for seed in (0, 2):
        again = call("eval", "net", "--data", noise, "--seed", seed, "--json", *size)
        assert again.exit_code == 0, again.output
        scores = json.loads(again.stdout)
        assert scores["loss"] == pytest.approx(trained["loss"], abs=1e-6)
        assert scores["accuracy"] == pytest.approx(trained["accuracy"], abs=1e-6)
    seen = json.loads(call("eval", "net", "--data", noise, "--split", "train", "--json").stdout)
    assert seen["accuracy"] > scores["accuracy"] + 0.2, "the network has learnt the noise by heart"


def test_eval_refuses_a_split_that_is_no_longer_known(noise, tmp_path):
    assert call(*TRAIN, "--data", noise, "-o", "net").exit_code == 0
    (tmp_path / "noise" / "a" / "0.png").rename(tmp_path / "noise" / "a" / "z.png")
    done = call("eval", "net", "--data", noise)
    assert done.exit_code == 2
    assert "held other examples" in done.stderr


def test_examples_are_known_again_under_any_name(noise, capsys):
    """Another cut of the same images, by another name of a file or of the folder, would score what was trained on."""
    assert call(*TRAIN, "--data", noise, "--seed", 1, "-o", "net").exit_code == 0
    shutil.copytree("noise", "copy")
    same = json.loads(call("eval", "net", "--data", "copy/", "--json").stdout)
    assert same["accuracy"] == json.loads(call("eval", "net", "--data", noise, "--json").stdout)["accuracy"]
    Path("copy/a/0.png").rename("copy/a/z.png")
    shutil.copytree("noise", "parts/train")
    shutil.copytree("noise", "parts/test")
    for data in ("copy/", "parts/"):
        for command in (("eval", "net"), ("compress", "net", "--method", "biper", "-o", "out"), ("inspect", "net")):
            done = call(*command, "--data", data)
            assert done.exit_code == 2, (command, done.output)
            assert f"examples of {data}, which stood under other names" in done.stderr
    manifest = load_bundle("net").manifest
    fitting_splits(manifest, "net", "copy/", scored=False)
    assert "net was trained on" in capsys.readouterr().err, "worth a word where nothing is scored"
    # Another set in the folder that was trained on is one that it was not trained on.
    with pytest.raises(TorchfolioError, match="held other examples"):
        fitting_splits(replace(manifest, training={**manifest.training, "data": "copy/"}), "net", "copy/")
    done = call(*TRAIN, "--data", noise, "-o", "other", "--val", "copy/")
    assert done.exit_code == 2
    assert "copy/ holds examples that are trained on" in done.stderr


def test_what_is_trained_further_knows_all_it_has_seen(noise, tmp_path):
    assert call(*TRAIN, "--data", noise, "-o", "net").exit_code == 0
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        (tmp_path / "new" / name).mkdir(parents=True)
        for k in range(60):
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "new" / name / f"{k}.png")
    assert call("train", "--start", "net", "--data", "new/", "--epochs", 1, "-o", "further").exit_code == 0
    arguments = ("--method", "average", "-o", "merged")
    assert call("adapt", "net", "further", *arguments).exit_code == 0, call(
        "adapt", "net", "further", *arguments
    ).output
    for old in ("noise/", "new/"):
        shutil.copytree(old, "copy")
        Path("copy/a/0.png").rename("copy/a/z.png")
        for network in ("further", "merged"):
            assert "was trained on" in call("eval", network, "--data", "copy/").stderr
        shutil.rmtree("copy")


def test_spiking_networks_train_and_are_read_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(
        *("train", "--model", "torchfolio.spiking.nets:SpikingConvNet", "--data", "digits", "--rule", "sltt"),
        *("--rule-set", "timesteps=3", "--rule-set", "k=1", "--train-size", 300, "--epochs", 1, "-o", "net", "--json"),
    )
    assert done.exit_code == 0, done.output
    trained = json.loads(done.stdout)
    again = json.loads(call("eval", "net", "--data", "digits", "--json").stdout)
    assert again["loss"] == pytest.approx(trained["loss"], abs=1e-6)
    assert again["accuracy"] == trained["accuracy"]


DIGITS = ("train", "--model", "mlp", "--data", "digits", "--train-size", 256, "--epochs", 1, "--batch-size", 64)


def test_objectives_are_added_to_any_rule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(*DIGITS, "-o", "teacher").exit_code == 0
    host = ("--rule", "auglocal", "--rule-set", "aux_depth=1", "--model-set", "hidden=(16, 16, 16)")
    for k, rule in enumerate(((), host)):
        added = ("--add", "dhkd", "--add-set", "teacher=teacher", "--add-set", "aux=linear", "--add", "guidance")
        named = [f"dhkd.{a}" if "=" in a else a for a in added]
        done = call(*DIGITS, *named, "--add-set", "guidance.guide=teacher", *rule, "-o", f"net{k}", "--json")
        assert done.exit_code == 0, done.output
        again = json.loads(call("eval", f"net{k}", "--data", "digits", "--json").stdout)
        assert again["loss"] == pytest.approx(json.loads(done.stdout)["loss"], abs=1e-6)
    record = json.loads((tmp_path / "net1" / "bundle.json").read_text())["training"]
    assert record["added"] == {"dhkd": {"teacher": "teacher", "aux": "linear"}, "guidance": {"guide": "teacher"}}
    done = call(*DIGITS, "--rule", "dhkd", "--rule-set", "teacher=teacher", "-o", "net3")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--add", "biper"), "biper is not an objective"),
        (("--add", "dhkd", "--add-set", "teacher=nowhere"), "nowhere"),
        (("--add", "dhkd", "--add-set", "colour=1"), "no setting 'colour'"),
        (("--add", "dhkd"), "needs the setting 'teacher'"),
        (("--add-set", "alpha=1"), "--add before it"),
        (("--add", "dhkd", "--add", "guidance", "--add-set", "alpha=1"), "dhkd.key=value"),
        (("--add", "dhkd", "--add", "dhkd"), "every objective once"),
        (("--add", "torchfolio.engine:Backprop"), "is not a class of torchfolio.engine.Objective"),
    ],
)
def test_objectives_that_cannot_be_added(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    done = call(*DIGITS, *arguments, "-o", "net")
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.stderr.replace("│", " ").split())


def test_networks_among_settings_see_data_as_they_were_trained_on():
    import torch
    from torch import nn

    from torchfolio.cli._objectives import renormalized

    net, x = nn.Conv2d(2, 3, 1).eval(), torch.randn(4, 2, 3, 3)
    mean, std = torch.tensor([1.0, 2.0]).view(-1, 1, 1), torch.tensor([3.0, 4.0]).view(-1, 1, 1)
    own = ((1.0, 2.0), (3.0, 4.0))
    torch.testing.assert_close(renormalized(net, ((), ()), own)(x), net((x - mean) / std))
    torch.testing.assert_close(renormalized(net, own, ((), ()))(x), net(x * std + mean))
    assert renormalized(net, own, own) is net


def test_json_is_valid_whatever_the_numbers_are(capsys):
    from torchfolio.cli._network import show_result

    show_result({"loss": float("nan"), "rows": [{"x": float("inf")}]}, True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"loss": None, "rows": [{"x": None}]}


def test_a_batch_job_says_every_epoch_and_the_bundle_keeps_the_history(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "mlp", "--data", "digits", "--epochs", "3", "-o", "net", "--log", "csv"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    rows = list(csv.DictReader((tmp_path / "net" / "history.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    record = json.loads((tmp_path / "net" / "bundle.json").read_text())["training"]
    assert record["val"] == {name: float(rows[-1][f"val_{name}"]) for name in ("loss", "accuracy")}
    assert f"val loss {record['val']['loss']:.4f}" in lines[-1]
    assert len(list(tmp_path.glob("net.logs/*/metrics.csv"))) == 1


def test_early_stopping_is_kept_in_the_record(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "mlp", "--data", "digits", "--epochs", "30", "--lr", "0", "--schedule", "constant"]
    done = CliRunner().invoke(app, [*arguments, "--early-stopping", "2", "-o", "net"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "net" / "bundle.json").read_text())["training"]
    assert "val_loss" in record["stopped"]
    assert record["steps"] < 30 * 11


def test_weights_and_biases_gets_every_epoch(tmp_path, monkeypatch):
    logged, ended = [], []
    run = types.SimpleNamespace(log=lambda m, step: logged.append((step, m)), finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "mlp", "--data", "digits", "--epochs", "2", "-o", "net", "--log", "wandb"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert [m["epoch"] for _, m in logged if "epoch" in m] == [1, 2]
    assert ended == [True]


@pytest.mark.parametrize("log", ["paper", "wandb"])
def test_a_logger_that_is_not_there(log, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--model", "mlp", "--data", "digits", "-o", "net", "--log", log]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert ("expected csv, tensorboard, wandb" if log == "paper" else "wandb is not installed") in done.stderr


def test_a_validation_set_of_ones_own(noise, tmp_path):
    import torch

    from torchfolio import data, engine
    from torchfolio.bundle import load_bundle
    from torchfolio.cli._network import normalized

    rng = np.random.default_rng(1)
    (tmp_path / "noise" / "0").mkdir()  # a class that is not in the other set: labels go by name, not by place
    for k in range(20):
        for place in ("noise/0", "mine/a", "mine/b"):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / place / f"{k}.png")
    done = call(*TRAIN, "--data", noise, "-o", "net", "--val", "mine/")
    assert done.exit_code == 0, done.output
    loaded = load_bundle("net")
    record = loaded.manifest.training
    assert record["val_data"] == "mine/"
    mine = data.load_whole("mine/", like=data.load(noise))
    assert mine.tensors[1].bincount().tolist() == [0, 20, 20]
    scores = engine.evaluate(loaded.model, normalized(mine, loaded.manifest.mean, loaded.manifest.std))
    assert scores == pytest.approx(record["val"], abs=1e-6)
    held_out = data.load(noise).val  # as without a set of one's own, it was not trained on
    assert engine.evaluate(loaded.model, held_out)["accuracy"] < 0.9
    torch.testing.assert_close(data.load(noise).std, torch.tensor(loaded.manifest.std))


@pytest.mark.parametrize(
    ("val", "sentence"),
    [("noise", "names the training data"), ("digits", "has 0, 1"), ("odd/", "has inputs of shape (1, 4, 4)"),
     (" ", "got an empty one"), ("nowhere", "no data set 'nowhere'")],
)  # fmt: skip
def test_validation_sets_that_do_not_fit(noise, tmp_path, val, sentence):
    for name in "ab":
        (tmp_path / "odd" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "odd" / name / "0.png")
    done = call(*TRAIN, "--data", noise, "-o", "net", "--val", val)
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
