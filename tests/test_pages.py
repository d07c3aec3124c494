"""Every command and every piece of Python that a page shows runs: as it stands, but for less data and fewer epochs."""

from __future__ import annotations

import copy
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_model
from torch import nn
from typer.testing import CliRunner

from torchfolio import data, models
from torchfolio.cli import app
from torchfolio.engine import Backprop
from torchfolio.engine.recipes import sgd
from torchfolio.insight.circuit_diagrams import draw
from torchfolio.local import AugLocal

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page].read_text(encoding="utf-8"), re.S | re.M)


def commands(page: str) -> list[list[str]]:
    """Calls of torchfolio in the shell blocks of a page, and in the templates and sentences of the others none."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("torchfolio ")]


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_have_the_arguments_that_they_show(page):
    group = typer.main.get_command(app)
    for command in commands(page):
        called = group.commands[command[0]]
        called.make_context(command[0], [a for a in command[1:] if a != "…"])  # raises on what it does not know


# Commands that other tests run, or that cannot run here.
ELSEWHERE = {
    "run --all": "make smoke",
    "--jobs 2": "tests/runs/test_runs.py",
    "/shared/runs": "tests/runs/test_cluster.py",
    "mypaper": "tests/test_new_paper.py",
    "text-net/": "tests/cli/test_audit.py",
    "mine1/": "tests/cli/test_audit.py",
}
SHORTER = {"--epochs": "1", "--seeds": "1", "--image-size": "16"}
SMALLER = {"train_size=none": "train_size=200", "test_size=none": "test_size=100", "cifar10": "photos/",
           "resnet20": "convnet", "vit": "convnet", "depth=2": "widths=[4,8]"}  # fmt: skip
MORE = {"run": ["--scale", "smoke"], "inspect": ["--examples", "150"]}
NET = """
import torch
from torch import nn
from torchfolio.models import ConvNet
def make(num_classes=4):
    return ConvNet(num_classes, 3, widths=(8, 16, 16))
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
    def forward(self, ids, x):
        return self.embedding(ids) + x
def pair():
    return Pair()
"""


def smaller(command: list[str]) -> list[str]:
    """A command that takes seconds."""
    shown = [SHORTER.get(before, SMALLER.get(a, a)) for before, a in zip(["", *command], command, strict=False)]
    settings = ["--set", "steps=4"] if {"umd", "smoothinv"} & set(shown) else []
    return [*shown, *MORE.get(command[0], []), *settings]


def image_folder(folder: Path, names: list[str], first: int = 0) -> None:
    """Digits in three colours, a subfolder for each class."""
    x, y = data.load("digits", normalize=False).train.tensors
    for label, name in enumerate(names, start=first):
        (folder / name).mkdir(parents=True)
        for k, image in enumerate(x[y == label][:120]):
            pixels = (image[0] * 255).round().numpy().astype(np.uint8)
            Image.fromarray(pixels).convert("RGB").resize((16, 16)).save(folder / name / f"{k:03}.png")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What the pages take for granted: folders of images, a factory with its weights."""
    for k, name in enumerate(("photos", "birds", "boats", "clean")):
        image_folder(tmp_path / name, list("abcd"), first=k if name[0] == "b" else 0)
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    torch.manual_seed(0)
    save_model(models.ConvNet(4, 3, widths=(8, 16, 16)), tmp_path / "mynet.safetensors")
    yield tmp_path
    monkeypatch.delitem(sys.modules, "mynet", raising=False)


def call(command: list[str]) -> None:
    done = CliRunner().invoke(app, command)
    verdicts = (
        (0, 1) if command[0] in ("audit", "run") else (0,)
    )  # 1: a verdict or a claim, which is not the point here
    assert done.exit_code in verdicts, f"torchfolio {shlex.join(command)}\n{done.output}"


def shown_only_here(page: str) -> list[list[str]]:
    return [c for c in commands(page) if not any(known in shlex.join(c) for known in ELSEWHERE)]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README" and shown_only_here(page)])
def test_commands_run(page, desk):
    todo = shown_only_here(page)
    if not any("net/" in c[-1:] for c in todo):
        call(["train", "--model", "convnet", "--data", "photos/", "--epochs", "6", "--batch-size", "16", "-o", "net/"])
    for command in todo:
        call(smaller(command))


IN_PYTHON = [
    page for page in PAGES if blocks(page, "python") and page not in ("README", "combine", "add_a_paper", "devices")
]


@pytest.mark.parametrize("page", IN_PYTHON)
def test_python_runs(page, tmp_path, monkeypatch):
    """Pieces of a page share their names, and what comes before them in a reader's program."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    (tmp_path / "mynet.py").write_text(blocks("train", "python")[0])
    held = before(page)
    for block in blocks(page, "python"):
        if "..." in block:  # an excerpt of what a command prints
            continue
        exec(compile(re.sub(r"\b(epochs|steps)=\d+", r"\1=2", block), f"{page}.md", "exec"), held)


def before(page: str) -> dict[str, object]:
    """Names that a page takes for granted."""
    digits = data.load("digits")
    x, y = (t[:200] for t in digits.train.tensors)
    torch.manual_seed(0)
    net = models.ConvNet(10, 1, widths=(8, 8, 8))
    held: dict[str, object] = {
        "net": net,
        "train": (x, y),
        "val": digits.val,
        "x": x[:8],
        "y": y[:8],
        "torch": torch,
        "nn": nn,
    }
    if page == "train":
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        held |= {"net": plain, "rule": Backprop(), "AugLocal": AugLocal}
    if page == "compress":
        held |= {"small_steps": sgd(0.01)}
    if page == "adapt":
        raw = data.load("digits", normalize=False).train.tensors[0][:200]
        held |= {
            "base": net,
            "net_a": copy.deepcopy(net),
            "net_b": copy.deepcopy(net),
            "inputs_a": raw,
            "inputs_b": raw,
            "x": raw[:8],
        }
    if page == "audit":
        raw = data.load("digits", normalize=False)
        held |= {
            "images": raw.train.tensors[0][:600],
            "labels": raw.train.tensors[1][:600],
            "x": raw.test.tensors[0][:9],
        }
    if page == "inspect":
        held |= {"net": models.MLP(64, 10, hidden=(8, 8)), "x": x, "y": y}
    if page == "draw":
        held |= {"other": draw(net, x[:2])}
        held |= {"q": torch.randn(5, 8, 4), "k": torch.randn(7, 8, 4), "v": torch.randn(7, 8, 4)}
    return held
