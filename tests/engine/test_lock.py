"""Two processes at one folder: the second is told who holds it, and the first is not disturbed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from torchfolio.engine import fit
from torchfolio.engine.lock import LOCK, FolderInUse, exclusive, user_of

HOLD = """
import os, sys, time
from pathlib import Path
from torchfolio.engine.lock import exclusive
with exclusive(Path(sys.argv[1])):
    if os.fork() == 0:  # a worker that outlives its parent, with all that it inherited
        time.sleep(30)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds `tmp_path / "work"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "work")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


DATA = (torch.eye(3), torch.tensor([0, 1, 1]))


def test_the_second_says_who_holds_the_folder(other, tmp_path):
    folder = tmp_path / "work"
    before = (folder / LOCK).read_bytes()
    said = rf"process {other.pid} on {os.uname().nodename} since {time.strftime('%Y-')}"
    with pytest.raises(FolderInUse, match=said):
        fit(net(), DATA, checkpoint=folder, device="cpu")
    assert (folder / LOCK).read_bytes() == before
    assert str(other.pid) in (user_of(folder) or "")
    assert other.poll() is None
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert user_of(folder) is None, "a killed process lets go, though its worker lives"
    fit(net(), DATA, checkpoint=folder, device="cpu")


def test_train_leaves_a_running_one_alone(other, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from torchfolio.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").rename(tmp_path / "net.training")
    arguments = ["train", "--model", "mlp", "--data", "digits", "--epochs", "1", "-o", "net"]
    for more in ([], ["--resume"]):
        done = CliRunner().invoke(app, arguments + more)
        assert done.exit_code == 2
        assert f"in use by process {other.pid}" in done.stderr
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    assert CliRunner().invoke(app, arguments).exit_code == 0, "what was killed before its first checkpoint starts anew"
    assert not (tmp_path / "net.training").exists()


def test_one_thread_may_hold_a_folder_twice_and_two_may_not(tmp_path):
    refused = []

    def second():
        try:
            with exclusive(tmp_path):
                pass
        except FolderInUse as error:
            refused.append(str(error))

    with exclusive(tmp_path), exclusive(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert "another thread" in refused[0]
    second()
    assert len(refused) == 1


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(RuntimeError), exclusive(tmp_path / "new" / "er"):
        raise RuntimeError
    assert not (tmp_path / "new" / "er").exists()
    with exclusive(tmp_path / "kept"):
        (tmp_path / "kept" / "x").touch()
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["x"]


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x"}', '{"pid": 1}', "\x00"])
def test_a_lock_that_says_nothing_still_locks_and_a_stale_one_does_not(content, other, tmp_path):
    folder = tmp_path / "work"
    (folder / LOCK).write_text(content)
    with pytest.raises(FolderInUse, match="another process"), exclusive(folder):
        pass
    stale = tmp_path / "stale"
    stale.mkdir()
    (stale / LOCK).write_text(content)
    with exclusive(stale):
        assert json.loads((stale / LOCK).read_text())["pid"] == os.getpid()
