"""Measures what a spiking network forgets over tasks of permuted digits, with and without Hebbian subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import sgd
from torchfolio.experiments._principal_rows import captured_variance
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import accuracy
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.hlop import DSR, HLOP, OTTT, FeedbackAlignment, continual_metrics
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.surrogates import Sigmoid

Part = Sequence[Tensor]


@dataclass(frozen=True)
class Settings:
    """Tasks, network and budget."""

    data: str = setting("mnist10k", "images of which every task permutes the pixels in its own way")
    tasks: int = setting(5, "number of them")
    other_tasks: int = setting(3, "number of tasks of the other rules")
    width: int = setting(200, "units of the two hidden layers")
    timesteps: int = setting(4, "number of steps T of backpropagation through time and of traces")
    rate_timesteps: int = setting(10, "number of steps T of spike representations")
    epochs: int = setting(2, "passes over a task")
    other_epochs: int = setting(2, "number of epochs of the other rules")
    batch_size: int = setting(64, "images of a step")
    lr: float = setting(0.1, "learning rate of SGD without momentum")
    sizes: tuple[int, int, int] = setting((80, 70, 50), "lateral rows of the three layers for the first task")
    growth: tuple[int, int, int] = setting((60, 25, 20), "rows for each further task")
    input_lr: float = setting(0.001, "Hebbian rate of the first layer, whose inputs are large")


SCALES = {
    "smoke": Settings(data="digits", tasks=2, other_tasks=2, width=32, epochs=1, sizes=(16, 8, 8), growth=(8, 6, 6)),
    "quick": Settings(),
    "full": Settings(tasks=10, other_tasks=10, width=800, rate_timesteps=20, sizes=(80, 200, 100),
                     growth=(70, 70, 30)),
}  # fmt: skip
LAYERS: tuple[str, ...] = ("1", "3", "5")


class RandomRows(HLOP):
    """Lateral rows that stay as they were drawn."""

    def _learn(self) -> None:
        self._seen = {name: [] for name in self._seen}


def network(n: int, width: int, tau: float = 2.0) -> nn.Module:
    """A spiking multilayer perceptron without biases."""

    def neuron() -> LIF:
        return LIF(tau, surrogate=Sigmoid(), detach_reset=True)

    layers = [nn.Linear(n, width, bias=False), neuron(), nn.Linear(width, width, bias=False), neuron()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10, bias=False))


def protected(settings: Settings, rule: LearningRule, kind: type[HLOP] = HLOP, **options: Any) -> HLOP:
    """A rule with lateral rows of the experiment's sizes."""
    sizes, growth = (dict(zip(LAYERS, rows, strict=True)) for rows in (settings.sizes, settings.growth))
    return kind(rule, sizes=sizes, growth=growth, lr={LAYERS[0]: settings.input_lr}, **options)


def learn(run: Run[Settings], rule: Any, tasks: int, epochs: int, tau: float = 2.0) -> dict[str, Any]:
    """Learn task after task; accuracy (%) on every task so far after each."""
    s = run.settings
    data = run.data(s.data)
    train, test, pixels = data.train.tensors, data.test.tensors, math.prod(data.shape)
    net = network(pixels, s.width, tau).to(run.device)
    generator = run.generator()
    orders = [torch.randperm(pixels, generator=generator) for _ in range(tasks)]

    def permuted(part: Part, k: int) -> Part:
        return part[0].flatten(1)[:, orders[k]], part[1]

    budget = {"epochs": epochs, "batch_size": s.batch_size}
    matrix = torch.full((tasks, tasks), float("nan"))
    for k in run.progress(range(tasks), "tasks"):
        run.fit(net, permuted(train, k), rule=rule, optimizer=sgd(s.lr, momentum=0), progress=False, **budget)
        if isinstance(rule, HLOP) and k + 1 < tasks:
            rule.end_task()
        for j in range(k + 1):
            matrix[k, j] = accuracy(net, permuted(test, j), rule)
    errors = max(rule.orthonormality_error().values()) if isinstance(rule, HLOP) else 0.0
    return {**continual_metrics(matrix), "matrix": matrix.nan_to_num(-1), "orthonormality": errors}


def run(run: Run[Settings]) -> None:
    """The subspace alone; five tasks; other rules on three."""
    s = run.settings
    run.values("subspace", run.arm("subspace", captured_variance, run.seed))

    def bptt() -> BPTT:
        return BPTT(F.cross_entropy, timesteps=s.timesteps)

    def arm(name: str, rule: Any, tasks: int = s.tasks, epochs: int = s.epochs, tau: float = 2.0) -> dict[str, Any]:
        return run.arm(name, learn, run, rule, tasks, epochs, tau)

    hlop, plain = arm("hlop", protected(s, bptt())), arm("sequential", bptt())
    run.values("forgetting", bwt=hlop["bwt"], sequential_bwt=plain["bwt"], acc=hlop["acc"], sequential_acc=plain["acc"])
    drawn = arm("random", protected(s, bptt(), RandomRows))
    run.values("negative_control", random=drawn["bwt"], hlop=hlop["bwt"])
    ottt, dsr = OTTT(F.cross_entropy, timesteps=s.timesteps), DSR(F.cross_entropy, timesteps=s.rate_timesteps)
    others = {
        "traces": arm("traces", protected(s, ottt), s.other_tasks, s.other_epochs),
        "rates": arm("rates", protected(s, dsr), s.other_tasks, s.other_epochs, 20.0),
        "alignment": arm("alignment", protected(s, FeedbackAlignment(bptt())), s.other_tasks, s.other_epochs),
    }
    run.values("other_rules", {name: found["bwt"] for name, found in others.items()})


def figures(results: Results) -> plots.Figures:
    """The accuracy on every task after every task, a mean over seeds."""
    titles = {"hlop": "with lateral rows", "sequential": "without", "random": "rows left at random"}
    means = {title: results.values(arm, "matrix").mean(0) for arm, title in titles.items()}
    tables = {title: np.where(mean < 0, np.nan, mean) for title, mean in means.items()}
    return {"accuracy": plots.matrices(tables, xlabel="accuracy (%) on task", ylabel="after task")}
