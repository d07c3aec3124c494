"""Claims on a user's own network and data."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from torchfolio import catalog, data
from torchfolio.cli import app
from torchfolio.runs.tasks import OwnNetwork, own_network

NETWORK = """
from torch import nn

MADE = []


def make(num_classes, in_channels, image_size):
    MADE.append((num_classes, in_channels, image_size))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(in_channels, 4, 3, 2, 1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)),
    )
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three classes of bright, middling and dark colour pictures, and a file with a network."""
    monkeypatch.setenv("TORCHFOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rng = np.random.default_rng(0)
    for k, name in enumerate("abc"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for n in range(30):
            picture = rng.integers(80 * k, 80 * k + 60, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "photos" / name / f"{n}.png")
    (tmp_path / "ownnet.py").write_text(NETWORK)
    return tmp_path


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


OWN = ("--set", "model=ownnet:make", "--set", "data=photos/")
SIZES = ("--set", "train_size=none", "--set", "val_size=10", "--set", "aux_depth=1", "--set", "epochs=1")


def test_claims_are_measured_on_a_network_of_ones_own(place):
    done = call("run", "auglocal", "--scale", "smoke", *OWN, *SIZES, "--set", "deep=14", "--json", "--out", "runs")
    assert done.exit_code == 0, done.output
    (outcome,) = json.loads(done.stdout)
    assert outcome["settings"]["model"] == "ownnet:make"
    assert "--set model=ownnet:make" in outcome["command"]
    made = importlib.import_module("ownnet").MADE
    assert set(made) == {(3, 3, 8)}
    assert len(made) >= 5, "an arm each"
    values = {c["id"]: c["values"] for c in outcome["claims"]}
    assert values["memory"]["ratio"]["mean"] > 0


@pytest.mark.parametrize(
    ("slug", "own", "sentence"),
    [
        ("auglocal", ("--set", "model=ownnet:nothing"), "cannot import ownnet:nothing"),
        ("auglocal", ("--set", "model=nonet"), "nonet"),
        ("quadratic", OWN, "there is no setting 'model'"),
        ("xor_grokking", OWN, "there is no setting 'model'"),
    ],
)
def test_networks_that_cannot_be_measured_are_told_at_once(place, slug, own, sentence):
    done = call("run", slug, "--scale", "smoke", *own, "--out", "runs")
    assert done.exit_code == 2, done.output
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert not list(place.glob("runs/*/*/seed-*"))


def test_the_own_network_stands_in_for_the_experiments(place):
    splits = data.load("photos/")
    net = own_network(OwnNetwork("ownnet:make"), splits, lambda: pytest.fail("not asked for"))
    assert net(splits.test.tensors[0]).shape[1] == 3
    plain = nn.Linear(1, 1)
    assert own_network(OwnNetwork(), splits, lambda: plain) is plain


def test_experiments_that_take_a_network_ask_for_it():
    for slug, paper in catalog.papers().items():
        if paper.is_in:
            module = importlib.import_module(f"torchfolio.experiments.{slug}")
            settings = module.SCALES["quick"]
            assert hasattr(settings, "model") == isinstance(settings, OwnNetwork), slug
