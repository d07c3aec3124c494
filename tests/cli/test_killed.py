"""`torchfolio train` and `run`, killed at their writes, go on to what they give when they are left alone."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torchfolio import bundle
from torchfolio.cli import app

TRAIN = ("train", "--model", "mlp", "--data", "digits", "--batch-size", "700", "-o", "net")
RUN = ("run", "representation_geometry", "--scale", "smoke", "--out", "runs")
WRITES = ((os, "replace"), (os, "unlink"), (os, "fsync"), (shutil, "rmtree"), (torch, "save"),
          (bundle.writing, "save_file"), (bundle.writing, "write"))  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")  # processes that are forked have no other


def run(place: Path, *words: str, dies_at: int | None = None) -> int:
    """The command's exit code in a process of its own, which is killed at its `dies_at`-th write: 9."""
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        return -code if code < 0 else code
    calls = itertools.count(1)

    def dying(function):
        def called(*args, **kwargs):
            if next(calls) == dies_at:
                if function is torch.save:
                    Path(args[1]).write_bytes(b"half") if isinstance(args[1], str | Path) else args[1].write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return called

    try:
        os.chdir(place)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        for module, name in WRITES:
            setattr(module, name, dying(getattr(module, name)))
        app(list(words), prog_name="torchfolio")
        os._exit(0)
    except SystemExit as leaving:
        os._exit(leaving.code if isinstance(leaving.code, int) else 1)
    finally:
        os._exit(4)


def weights(place: Path) -> bytes:
    return (place / "net" / "model.safetensors").read_bytes()


def check_kills(tmp_path: Path, epochs: int, every: int) -> int:
    """Kill at each `every`-th write; how many kills there were."""
    whole = tmp_path / "whole"
    whole.mkdir()
    settings = ("--epochs", str(epochs))
    with contextlib.chdir(whole):  # here, so that the processes find imported whatever they need
        assert CliRunner().invoke(app, [*TRAIN, *settings]).exit_code == 0
    for kills, at in enumerate(itertools.count(1, every)):
        place = tmp_path / str(at)
        place.mkdir()
        if run(place, *TRAIN, *settings, dies_at=at) != signal.SIGKILL:
            return kills
        if (place / "net").exists():  # it was tidying up
            assert weights(place) == weights(whole), f"write {at}"
        if (place / "net.training").exists() or not (place / "net").exists():
            assert run(place, *TRAIN, *settings, "--resume", "--force") == 0, f"write {at}"
        assert weights(place) == weights(whole), f"write {at}"
        assert sorted(p.name for p in place.iterdir()) == ["net"], f"write {at}"
        shutil.rmtree(place)
    raise AssertionError


@pytest.mark.slow
def test_killed_at_some_writes(tmp_path):
    assert check_kills(tmp_path, epochs=2, every=4) >= 4


@pytest.mark.long
def test_killed_at_every_write(tmp_path):
    assert check_kills(tmp_path, epochs=5, every=1) >= 30


def claims(place: Path) -> list[object]:
    (outcome,) = place.rglob("outcome.json")
    return [(c["id"], c["holds"], c["values"]) for c in json.loads(outcome.read_text())["claims"]]


def check_killed_runs(tmp_path: Path, every: int) -> int:
    """Kill an experiment at each `every`-th write; how many kills there were."""
    whole = tmp_path / "whole"
    whole.mkdir()
    with contextlib.chdir(whole):
        assert CliRunner().invoke(app, list(RUN)).exit_code in (0, 1)
    for kills, at in enumerate(itertools.count(1, every)):
        place = tmp_path / str(at)
        place.mkdir()
        if run(place, *RUN, dies_at=at) != signal.SIGKILL:
            return kills
        if not list(place.rglob("outcome.json")):
            assert run(place, *RUN, "--resume") in (0, 1), f"write {at}"
        assert claims(place) == claims(whole), f"write {at}"
        shutil.rmtree(place)
    raise AssertionError


@pytest.mark.slow
def test_a_run_killed_at_some_writes(tmp_path):
    assert check_killed_runs(tmp_path, every=5) >= 2


@pytest.mark.long
def test_a_run_killed_at_every_write(tmp_path):
    assert check_killed_runs(tmp_path, every=1) >= 10
