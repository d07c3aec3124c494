"""`torchrun` on two machines, as the page on several devices has it: here both are this one."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
TRAIN = """
import sys, torch
from functools import partial
from torch import nn
from torchfolio import data, engine
torch.manual_seed(int(sys.argv[2]))  # weights are broadcast from the first process
net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
sgd = partial(torch.optim.SGD, lr=0.1)
engine.fit(net, data.load("digits").train, optimizer=sgd, epochs=2, seed=0, device="cpu", checkpoint="checkpoints/", progress=False)
torch.save(net.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_nodes_end_where_one_process_does(tmp_path):
    shown = re.search(
        r"^torchrun (--nnodes 2 --nproc-per-node 8 --rdzv-id.*) train.py", PAGE.read_text(encoding="utf-8"), re.M
    )
    assert shown is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = shlex.split(shown[1].replace("per-node 8", "per-node 1").replace("HEAD:29500", f"127.0.0.1:{port}"))
    (tmp_path / "train.py").write_text(TRAIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options, "train.py"]
    nodes = [
        subprocess.Popen(
            [*torchrun, f"node{k}.pt", str(k)], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        for k in (0, 1)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=120)
        assert node.returncode == 0, said
    alone = [sys.executable, "train.py", "alone.pt", "0"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere" / "checkpoints")
    subprocess.run(alone, cwd=tmp_path, env=environment, check=True)
    first, second, one = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("node0", "node1", "alone")
    )
    for name, value in one.items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0)
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
