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

from tests.engine import worker
from torchfolio.engine.checkpoint import checkpoints

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
JOBS = ("once", "many", "loader", "sharded", "stop")


pytestmark = pytest.mark.usefixtures("one_thread")  # sums in the order of the worker's


def command(*arguments: object) -> list[str]:
    return [sys.executable, worker.__file__, *map(str, arguments)]


def steps(folder: Path) -> list[int]:
    return [int(path.stem.split("-")[1]) for path in checkpoints(folder)]


def load(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def check_resumes(kind: str, folder: Path) -> None:
    """Going on from the checkpoints ends where an uninterrupted training does, to the bit."""
    died = max(steps(folder))
    worker.train_and_save(kind, "none", folder / "whole.pt", 0)
    worker.train_and_save(kind, folder, folder / "resumed.pt", 0)
    whole, resumed = load(folder / "whole.pt"), load(folder / "resumed.pt")
    differing = [name for name in whole if not torch.equal(whole[name], resumed[name])]
    assert not differing, f"went on from step {died}"


@pytest.mark.parametrize("kind", ["tensors", "loader", "generator", "workers"])
def test_killed_training_resumes_to_the_same_bits(kind, tmp_path):
    process = subprocess.Popen(command("train", kind, tmp_path, tmp_path / "never.pt", 0.05), env=ENVIRONMENT)
    wanted = random.randrange(3, 16)  # far from the end, in case this process is slow to look
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and max(steps(tmp_path), default=0) < wanted:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "never.pt").exists()
    assert 0 < max(steps(tmp_path)) < 32
    check_resumes(kind, tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, None)])
def test_a_signal_leaves_a_checkpoint_of_the_last_step(number, code, tmp_path):
    arguments = command("train", "tensors", tmp_path, tmp_path / "out.pt", 0.15)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not checkpoints(tmp_path):
        time.sleep(0.005)
    time.sleep(0.2)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == code if code else "KeyboardInterrupt" in error
    assert output == ""
    assert any(step % 3 for step in steps(tmp_path))
    check_resumes("tensors", tmp_path)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes left, by all jobs in one launch."""
    folder = tmp_path_factory.mktemp("two")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [sys.executable, *launcher, worker.__file__, "several", str(folder), *JOBS]
    done = subprocess.run(arguments, env=ENVIRONMENT, timeout=240, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout == ""
    return folder


@pytest.mark.parametrize("job", ["once", "many", "loader", "sharded"])
def test_two_processes_train_as_one(job, two, tmp_path):
    worker.several(job, tmp_path)
    expected, found = load(tmp_path / job), load(two / job)
    for name in expected:
        torch.testing.assert_close(expected[name], found[name], rtol=1e-4, atol=1e-6)


def test_processes_stop_together(two):
    first, second = load(two / "stop0")["steps"], load(two / "stop1")["steps"]
    assert first == second
    assert 5 <= first <= 21
    assert steps(two / "stop.checkpoints")[-1] == first
