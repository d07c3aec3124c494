"""The audit command: a network goes in, a filter and a guarded verdict come out; the filter judges images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from torchfolio.backdoor import AllToOne, PatchTrigger, poison
from torchfolio.backdoor.detectors import InputDetector, ModelDetector, ModelVerdict
from torchfolio.backdoor.zoo import SmallConvNet, fit_classifier
from torchfolio.bundle import Manifest, save_bundle
from torchfolio.cli import app
from torchfolio.data import load

QUICK = ["--set", "unlearn_batch=32", "--set", "unlearn_lr=1e-3", "--set", "finetune_epochs=4", "--set", "fpr=0.02"]
NET = """
from torchfolio.backdoor.detectors import InputDetector, ModelDetector, ModelVerdict
from torchfolio.backdoor.zoo import SmallConvNet
def make():
    return SmallConvNet(1, 10, width=8)
"""


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def trained(rate: float, seed: int = 0) -> nn.Module:
    digits = load("digits", normalize=False)
    torch.manual_seed(seed)
    net = SmallConvNet(1, 10, width=8)
    data = poison(digits.train.tensors, trigger(), AllToOne(0, 10), rate=rate, seed=seed)
    fit_classifier(net, data, epochs=5, lr=0.1, seed=seed)
    return net


def trigger() -> PatchTrigger:
    return PatchTrigger.checkerboard((1, 8, 8), size=2, margin=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A backdoored bundle, a clean one, a filter for the first, and images with and without the trigger."""
    home = tmp_path_factory.mktemp("audit")
    manifest = Manifest("torchfolio.backdoor.zoo:SmallConvNet", {"in_ch": 1, "num_classes": 10, "width": 8}, (1, 8, 8),
                        tuple(map(str, range(10))))  # fmt: skip
    save_bundle(trained(0.1), home / "net", manifest)
    save_bundle(trained(0.0), home / "clean", manifest)
    x = load("digits", normalize=False).test.tensors[0]
    for name, images in (("plain", x[:30]), ("bad", trigger()(x[:30]))):
        (home / name).mkdir()
        for k, image in enumerate(images):
            Image.fromarray((image[0] * 255).round().numpy().astype(np.uint8)).save(home / name / f"{k:02}.png")
    done = call("audit", home / "net", "--data", "digits", "-o", home / "filter", "--device", "cpu", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    (home / "report.json").write_text(done.stdout)
    return home


def test_the_report_says_what_is_known_and_no_more(folders):
    report = json.loads((folders / "report.json").read_text())
    assert "cannot be told from clean examples alone" in report["sentences"][0]
    share = report["false_positives"]
    assert 0 < share["low"] < share["expected"] < share["high"] < 0.1
    assert any("the expert believes most in class" in sentence for sentence in report["sentences"])
    assert report["figures"]["accuracy of the network"] > 0.9
    page = (folders / "filter" / "index.html").read_text()
    assert "cannot be told" in page
    assert page.count("data:image/svg+xml;base64,") == 3
    names = sorted(p.name for p in (folders / "filter").rglob("*") if p.is_file())
    assert names == ["audit.json", "bundle.json", "detector.json", "detector.safetensors", "index.html", "model.safetensors"]  # fmt: skip


def test_images_are_judged(folders):
    bad = call("audit", folders / "filter", "--input", folders / "bad", "--json")
    assert bad.exit_code == 1, bad.output
    bad, plain = json.loads(bad.stdout), call("audit", folders / "filter", "--input", folders / "plain", "--json")
    assert bad["chance_if_clean"] < 0.01
    plain = json.loads(plain.stdout)
    assert plain["suspicious"] < bad["suspicious"] / 2
    passes = next(row["input"] for row in plain["inputs"] if not row["suspicious"])
    one = call("audit", folders / "filter", "--input", passes)
    assert one.exit_code == 0, one.output
    assert "0 of 1 inputs are suspicious" in one.stdout
    caught = next(row["input"] for row in bad["inputs"] if row["suspicious"])
    assert call("audit", folders / "filter", "--input", caught).exit_code == 1


def test_references_allow_a_verdict(folders, tmp_path):
    clean = [a for _ in range(2) for a in ("--reference", folders / "clean")]
    few = call(
        "audit", folders / "net", "--data", "digits", "-o", tmp_path / "a", *QUICK, *clean, "--json", "--size", 400
    )
    assert few.exit_code == 0, few.output
    found = json.loads(few.stdout)["network"]
    assert "that takes 19" in found["sentences"][-1]
    assert found["evidence"]["p_value"] in (pytest.approx(1 / 3), pytest.approx(1))
    loose = call("audit", folders / "net", "--data", "digits", "-o", tmp_path / "a", *QUICK, *clean, "--size", 400,
                 "--alpha", 0.34)  # fmt: skip
    assert loose.exit_code == (1 if found["evidence"]["p_value"] < 0.34 else 0)
    assert ("More concentrated" in loose.stdout) == (loose.exit_code == 1)
    # A network is no more concentrated than itself.
    same = call("audit", folders / "clean", "--data", "digits", "-o", tmp_path / "a", *QUICK, *clean, "--size", 400,
                "--alpha", 0.34)  # fmt: skip
    assert same.exit_code == 0, same.output


def test_your_own_network_from_a_file_of_weights(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("auditnet.py").write_text(NET)
    weights = folders / "net" / "model.safetensors"
    done = call("audit", "--model", "auditnet:make", "--weights", weights, "--no-normalize", "--data", "digits", *QUICK,
                "-o", "filter")  # fmt: skip
    assert done.exit_code == 0, done.output
    refused = call("audit", "filter", "--input", folders / "bad")
    assert refused.exit_code == 2
    assert "--allow auditnet:make" in refused.stderr
    assert call("audit", "filter", "--input", folders / "bad", "--allow", "auditnet:make").exit_code == 1


class Distance(InputDetector):
    """A filter with what the base class asks for and nothing else."""

    def _fit(self, model, clean):
        self.mean_ = clean[0].mean(0)

    def _score(self, x):
        return (x - self.mean_.to(x)).flatten(1).norm(dim=1)


class Suspicious(ModelDetector):
    def _scan(self, model, clean, scan):
        return ModelVerdict(True, 2.0, 1.0, ((3, 0),))


def test_any_filter_will_do(folders, tmp_path, monkeypatch):
    only = {"input_detector": Distance}
    monkeypatch.setattr("torchfolio.cli._detectors.offered", lambda slug, kind: only.get(kind))
    done = call("audit", folders / "net", "--data", "digits", "-o", tmp_path / "f", "--set", "fpr=0.05", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["figures"] == {}
    done = call("audit", tmp_path / "f", "--input", folders / "plain", "--json")
    assert done.exit_code in (0, 1), done.output
    assert len(json.loads(done.stdout)["inputs"]) == 30
    done = call("audit", folders / "net", "--data", "digits", "-o", tmp_path / "g", "--reference", folders / "clean")
    assert done.exit_code == 2
    assert "compares no networks" in done.stderr


def test_any_judge_of_networks_will_do(folders, tmp_path, monkeypatch):
    only = {"model_detector": Suspicious}
    monkeypatch.setattr("torchfolio.cli._detectors.offered", lambda slug, kind: only.get(kind))
    done = call("audit", folders / "net", "--data", "digits", "-o", tmp_path / "f", "--json")
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert report["pairs"] == [[3, 0]]
    assert "from class to class: 3 to 0" in report["sentences"][1]
    done = call("audit", tmp_path / "f", "--input", folders / "plain")
    assert done.exit_code == 2
    assert "judges networks" in done.stderr


class Pixels(ModelDetector):
    """Sees images in [0, 1] and a network that normalises them."""

    pixels = True

    def __init__(self, level: float = 0.0) -> None:
        self.level = level

    def _scan(self, model, clean, scan):
        assert clean is not None
        assert float(clean[0].min()) == 0
        assert float(clean[0].max()) == 1
        assert float((model(clean[0]).argmax(1) == clean[1]).float().mean()) > 0.9
        return ModelVerdict(self.level > 0, self.level, 0.5, ((1, 0), (2, 0)))


def test_several_methods_give_one_verdict(folders, tmp_path, monkeypatch):
    offers = {
        "one": {"model_detector": Suspicious},
        "two": {"model_detector": Pixels},
        "filter": {"input_detector": Distance},
    }
    monkeypatch.setattr("torchfolio.cli._detectors.offered", lambda slug, kind: offers[slug].get(kind))
    arguments = ["audit", folders / "net", "--data", "digits", "-o", tmp_path / "f", "--set", "fpr=0.05", "--detector"]
    done = call(*arguments, "one, two,filter", "--set", "level=1.5", "--json")
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert "2 of 2 methods" in report["together"]
    assert "agree on the target 0" in report["together"]
    assert report["networks"]["two"]["score"] == 1.5
    done = call(*arguments, "one,two,filter", "--set", "two.level=0.7", "--json")
    assert json.loads(done.stdout)["networks"]["two"]["score"] == 0.7
    assert report["detector"] == "filter"
    assert call("audit", tmp_path / "f", "--input", folders / "plain").exit_code in (0, 1)
    page = (tmp_path / "f" / "index.html").read_text()
    assert page.count('<article class="card"') == 4
    done = call(*arguments, "two,filter")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("No method finds a backdoor in the network (two); that is no proof")
    assert "two: The network is not suspicious" in done.stdout
    for given, message in {
        "two,two": "every method once",
        "one,two": "has a setting 'fpr'",
    }.items():
        refused = call(*arguments, given)
        assert refused.exit_code == 2
        assert message in " ".join(refused.stderr.replace("│", " ").split())


class Refusing(ModelDetector):
    def _scan(self, model, clean, scan):
        raise ValueError("expected images, got sounds")


class RefusingFilter(Distance):
    def _fit(self, model, clean):
        raise ValueError("expected a sea, got a pond")


def test_a_method_that_refuses_costs_no_other_its_verdict(folders, tmp_path, monkeypatch):
    offers = {
        "one": {"model_detector": Suspicious},
        "no": {"model_detector": Refusing},
        "never": {"input_detector": RefusingFilter},
        "filter": {"input_detector": Distance},
    }
    monkeypatch.setattr("torchfolio.cli._detectors.offered", lambda slug, kind: offers[slug].get(kind))
    arguments = ["audit", folders / "net", "--data", "digits", "-o", tmp_path / "f", "--json", "--detector"]
    done = call(*arguments, "one,no,filter")
    assert done.exit_code == 1, done.output
    report = json.loads(done.stdout)
    assert report["failed"] == {"no": "expected images, got sounds"}
    assert report["detector"] == "filter"
    assert list(report["networks"]) == ["one"]
    assert "no cannot do it: expected images, got sounds" in done.stderr
    assert "no cannot do it: expected images, got sounds" in (tmp_path / "f" / "index.html").read_text()
    assert call("audit", tmp_path / "f", "--input", folders / "plain").exit_code in (0, 1)
    done = call(*arguments, "never,one")
    assert done.exit_code == 1, done.output
    assert json.loads(done.stdout)["failed"] == {"never": "expected a sea, got a pond"}
    assert call("audit", tmp_path / "f", "--input", folders / "plain").exit_code == 2  # there is no filter
    done = call(*arguments, "no,never")
    assert done.exit_code == 2
    assert "none of no, never can judge this network" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["net", "--data", "digits", "--reference", "nowhere"], "nowhere"),
        (["net", "--data", "digits", "--budget", "0"], "above 0"),
        (["net"], "either --data"),
        (["net", "--data", "digits", "--input", "bad"], "either --data"),
        (["--data", "digits"], "either the folder of a bundle"),
        (["net", "--data", "wine"], "inputs of shape"),
        (["net", "--data", "digits", "--set", "nosuch=1"], "no setting 'nosuch'"),
        (["net", "--data", "digits", "--detector", "badexprt"], "did you mean badexpert"),
        (["net", "--data", "digits", "--detector", "biper"], "is not a detector"),
        (["net", "--data", "digits", "-o", "bad"], "is no audit"),
        (["net", "--data", "digits", "--alpha", "2"], "between 0 and 1"),
        (["filter", "--data", "digits"], "is a filter already"),
        (["net", "--input", "bad"], "is no filter"),
        (["filter", "--input", "nowhere"], "no file or folder"),
        (["filter", "--input", "net"], "no images"),
        (["--input", "bad"], "the folder of a filter"),
    ],
)
def test_errors_are_one_sentence(folders, monkeypatch, arguments, message):
    monkeypatch.chdir(folders)
    done = call("audit", *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.output
    assert not Path("audit").exists()
