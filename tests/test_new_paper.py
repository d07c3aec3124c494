"""A paper is added by its own files alone: a rule, an estimator and a filter of inputs, in a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torchfolio

TOML = """
title = "{title}"
authors = ["A. Nonymous"]
year = 2025
venue = "Toys 2025"
family = "{family}"
summary = "{title}, for a test."
tags = ["toy"]

[offers]
names = ["{name}"]
{kind} = "{name}"

[[claims]]
id = "runs"
sentence = "It runs."
measured = "One."
holds = "one == 1"
"""

EXPERIMENT = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Settings:
    steps: int = 1

SCALES = {"smoke": Settings(), "quick": Settings()}

def run(run):
    run.values("runs", one=run.arm("one", lambda: {"one": 1.0})["one"])
"""

PEERS = """
def peers(bench):
    bench.compare("nothing", repeats=1, ours=lambda: None, peer=lambda: None)
"""

MODULES = {
    "toy_rule": (
        "training", "rule", "SignBackprop",
        '''
from torchfolio.engine import Backprop

class SignBackprop(Backprop):
    """Backprop whose gradients keep their signs alone."""

    def step(self, batch, backward):
        scalars = super().step(batch, backward)
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.sign_()
        return scalars
''',
    ),
    "toy_estimator": (
        "theory", "estimator", "Majority",
        '''
from sklearn.dummy import DummyClassifier

class Majority(DummyClassifier):
    """The commonest label."""
''',
    ),
    "toy_filter": (
        "backdoor", "input_detector", "Norms",
        '''
from torchfolio.backdoor.detectors import InputDetector

class Norms(InputDetector):
    """Suspects large inputs."""

    def _fit(self, model, clean):
        pass

    def _score(self, x):
        return x.flatten(1).norm(dim=1)
''',
    ),
}  # fmt: skip

CHECK = """
import json
from pathlib import Path
from typer.testing import CliRunner
import torchfolio
from torchfolio.cli import app

assert Path(torchfolio.__file__).is_relative_to(Path.cwd()), torchfolio.__file__

def call(*words, code=0):
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (words, done.output, done.exception)
    return done.output

listed = json.loads(call("list", "--in", "--json"))
assert {"toy_rule", "toy_estimator", "toy_filter"} <= {paper["slug"] for paper in listed}
from torchfolio.backdoor import Norms
from torchfolio.theory import Majority
from torchfolio.training import SignBackprop
assert "Majority" in dir(torchfolio.theory)
assert "Toys" in call("cite", "toy_estimator")
call("run", "toy_estimator", "--scale", "quick", "--seeds", 3, "--out", "runs", "--record", "outcomes")
assert json.loads(Path("outcomes/toy_estimator.json").read_text())["claims"][0]["holds"] is True
assert "peer" in call("bench", "toy_rule")
call("train", "--model", "mlp", "--data", "digits", "--rule", "toy_rule", "--epochs", 1, "--train-size", 200, "--lr", 0.001, "-o", "net")
call("audit", "net", "--detector", "toy_filter", "--data", "digits", "--size", 150, "-o", "audit")
assert (Path("audit") / "detector.json").is_file()
"""


def test_three_kinds(tmp_path):
    source = Path(torchfolio.__file__).parent
    shutil.copytree(source, tmp_path / "torchfolio", ignore=shutil.ignore_patterns("__pycache__"))
    for slug, (family, kind, name, code) in MODULES.items():
        root = tmp_path / "torchfolio"
        (root / "papers" / f"{slug}.toml").write_text(
            TOML.format(title=f"A {slug}", family=family, kind=kind, name=name)
        )
        (root / family / f"{slug}.py").write_text(code)
        (root / "experiments" / f"{slug}.py").write_text(EXPERIMENT)
        (root / "peers" / f"{slug}.py").write_text(PEERS)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
