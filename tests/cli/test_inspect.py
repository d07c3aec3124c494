"""`inspect`: tables, pictures and verdicts of one network and of two, in a page."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
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
    assert all(0 <= row["bins_chance"] <= row["bins_i_xt"] for row in result["information"])
    text = page.read_text()
    assert "inside net0" in text
    titles = ["What does net0 cost?", "How net0 was trained", "Was it at the edge of stability?", "Which examples does it get",
              "How do its boundaries lean?", "Does it mirror its inputs", "How far can its", "What do the layers of net0"]  # fmt: skip
    assert all(title in text for title in titles)
    assert "Train again with --record" in text
    assert result["training"]["sharpness"]["last"] > 0
    assert len(result["losses"]["worst"]) == 12
    assert result["size"]["ratio"] == pytest.approx(sum(row["parameters"] for row in result["layers"]) / (1294 * 10))
    assert not result["size"]["fitted"]
    assert result["panels"]["boundary_tilting"]["pairs"]
    assert "saturated in every layer" in text
    assert "Information plane by adaptive bins" not in text, "a plane of saturated estimates is not drawn"
    assert "<script" not in text


def test_two_networks(networks, tmp_path):
    page = tmp_path / "report.html"
    done = call(
        *("inspect", networks / "net0", networks / "net1", "--data", "digits", "--examples", 200, "--layer", "layer1"),
        *("-o", page, "--json"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert 0 < result["similarity"]["alignment"][0][0] < 1
    (row,) = result["matching"]
    assert 0 < row["bipartite"] <= row["semi"] <= 1
    assert page.read_text().count("data:image/svg+xml") >= 3
    same = call(
        "inspect", networks / "net0", networks / "net0", "--data", "digits", "--layer", "layer1", "-o", page, "--json"
    )
    assert json.loads(same.stdout)["matching"][0]["bipartite"] == pytest.approx(1)
    assert json.loads(same.stdout)["similarity"]["alignment"] == [[pytest.approx(1)]]
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


def test_a_training_that_was_recorded(networks, tmp_path):
    chosen = ("train", "--model", "convnet", "--model-set", "widths=[4,6]", "--data", "digits", "--epochs", "1")
    done = call(*chosen, "--record", "-o", tmp_path / "net")
    assert done.exit_code == 0, done.output
    weights = [(f / "model.safetensors").read_bytes() for f in (tmp_path / "net", networks / "net0")]
    assert weights[0] == weights[1], "recording leaves the training as it was"
    page = tmp_path / "r.html"
    done = call("inspect", tmp_path / "net", "--data", "digits", "--examples", 100, "-o", page, "--json")
    assert done.exit_code == 0, done.output
    training = json.loads(done.stdout)["training"]
    assert len(training["sharpness"]["sharpness"]) == len(training["sharpness"]["limit"]) >= 4
    assert len(training["groups"]["positive"]) == 10
    assert "Above those whose loss rose most" in page.read_text()
    (tmp_path / "net" / "training_record.json").write_text('{"steps": "run"}')
    done = call("inspect", tmp_path / "net", "--data", "digits", "-o", page)
    assert done.exit_code == 2
    assert "cannot be read" in " ".join(done.output.split())


def test_regression_is_inspected(tmp_path):
    net, page = tmp_path / "net", tmp_path / "r.html"
    done = call(
        "train", "--model", "mlp", "--data", "diabetes", "--epochs", "1", "--lr", "0.001", "--record", "-o", net
    )
    assert done.exit_code == 0, done.output
    done = call("inspect", net, "--data", "diabetes", "-o", page, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["losses"]["mean"] > 0
    assert result["information"] == []
    assert "What could not be told" in page.read_text()


def test_rows_sum_up_to_the_whole_network(tmp_path):
    from torchfolio.cli._cost_card import cost
    from torchfolio.measure import count_flops

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(8, 4, 16)
    table = cost(net, x, "cpu")["table"]
    assert sum(table["parameters"]) == sum(p.numel() for p in net.parameters())
    assert sum(table["flops"]) == count_flops(net, x[:1])


def test_tables_are_read_from_the_left_where_they_hold_text():
    from torchfolio.report.sheet import Table

    assert Table(("layer", "share"), (("a", 0.5), ("b", None))).kinds == ("text", "number")
