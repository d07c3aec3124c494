"""What an interpreter and an editor show: representations, `python -m`, types that see wrong arguments."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from torchfolio import catalog, data, engine, models
from torchfolio.backdoor import SmoothInv
from torchfolio.engine import Backprop
from torchfolio.engine.recipes import sgd
from torchfolio.local import MAN, AugLocal
from torchfolio.robustness.attacks import pgd
from torchfolio.shown import Shown
from torchfolio.spiking import SLTT
from torchfolio.training import AuxiliaryDistillation

KINDS = (
    "rule",
    "objective",
    "compression",
    "model_detector",
    "input_detector",
    "merge",
    "adapter",
    "analysis",
    "defence",
)
OFFERED = sorted({(slug, kind) for kind in KINDS for slug in catalog.offering(kind)})


@pytest.mark.parametrize(("slug", "kind"), OFFERED)
def test_offers_show_themselves(slug, kind):
    offer = catalog.offered(slug, kind)
    if not inspect.isclass(offer):
        return
    assert offer.__repr__ is not object.__repr__
    free = [p for p in inspect.signature(offer).parameters.values() if p.default is p.empty and p.name[0] != "*"]
    if not [p for p in free if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]:
        assert repr(offer()).startswith(f"{offer.__name__}(")
        assert " at 0x" not in repr(offer())


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (AugLocal(), "AugLocal()"),
        (AugLocal(aux_depth=1), "AugLocal(aux_depth=1)"),
        (MAN(momentum=0.9), "MAN(host=HostHeads, momentum=0.9)"),
        (Backprop(), "Backprop()"),
        (Backprop(nn.functional.mse_loss), "Backprop(loss=mse_loss)"),
        (Backprop(nn.CrossEntropyLoss()), "Backprop(loss=CrossEntropyLoss)"),
        (SLTT(timesteps=4, k=1), "SLTT(loss=SLTTLoss, timesteps=4, k=1)"),
        (AuxiliaryDistillation(nn.Linear(2, 2), alpha=0.5), "AuxiliaryDistillation(teacher=Linear, alpha=0.5"),
    ],
)
def test_settings_that_are_not_the_default_are_shown(made, shown):
    assert repr(made).startswith(shown)


def test_every_public_class_shows_itself():
    from tests.test_reference import load_hooks

    bare = set()
    for full in load_hooks().public_names():
        module, _, name = full.rpartition(".")
        made = getattr(importlib.import_module(module), name)
        if not inspect.isclass(made) or getattr(made, "_is_protocol", False):
            continue
        if made.__repr__ is object.__repr__ and not issubclass(made, torch.autograd.Function):
            bare.add(full)
    assert not bare, "inherit torchfolio.shown.Shown"


def test_results_show_shapes_and_not_numbers():
    net, digits = models.MLP(64, 10), data.load("digits", normalize=False)
    x, y = (t[:8] for t in digits.test.tensors)
    found = pgd(net, x, y, eps=0.1, alpha=0.1, steps=1)
    assert repr(found) == "Attack(x_adv=tensor [8, 1, 8, 8], success=tensor [8], loss=tensor [8])"
    verdict = SmoothInv(sigma=0.1, steps=1, n=2).scan(net, digits.test.tensors[0][:60])
    assert repr(verdict).startswith("SmoothVerdict(is_backdoored=")
    assert len(repr(verdict)) < 400


def test_values_of_all_kinds():
    class Odd(Shown):
        def __init__(self, a=1, b=(1, 2), c=None, d=None, e="x", *rest, **more):
            self.a, self.b, self._c, self.d, self.e = a, b, c, d, e

    assert repr(Odd()) == "Odd()"
    assert repr(Odd(b=[1, 2])) == "Odd()"
    odd = Odd(torch.zeros(2, 3), (torch.tensor(1.5),), object(), "y" * 99)
    assert repr(odd) == "Odd(a=tensor [2, 3], b=(1.5,), c=object, d=str)"
    assert "0x" not in repr(Odd(a=sgd(0.1)))


def test_results_show_themselves():
    digits = data.load("digits")
    assert repr(digits).startswith("DataSplits(digits: 1294 train")
    result = engine.fit(models.MLP(64, 10), digits.train, val=digits.val, epochs=2, progress=False)
    assert repr(result).startswith("FitResult(MLP by Backprop(): 2 epochs, 22 steps, loss ")
    assert "val_accuracy" in repr(result)
    assert repr(result.history).startswith("History(2 epochs: step, lr, loss, val_loss")


def test_python_m_torchfolio():
    done = subprocess.run([sys.executable, "-m", "torchfolio", "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("torchfolio ")


RIGHT = """
from functools import partial
import torch
from torch import nn
from torchfolio import data, engine, models
from torchfolio.bundle import load_bundle, save_bundle
from torchfolio.engine.recipes import one_cycle, sgd
from torchfolio.local import AugLocal
from torchfolio.spiking import SLTT

digits = data.load("digits", image_size=None)
net = models.MLP(64, 10, hidden=(64, 64))
result = engine.fit(net, digits.train, val=digits.val, rule=AugLocal(aux_depth=1), optimizer=sgd(lr=0.1),
                    scheduler=one_cycle(), epochs=3)
scores: dict[str, float] = engine.evaluate(net, digits.test)
save_bundle(net, "net/", example=digits.test.tensors[0])
again: nn.Module = load_bundle("net/").model
rule = SLTT(timesteps=4)
"""
WRONG = {
    "engine.fit(net, digits.train, epoch=3)": "epoch",
    "engine.fit(net, digits.train, rule='auglocal')": "rule",
    "engine.fit(net, digits.train, epochs='3')": "epochs",
    "data.load(3)": "name",
    "AugLocal(depth=2)": "depth",
    "AugLocal(aux_depth='two')": "aux_depth",
    "SLTT(timestep=4)": "timestep",
    "engine.evaluate(net, digits.test, batch_size='all')": "batch_size",
    "save_bundle(net)": "folder",
    "result.histories": "histories",
    "models.MLP(64)": "num_classes",
}


@pytest.mark.slow
def test_an_editor_sees_wrong_arguments(tmp_path):
    pyright = shutil.which("pyright", path=str(__import__("pathlib").Path(sys.executable).parent))
    if pyright is None:
        pytest.skip("pyright is not installed")
    lines = RIGHT.count("\n")
    script = tmp_path / "script.py"
    script.write_text(RIGHT + "\n".join(WRONG) + "\n")
    command = [pyright, "--pythonpath", sys.executable, "--outputjson", str(script)]
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    seen = {e["range"]["start"]["line"]: e["message"] for e in errors}
    assert not [m for line, m in seen.items() if line < lines], "the right half is right"
    missed = [call for k, call in enumerate(WRONG) if lines + k not in seen]
    assert not missed
