"""Measures what a spiking network forgets over tasks of permuted digits, with and without Hebbian subspaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import LearningRule, fit
from torchfolio.engine.recipes import sgd
from torchfolio.experiments._principal_rows import captured_variance
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench
from torchfolio.runs.tasks import accuracy
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.hlop import DSR, HLOP, OTTT, FeedbackAlignment, HebbianSubspace, continual_metrics
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.surrogates import Sigmoid

Part = Sequence[Tensor]


@dataclass(frozen=True)
class Settings:
    """Tasks, network and budget.

    Attributes:
        data: images of which every task permutes the pixels in its own way.
        tasks: number of them.
        other_tasks: number of tasks of the other rules.
        width: units of the two hidden layers.
        timesteps: T of backpropagation through time and of traces.
        rate_timesteps: T of spike representations.
        epochs: passes over a task.
        other_epochs: number of epochs of the other rules.
        batch_size: images of a step.
        lr: learning rate of SGD without momentum.
        sizes: lateral rows of the three layers for the first task.
        growth: rows for each further task.
        input_lr: Hebbian rate of the first layer, whose inputs are large.
    """

    data: str = "mnist10k"
    tasks: int = 5
    other_tasks: int = 3
    width: int = 200
    timesteps: int = 4
    rate_timesteps: int = 10
    epochs: int = 2
    other_epochs: int = 2
    batch_size: int = 64
    lr: float = 0.1
    sizes: tuple[int, int, int] = (80, 70, 50)
    growth: tuple[int, int, int] = (60, 25, 20)
    input_lr: float = 0.001


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
    generator = torch.Generator().manual_seed(run.seed)
    orders = [torch.randperm(pixels, generator=generator) for _ in range(tasks)]

    def permuted(part: Part, k: int) -> Part:
        return part[0].flatten(1)[:, orders[k]], part[1]

    matrix = torch.full((tasks, tasks), float("nan"))
    for k in run.progress(range(tasks), "tasks"):
        fit(net, permuted(train, k), rule=rule, optimizer=sgd(s.lr, momentum=0), epochs=epochs, batch_size=s.batch_size,
            seed=run.seed, device=run.device, progress=False)  # fmt: skip
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


def figures(results: Results) -> dict[str, Figure]:
    """The accuracy on every task after every task, a mean over seeds."""
    titles = {"hlop": "with lateral rows", "sequential": "without", "random": "rows left at random"}
    means = {title: results.values(arm, "matrix").mean(0) for arm, title in titles.items()}
    tables = {title: np.where(mean < 0, np.nan, mean) for title, mean in means.items()}
    return {"accuracy": plots.matrices(tables, xlabel="accuracy (%) on task", ylabel="after task")}


def peers(bench: Bench) -> None:
    """A step of a later task beside the host rule's, the input form and all rows; a subspace beside one by an SVD."""
    s, x, y = SCALES["quick"], torch.randn(64, 784), torch.randint(10, (64,))

    def stepping(rule: LearningRule, **options: Any) -> Any:
        net = network(784, s.width)
        used = protected(s, rule, **options) if options else rule
        used.prepare(net, (x, y))
        if isinstance(used, HLOP):
            used.end_task()

        def step() -> None:
            net.zero_grad()
            used.step((x, y), Tensor.backward)

        return step

    for timesteps in (4, 6):

        def bptt(timesteps: int = timesteps) -> BPTT:
            return BPTT(F.cross_entropy, timesteps=timesteps)

        bench.compare(
            f"a step of 784-200-200-10, T = {timesteps}, 64 images",
            ours=stepping(bptt(), form="weight"), host_rule=stepping(bptt()), input_form=stepping(bptt(), form="input"),
            all_rows=stepping(bptt(), form="input", rows="all"),
        )  # fmt: skip
    rows = torch.randn(8000, 784)

    def hebbian() -> None:
        lateral = HebbianSubspace(784, lr=0.001)
        lateral.grow(80)
        for batch in rows.split(64):
            lateral.update(batch)

    bench.compare(
        "80 rows for 8,000 activities of 784", ours=hebbian, svd=lambda: torch.linalg.svd(rows, full_matrices=False)
    )
