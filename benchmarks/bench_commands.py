"""Whole commands, imports included: `train` beside a script written by hand, and `run` with one job and with two.

The script trains the same network on the same digits with the same recipe, prints validation figures and writes
safetensors. Processes run in alternation, with one thread each. Run it with

    python benchmarks/bench_commands.py [--rounds 5] [--only train]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from torchfolio.measure import alternate

BY_HAND = """
import sys
import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)
x, y = map(torch.tensor, load_digits(return_X_y=True))
train, val, test = torch.randperm(len(x)).split([1294, 144, 359])
x = x.float() / 16
x = (x - x[train].mean()) / x[train].std()
net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

def accuracy(rows):
    net.eval()
    with torch.no_grad():
        return (net(x[rows]).argmax(1) == y[rows]).float().mean().item()

for epoch in range(3):
    net.train()
    for rows in train[torch.randperm(len(train))].split(128):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
    print(epoch, loss.item(), accuracy(val))
print(accuracy(test))
save_file(net.state_dict(), sys.argv[1])
"""


def call(*arguments: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env=environment)


def train(folder: Path, rounds: int) -> None:
    command = ("-m", "torchfolio", "train", "--model", "mlp", "--data", "digits", "--epochs", "3", "--force")
    print("train a network of 64-128-128-10 on digits, three epochs")
    ours = lambda: call(*command, "-o", str(folder / "net"))  # noqa: E731
    print(alternate(ours=ours, by_hand=lambda: call("-c", BY_HAND, str(folder / "net.safetensors")), repeats=rounds))


def jobs(folder: Path, rounds: int) -> None:
    command = ("-m", "torchfolio", "run", "xor_grokking", "--scale", "smoke", "--seeds", "4", "--out", str(folder))
    print("run an experiment with four seeds of about a second each")
    ours, one = (partial(call, *command, "--jobs", str(n)) for n in (2, 1))
    print(alternate(jobs_2=ours, jobs_1=one, repeats=rounds))


PARTS = {"train": train, "jobs": jobs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, part in PARTS.items():
            if arguments.only in (None, name):
                part(Path(folder), arguments.rounds)


if __name__ == "__main__":
    main()
