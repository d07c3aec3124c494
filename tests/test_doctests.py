"""The examples in docstrings run: on a small network and data, every training cut to two steps.

An output is compared where the docstring shows one. `SETUP` makes what an example takes for granted.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torchfolio
from torchfolio import catalog, engine, models
from torchfolio.engine import recipes

ROOT = Path(torchfolio.__file__).parent.parent
FILES = sorted(p for p in ROOT.rglob("*.py") if ">>>" in p.read_text())

FAMILIES = ("diagrams", "measure", "data", *sorted({paper.family for paper in catalog.papers().values()}))

SETUP = {
    "AdaMerging": "pretrained, net_a, net_b = (small_mlp() for _ in range(3)); images_a = images_b = x",
    "AMCL": "encoder, images = nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), x",
    "ActivationStatistics": "net, other, batches = layered(), layered(), [x, x + 0.1]",
    "AugLocal": "train = pictures",
    "BaDExpert": "net, clean = trained(), (x, y)",
    "BPTT": "net, train, val, test = spiking(), data, data, data",
    "CLIPGuidedAttack": "encoder, attackers_images = clip(), pictures[0][:8]; x, y = pictures",
    "ConvergenceReport.from_modules": "net, other = layered(), layered()",
    "DHKD": "teacher = small_mlp()",
    "DefenseAwareMerging": "pretrained, net_a, net_b, head_a, head_b = bodies(); images_a = images_b = x",
    "DiffusionODE": "from torchfolio.dynamics.noise_schedules import DiscreteSchedule; net = Denoiser()",
    "FastSlowEstimator": "network, batches, x_new = memory(), [(torch.randn(3, 1), torch.randn(3, 1))], torch.randn(2, 1)",
    "FastSlowMemoryNetwork": "stream = [(torch.randn(1, 1), torch.randn(1, 1))] * 2",
    "FeedbackAlignment": "net, train = spiking(), data",
    "FastSlowTraining": "sine_episodes = lambda n: (torch.randn(8, 20, 1), torch.randn(8, 20, 1))",
    "GradientNoise": "train = data",
    "Guidance": "from torchfolio.training.guidance import GuidedRule; net, guide, train, batches = models.resnet20(), models.resnet20(), pictures, [pictures]; optimizer = torch.optim.SGD(net.parameters(), 0.1)",
    "GuidedRule": "net, guide, train = models.resnet20(), models.resnet20(), pictures",
    "HLOP": "net, tasks = spiking(), [data, data]",
    "HebbianSubspace": "batches, x = [torch.randn(8, 50)] * 2, torch.randn(4, 50)",
    "LinearProbe": "trunks, test = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5)) for _ in range(2)], data",
    "Logits": "AutoModelForSequenceClassification, name = Downloaded, 'name'; input_ids, attention_mask, labels = words()",
    "MAN": "train = pictures",
    "NAB": "make, x_verified, y_verified = trained, x, y",
    "NoisyGradients": "net, train = models.resnet20(), pictures",
    "NoiseMaskPretraining": "from torchfolio.training.snapshots import Snapshots, average_checkpoints; fit, train = epoch, data",
    "NoisePrediction": "x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 3",
    "PairStatistics": "batches, features_a, features_b = [x, x + 0.1], lambda x: x.flatten(1)[:, :5], lambda x: x.flatten(1)[:, 5:9]",
    "PhysicalLocalNet": "x = x.flatten(1)",
    "ReLinearShrink": "net = quadratic(); optimizer = torch.optim.SGD(net.parameters(), 0.1)",
    "RichDistillation": "fresh_network, train, networks = small_mlp(), data, [small_mlp(), small_mlp()]",
    "RichFeatures": "from sklearn.pipeline import make_pipeline; from sklearn.preprocessing import StandardScaler; from sklearn.linear_model import LogisticRegression; trunks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 5))]; X, y = x.flatten(1).numpy(), y.numpy()",
    "SLTT": "vgg11 = partial(models.vgg11, width=0.1); train = val = [t[:4] for t in pictures]; x = train[0]",
    "StepRecorder": "weight_norm = lambda net: sum(p.square().sum() for p in net.parameters()).sqrt()",
    "Snapshots": "fit, train = epoch, data",
    "add_gradient_noise_": "optimizer, loss, step = torch.optim.SGD(net.parameters(), 0.1), net(x).sum(), 0",
    "fit": "x_val, y_val = x, y",
    "fit_many": "x, y = torch.randn(20, 2), torch.arange(20) % 2",
    "gradient_agreement": "net = spiking()",
    "outputs": "x_test = x",
    "relinear_param_groups": "net = quadratic()",
    "take_features": "net = nn.Sequential(); net.block3, net.block6 = nn.Flatten(), nn.Linear(64, 5); similarity = lambda a, b: a.sum()",
    "templatize": "images = pictures[0]; train = pictures",
    "to_module": "x = torch.randn(2, 1, 8, 8)",
    "torchfolio.insight.convergent_learning": "net, other, probe = layered(), layered(), x",
    "torchfolio.insight.circuit_diagrams": "net = models.resnet20(); x = torch.zeros(2, 3, 32, 32)",
    "draw": "net = models.resnet20()",
    "Unrolled": "net = spiking()",
}


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


class Names(dict[str, Any]):
    """Names by name, and where there is none, what a family exports by it."""

    def __missing__(self, name: str) -> Any:
        for family in FAMILIES:
            with contextlib.suppress(AttributeError):
                return getattr(importlib.import_module(f"torchfolio.{family}"), name)
        raise KeyError(name)


def given() -> dict[str, Any]:
    """Names that examples take for granted: a classifier of 8 × 8 digits, its data, the training loop."""
    torch.manual_seed(0)
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    pictures = (torch.rand(8, 3, 32, 32), torch.arange(8) % 10)
    return {
        "torch": torch, "nn": nn, "np": np, "F": nn.functional, "models": models, "torchfolio": torchfolio,
        **{name: getattr(models, name) for name in models.BUILDERS}, **vars(engine), "fit": short_fit,
        "partial": partial, **vars(recipes), "net": small_mlp(), "x": x, "y": y, "data": (x, y), "train": (x, y), "pictures": pictures,
        "small_mlp": small_mlp, "epoch": epoch, "layered": layered, "spiking": spiking, "trained": trained, "bodies": bodies,
        "memory": memory, "quadratic": quadratic, "Denoiser": Denoiser, "clip": clip, "words": words, "Downloaded": Downloaded,
    }  # fmt: skip


def short_fit(*args: Any, **settings: Any) -> engine.FitResult:
    """`fit` as in the example, but for two steps and without a progress bar."""
    cut = {"epochs": None, "max_steps": 2, "progress": False, "batch_size": 8}
    return engine.fit(*args, **(settings | cut))


def epoch(*args: Any, **settings: Any) -> engine.FitResult:
    return engine.fit(*args, **(settings | {"epochs": 1, "progress": False}))


def layered() -> nn.Module:
    net = nn.Sequential(nn.Flatten())
    net.layer1, net.layer2 = nn.Sequential(nn.Linear(64, 12), nn.ReLU()), nn.Sequential(nn.Linear(12, 9), nn.ReLU())
    return net


def spiking() -> nn.Module:
    from torchfolio.spiking import LIF

    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), LIF(), nn.Linear(16, 10))


def trained() -> nn.Module:
    """A classifier that knows some of the digits' labels."""
    net = small_mlp()
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
    engine.fit(net, (x, y), epochs=30, progress=False)
    return net


