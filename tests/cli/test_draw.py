"""The draw command: a bundle or a factory goes in, a drawing comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchfolio.cli import app
from torchfolio.diagrams import check_svg

MYNET = """
import torch
from torch import nn
class Branch(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(9, 4), nn.Linear(6, 4)
    def forward(self, ids, x):
        return self.embed(ids) + self.linear(x)
"""


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks") / "net"
    done = call("train", "--model", "mlp", "--data", "digits", "--train-size", 64, "--epochs", 1, "-o", folder)
    assert done.exit_code == 0, done.output
    return folder


def test_a_bundle_as_svg(bundle, tmp_path):
    done = call("draw", bundle, "-o", tmp_path / "net.svg", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["signature"] == "b h w -> b n2"  # an axis of one channel has no wire
    svg = (tmp_path / "net.svg").read_text()
    check = check_svg(svg)
    assert check.counts_agree
    assert not check.overlaps
    assert len(check.columns) == result["columns"] + 1
    again = call("draw", bundle, "-o", tmp_path / "again.svg")
    assert again.exit_code == 0
    assert (tmp_path / "again.svg").read_text() == svg


def test_a_bundle_as_text_and_as_json(bundle, tmp_path):
    done = call("draw", bundle)
    assert done.exit_code == 0, done.output
    assert "┤ L₊ ├" in done.stdout or "┤L₊ ├" in done.stdout
    assert "R" in done.stdout
    call("draw", bundle, "-o", tmp_path / "net.txt")
    assert (tmp_path / "net.txt").read_text() == done.stdout
    read = json.loads(call("draw", bundle, "--json").stdout)
    kinds = [o["kind"] for column in read["diagram"]["operations"] for o in column]
    assert kinds == ["reshape", "linear", "elementwise", "linear"]


def test_a_raster_with_names(bundle, tmp_path):
    pytest.importorskip("resvg_py")
    done = call("draw", bundle, "--names", "batch c h w", "-o", tmp_path / "net.png")
    assert done.exit_code == 0, done.output
    assert "batch h w -> batch n2" in done.stdout
    assert (tmp_path / "net.png").read_bytes().startswith(b"\x89PNG")


def test_reference_networks_as_blocks():
    done = call("draw", "--model", "resnet20", "--input-shape", "3,16,16", "--level", "blocks", "--json")
    assert done.exit_code == 0, done.output
    boxes = [o for column in json.loads(done.stdout)["diagram"]["operations"] for o in column]
    assert [o["kind"] for o in boxes] == ["block"] * 9
    assert [o["times"] for o in boxes] == [1, 3, *[1] * 7]  # the blocks of the first stage are built alike


def test_python_pdf_and_the_backward_pass(bundle, tmp_path):
    import torch

    from torchfolio.bundle import load_bundle

    call("draw", bundle, "--vary", "b", "-o", tmp_path / "net.py")
    space: dict = {}
    exec((tmp_path / "net.py").read_text(), space)
    net, x = load_bundle(bundle).model.eval(), torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(space["diagram"](x, weights=net.state_dict()), net(x))
    done = call("draw", bundle, "--backward", "--hide-batch", "-o", tmp_path / "net.pdf", "--json")
    assert done.exit_code == 0, done.output
    assert "-> " in json.loads(done.stdout)["signature"]
    assert (tmp_path / "net.pdf").read_bytes().startswith(b"%PDF")


def test_your_own_network_of_two_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("drawnet.py").write_text(MYNET)
    done = call("draw", "--model", "drawnet:Pair", "--input-shape", "5:int", "--input-shape", "5,6", "--json")
    assert done.exit_code == 0, done.output
    kinds = [o["kind"] for column in json.loads(done.stdout)["diagram"]["operations"] for o in column]
    assert sorted(kinds) == ["binary", "embedding", "linear"]
    branch = call("draw", "--model", "drawnet:Branch", "--input-shape", "5")
    assert branch.exit_code == 2
    assert "control flow that depends on values" in branch.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either the folder of a bundle or --model, got neither"),
        (["net", "--model", "mlp"], "got both"),
        (["net", "-o", "net.jpg"], "expected one of .svg, .pdf, .png, .txt, .py"),
        (["net", "-o", "nowhere/net.svg"], "there is no folder nowhere"),
        (["net", "--level", "half"], "expected auto, full, blocks"),
        (["net", "--names", "b c"], "the input has 4 with the batch"),
        (["net", "--names", "b c h w", "--names", "b"], "once for each of 1 inputs"),
        (["nowhere"], "no bundle"),
        (["--model", "mlp"], "--input-shape"),
        (["--model", "mlp", "--input-shape", "8,x"], "expected a shape such as 3,32,32"),
        (["--model", "nosuch", "--input-shape", "8"], "no reference network"),
    ],
)
def test_errors_are_one_sentence(bundle, monkeypatch, arguments, message):
    monkeypatch.chdir(bundle.parent)
    done = call("draw", *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output
