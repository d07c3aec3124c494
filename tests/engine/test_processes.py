"""Training that is killed, told to leave, or run by several processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from torchfolio.engine.checkpoint import checkpoints

WORKER = Path(__file__).with_name("worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(WORKER), *map(str, arguments)]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, env=ENVIRONMENT, timeout=240, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == ""


def steps(folder: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in checkpoints(folder)]


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", ["tensors", "loader", "generator", "workers"])
def test_killed_training_resumes_to_the_same_bits(kind, tmp_path):
    run(command("train", kind, "none", tmp_path / "whole.pt", 0))
    folder = tmp_path / "checkpoints"
    process = subprocess.Popen(command("train", kind, folder, tmp_path / "resumed.pt", 0.05), env=ENVIRONMENT)
    wanted = random.randrange(3, 25)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and max(steps(folder), default=0) < wanted:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "resumed.pt").exists()
    assert 0 < max(steps(folder)) < 32
    run(command("train", kind, folder, tmp_path / "resumed.pt", 0))
    whole, resumed = load(tmp_path / "whole.pt"), load(tmp_path / "resumed.pt")
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not differing, f"killed after step {max(steps(folder))}"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(number, code, tmp_path):
    folder = tmp_path / "checkpoints"
    arguments = command("train", "tensors", folder, tmp_path / "out.pt", 0.15)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not checkpoints(folder):
        time.sleep(0.005)
    time.sleep(0.2)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code if code else "KeyboardInterrupt" in error
    assert any(step % 3 for step in steps(folder))
    run(command("train", "tensors", "none", tmp_path / "whole.pt", 0))
    run(command("train", "tensors", folder, tmp_path / "out.pt", 0))
    whole, resumed = load(tmp_path / "whole.pt"), load(tmp_path / "out.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def torchrun(*arguments: object) -> list[str]:
    # A rendezvous on a free port of its own.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launcher, str(WORKER), *map(str, arguments)]


@pytest.mark.parametrize("kind", ["once", "many", "loader"])
def test_two_processes_train_as_one(kind, tmp_path):
    run(command("several", kind, tmp_path / "one.pt"))
    run(torchrun("several", kind, tmp_path / "two.pt"))
    one, two = load(tmp_path / "one.pt"), load(tmp_path / "two.pt")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_sharded_processes_train_as_one(tmp_path):
    run(command("sharded", tmp_path / "one.pt"))
    run(torchrun("sharded", tmp_path / "two.pt"))
    one, two = load(tmp_path / "one.pt"), load(tmp_path / "two.pt")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


def test_processes_stop_together(tmp_path):
    run(torchrun("stop", tmp_path / "out"))
    first, second = load(tmp_path / "out0")["steps"], load(tmp_path / "out1")["steps"]
    assert first == second
    assert 5 <= first <= 21
    assert steps(Path(f"{tmp_path}/out.checkpoints"))[-1] == first
