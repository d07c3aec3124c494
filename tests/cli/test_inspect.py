"""`inspect`: tables, pictures and verdicts of one network and of two, in a page."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from torchfolio.bundle import load_bundle
from torchfolio.cli import app

runner = CliRunner()


def call(*arguments: object):
    return runner.invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("networks")
    for seed in (0, 1):
        done = call(
            *("train", "--model", "convnet", "--model-set", "widths=[4,6]", "--data", "digits", "--epochs", "1"),
            *("--seed", seed, "-o", folder / f"net{seed}"),
        )
        assert done.exit_code == 0, done.output
    return folder


def test_one_network(networks, tmp_path):
    page = tmp_path / "report.html"
    done = call("inspect", networks / "net0", "--data", "digits", "--examples", 200, "-o", page, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert sum(row["parameters"] for row in result["layers"]) == sum(
        p.numel() for p in load_bundle(networks / "net0").model.parameters()
    )
    assert result["saved_for_backward"] > 0
    layers = [row["layer"] for row in result["information"]]
    assert layers[-1] == "output"
    assert all(0 <= row["bins_i_ty"] <= row["bins_i_xt"] <= 7.65 for row in result["information"])
    text = page.read_text()
    assert "inside net0" in text
    assert text.count("data:image/svg+xml") == 3 + len(
        [p for p in result["panels"].values() if {"layers", "pairs"} & set(p)]
    ), "a plane each, the learning curve, geometry, and boundaries"
    assert result["panels"]["boundary_tilting"]["pairs"]
    assert "saturated in" in text
    assert "<script" not in text


def test_two_networks(networks, tmp_path):
    page = tmp_path / "report.html"
    done = call(
        *("inspect", networks / "net0", networks / "net1", "--data", "digits", "--examples", 200, "--layer", "layer1"),
        *("-o", page, "--json"),
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["matching"]
    assert 0 < row["bipartite"] <= row["semi"] <= 1
    assert page.read_text().count("data:image/svg+xml") >= 3
    same = call(
        "inspect", networks / "net0", networks / "net0", "--data", "digits", "--layer", "layer1", "-o", page, "--json"
    )
    assert json.loads(same.stdout)["matching"][0]["bipartite"] == pytest.approx(1)
    assert "one to one" in call("inspect", networks / "net0", networks / "net1", "--data", "digits", "-o", page).stdout


def test_weights_without_a_bundle(networks, tmp_path):
    weights = tmp_path / "mine.safetensors"
    save_file(load_bundle(networks / "net0").model.state_dict(), weights)
    chosen = ("--model", "convnet", "--model-set", "widths=[4,6]", "--weights", weights, "--data", "digits")
    done = call("inspect", *chosen, "--examples", 100, "-o", tmp_path / "r.html", "--json")
    assert done.exit_code == 0, done.output
    assert "inside mine" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits"], "either the folder of a bundle"),
        (["{net}", "--data", "wine"], "takes inputs of shape"),
        (["{net}", "--data", "digits", "--layer", "nothing"], "no layer"),
        (["{net}", "--data", "digits", "--split", "all"], "expected train, val or test"),
        (["{net}", "--data", "digits", "-o", "no/such/folder/r.html"], "there is no folder"),
        (["{net}", "no/bundle", "--data", "digits"], "no/bundle"),
    ],
)
def test_bad_usage_is_told_in_a_sentence(networks, arguments, message):
    done = call("inspect", *[str(a).replace("{net}", str(networks / "net0")) for a in arguments])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