def bodies() -> tuple[nn.Module, ...]:
    def body() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU())

    return body(), body(), body(), nn.Linear(16, 10), nn.Linear(16, 10)


def memory() -> nn.Module:
    from torchfolio.training.memory_network import FastSlowMemoryNetwork

    return FastSlowMemoryNetwork(nn.Sequential(nn.Linear(1, 40), nn.ReLU()), 1)


def quadratic() -> nn.Module:
    from torchfolio.layers.quadratic import QuadraticLinear

    return nn.Sequential(nn.Flatten(), QuadraticLinear(64, 10))


class Denoiser(nn.Module):
    """Takes noised inputs and times."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.1 * x


class Downloaded:
    """A text classifier of `transformers`, small and with random weights in place of downloaded ones."""

    @staticmethod
    def from_pretrained(name: str) -> nn.Module:
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        return transformers.BertForSequenceClassification(config)


def clip() -> nn.Module:
    from torchfolio.backdoor.image_text import PrototypeEncoder

    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8))
    return PrototypeEncoder(body, torch.randn(10, 8))


def words() -> tuple[torch.Tensor, ...]:
    return torch.randint(9, (6, 5)), torch.ones(6, 5, dtype=torch.long), torch.arange(6) % 2


class Shown(doctest.OutputChecker):
    """Compares an output only where the docstring shows one."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def examples(file: Path) -> tuple[ModuleType, list[doctest.DocTest]]:
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    return module, [test for test in doctest.DocTestFinder().find(module, name) if test.examples]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(ROOT / "torchfolio").with_suffix("")))
def test_examples_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module, tests = examples(file)
    runner = doctest.DocTestRunner(Shown(), verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = io.StringIO()
    for test in tests:
        names = Names({**given(), **vars(module), "fit": short_fit})
        inside = test.name.removeprefix(f"{module.__name__}.")
        exec(SETUP.get(inside, SETUP.get(inside.rpartition(".")[2], "")), names)
        test.globs = names
        with contextlib.redirect_stderr(io.StringIO()):
            runner.run(test, out=report.write)
    assert not runner.failures, report.getvalue()
