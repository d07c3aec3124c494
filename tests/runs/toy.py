"""A toy experiment: two arms whose results are known."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch


@dataclass(frozen=True)
class Settings:
    gain: float = 1.0
    steps: int = 3
    widths: tuple[int, ...] = (1, 2)
    name: str | None = None
    loud: bool = False
    log: str = ""


CLAIMS = {"better": "ours >= base + 0.5", "paired": "abs(measured - 1) < 1e-6", "exact": "measured == 1"}

SCALES = {"smoke": Settings(), "quick": Settings(steps=5)}


def _arm(run, name: str, offset: float) -> dict[str, object]:
    if run.settings.log:
        with Path(run.settings.log).open("a") as file:
            file.write(f"{run.seed} {name}\n")
    if name == "ours" and os.environ.get("TOY_DIES_IN") == "ours":
        os.kill(os.getpid(), 9)
    if name == "ours" and os.environ.get("TOY_DIES_IN") == "a worker" and parent_process() is not None:
        os.kill(os.getpid(), 9)
    if name == "ours" and run.settings.name == "endless":
        time.sleep(1000)
    if run.settings.name in ("broken", f"broken at {run.seed}"):
        raise RuntimeError("the toy is broken")
    noise = torch.rand(1).item() + random.random() + float(np.random.rand())
    return {"accuracy": offset + run.settings.gain * noise, "curve": np.arange(3.0) + offset, "text": name}


def run(run) -> None:
    base = run.arm("base", _arm, run, "base", 0.0)
    ours = run.arm("ours", lambda: _arm(run, "ours", 1.0))
    run.record(step=1, loss=0.5)
    run.values("better", {"ours": ours["accuracy"], "base": base["accuracy"]})
    run.values("paired", ours["accuracy"] - base["accuracy"])
    run.values("exact", float(run.seed != 7))
    fig, ax = plt.subplots()
    ax.plot(ours["curve"])
    run.figure("curve", fig, "a curve")


def figures(results):
    fig, ax = plt.subplots()
    ax.plot(results.values("ours", "curve").mean(0))
    return {"mean curve": fig}
