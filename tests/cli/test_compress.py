"""The compress command: a bundle goes in, a smaller one that eval reads comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from torchfolio.cli import app

MYNET = """
from torch import nn
def make(num_classes=2, in_channels=3):
    return nn.Sequential(nn.Conv2d(in_channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Hardtanh(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Hardtanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))
"""


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "net"
    done = call("train", "--model", "convnet", "--data", "digits", "--model-set", "widths=(8,16)", "--epochs", 6, "-o",
                folder, "--device", "cpu")  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


def test_compress_and_eval(bundle, tmp_path):
    small = tmp_path / "small"
    done = call("compress", bundle, "--method", "biper", "--data", "digits", "--epochs", 12, "-o", small, "--device",
                "cpu", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert "phase square wave" in done.stderr
    assert result["after"]["bytes"] < result["before"]["bytes"] / 3
    assert result["after"]["accuracy"] > result["before"]["accuracy"] - 0.1
    kinds = result["after"]["flops"] + result["after"]["sign_operations"]
    assert kinds == result["before"]["flops"]
    assert sorted(p.name for p in small.iterdir()) == ["bundle.json", "model.safetensors"]
    record = json.loads((small / "bundle.json").read_text())["training"]["compressed"]
    assert "ms_per_example" in result["before"]
    assert "ms_per_example" not in record["before"], "a time would make equal bundles differ"
    read = call("eval", small, "--data", "digits", "--device", "cpu", "--json")
    assert json.loads(read.stdout)["accuracy"] == pytest.approx(result["after"]["accuracy"])
    again = call("compress", small, "--data", "digits", "-o", tmp_path / "smaller")
    assert again.exit_code == 2
    assert "found none" in again.stderr


def test_fine_tuned_by_another_rule(bundle, tmp_path):
    arguments = [
        "--data",
        "digits",
        "--epochs",
        3,
        "--device",
        "cpu",
        "--rule",
        "auglocal",
        "--rule-set",
        "aux_depth=0",
    ]
    done = call("compress", bundle, "--method", "biper", "-o", tmp_path / "local", *arguments)
    assert done.exit_code == 0, done.output
    backprop = call("compress", bundle, "--method", "biper", "-o", tmp_path / "whole", *arguments[:6])
    assert backprop.exit_code == 0
    record = json.loads((tmp_path / "local" / "bundle.json").read_text())["training"]["compressed"]
    assert (record["rule"], record["rule_settings"]) == ("auglocal", {"aux_depth": 0})
    local, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("local", "whole"))
    assert local.keys() == whole.keys()
    assert any(not local[name].equal(whole[name]) for name in local)
    refused = call("compress", bundle, "--method", "ftwt", "-o", tmp_path / "no", *arguments)
    assert refused.exit_code == 2
    assert "trains by a rule of its own" in refused.stderr


def test_your_own_network_from_a_file_of_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("compressnet.py").write_text(MYNET)
    done = call("train", "--model", "compressnet:make", "--data", "digits", "--epochs", 1, "-o", "net")
    assert done.exit_code == 0, done.output
    done = call(
        "compress", "--model", "compressnet:make", "--weights", "net/model.safetensors", "--data", "digits",
        "--set", "binary_input=true", "--set", "frequency=10", "--epochs", 2, "-o", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "binary operations" in done.stdout
    refused = call("eval", "small", "--data", "digits")
    assert refused.exit_code == 2
    assert "--allow compressnet:make" in refused.stderr
    assert call("eval", "small", "--data", "digits", "--allow", "compressnet:make").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "either the folder of a bundle"),
        (["net", "--data", "digits", "--model", "mlp"], "either the folder of a bundle"),
        (["net", "--data", "digits", "--method", "auglocal"], "these are: biper"),
        (["net", "--data", "digits", "--method", "bipre"], "did you mean biper"),
        (["net", "--data", "digits", "--set", "nosuch=1"], "no setting 'nosuch'"),
        (["net", "--data", "wine"], "inputs of shape"),
        (["nowhere", "--data", "digits"], "no bundle"),
        (["--model", "mlp", "--weights", "nowhere.safetensors", "--data", "digits"], "no file"),
        (["--model", "mlp", "--weights", "net/model.safetensors", "--data", "digits"], "do not fit"),
    ],
)
def test_errors_are_one_sentence(bundle, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(bundle.parent)
    done = call("compress", *arguments, "-o", tmp_path / "small")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output
    assert not (tmp_path / "small").exists()


def test_methods_are_compared_in_one_table(bundle, tmp_path):
    place = tmp_path / "small"
    done = call("compress", bundle, "--method", "biper,double_rounding", "--data", "digits",
                "--epochs", 3, "-o", place, "--device", "cpu", "--set", "double_rounding.bits=(8,4)", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert list(result["networks"]) == ["before", "biper", "double_rounding"]
    assert result["networks"]["biper"]["bytes"] < result["networks"]["before"]["bytes"]
    assert sorted(p.name for p in place.iterdir()) == ["biper", "compared.csv", "compared.html", "double_rounding"]
    for name in ("biper", "double_rounding"):
        read = json.loads(call("eval", place / name, "--data", "digits", "--device", "cpu", "--json").stdout)
        assert read["accuracy"] == pytest.approx(result["networks"][name]["accuracy"])


def test_a_method_that_cannot_do_it_costs_its_own_row(tmp_path):
    call("train", "--model", "mlp", "--data", "digits", "--epochs", 1, "-o", tmp_path / "net")
    done = call("compress", tmp_path / "net", "--method", "biper,double_rounding", "--data", "digits", "--epochs", 1,
                "-o", tmp_path / "small")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "biper cannot do it" in done.stderr
    assert "double_rounding" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("biper,biper",), "every method once"), (("biper,double_rounding", "--set", "frequency=3"), "biper.key=value")],
)
def test_several_methods_are_named_once_and_set_by_name(arguments, message, bundle, tmp_path):
    done = call("compress", bundle, "--method", *arguments, "--data", "digits", "-o", tmp_path / "small")
    assert done.exit_code == 2
    assert message in done.stderr
