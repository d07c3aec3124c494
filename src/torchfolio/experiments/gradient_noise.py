"""Measures what noise does for a deep perceptron from poor initialisations; memory and program tasks at full scale.

Rows of one batched network train side by side, each with its own initialisation, noise and learning rate. Longer than
most because rows of many conditions are one network, with norms and noise of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import seeded
from torchfolio.experiments._gradient_noise_tasks import Memory, Program, trainings
from torchfolio.models import resnet20
from torchfolio.runs import Results, Run, plots
from torchfolio.runs.bench import Bench
from torchfolio.training.gradient_noise import GradientNoise, add_gradient_noise_


@dataclass(frozen=True)
class Settings:
    """A deep perceptron under plain SGD.

    Attributes:
        data: name of the data set.
        train_size: training examples.
        hidden: number of hidden layers.
        width: of each.
        steps: of training.
        batch_size: examples of a batch.
        clip: largest norm of a row's gradient, before the noise.
        rates: learning rates of the rows without noise.
        grid: whether rows with noise have all these rates too.
        restarts: further rows with random rate and scale, with and without noise, whose successes are counted.
        repeats: trainings of the memory and the program task, with and without noise.
        task_steps: of each of these.
        task_etas: variances of the noise in these; Adam divides by the size of gradients and wants less of it.
    """

    data: str = "digits"
    train_size: int | None = 1400
    hidden: int = 20
    width: int = 50
    steps: int = 10_000
    batch_size: int = 32
    clip: float = 10.0
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    grid: bool = False
    restarts: int = 0
    repeats: int = 0
    task_steps: int = 3000
    task_etas: tuple[float, ...] = (0.0, 0.0001, 0.01)


SCALES = {
    "smoke": Settings(train_size=256, hidden=4, width=16, steps=60, restarts=2, repeats=1, task_steps=30),
    "quick": Settings(),
    "full": Settings("mnist10k", 8000, steps=30_000, grid=True, restarts=64, repeats=20),
}


@dataclass(frozen=True)
class Row:
    """One network of the batch: its name, scale of the initial weights (`None` is He's), noise and rate."""

    name: str
    scale: float | None
    eta: float
    gamma: float
    lr: float


def rows_of(settings: Settings) -> list[Row]:
    """The conditions of the claims, by noise, so that equal noise is contiguous."""
    pairs = [(0.3, 0.03), (1.0, 0.02)]
    if settings.grid:
        pairs = [*pairs, *((eta, lr) for eta in (0.01, 0.3, 1.0) for lr in settings.rates if (eta, lr) not in pairs)]
    rows = [Row(f"{n}_{eta}_{lr}", s, eta, 0.55, lr) for n, s in (("zero", 0.0), ("simple", 0.1)) for eta, lr in pairs]
    rows += [Row("zero_constant", 0.0, 0.3, 0.0, 0.03), Row("he_noise", None, 0.3, 0.55, 0.03)]
    rows += [Row(f"{n}_0_{lr}", s, 0.0, 0.55, lr) for n, s in (("zero", 0.0), ("simple", 0.1)) for lr in settings.rates]
    return sorted([*rows, Row("he_plain", None, 0.0, 0.55, 0.03)], key=lambda row: (row.eta, row.gamma))


def restarts_of(settings: Settings, seed: int) -> list[Row]:
    """Restarts with random rates and scales, each with and without noise."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for k in range(settings.restarts):
        lr = 10 ** float(torch.empty(1).uniform_(-2, -1, generator=g))
        scale = (0.0, 0.05, 0.1, 0.2)[int(torch.randint(4, (1,), generator=g))]
        rows += [Row(f"{name}_{k}", scale, eta, 0.55, lr) for name, eta in (("noise", 0.3), ("plain", 0.0))]
    return sorted(rows, key=lambda row: row.eta)


class Perceptrons(nn.Module):
    """Deep ReLU perceptrons side by side: `[N, F]` to `[R, N, classes]`."""

    def __init__(self, rows: list[Row], features: int, classes: int, hidden: int, width: int) -> None:
        super().__init__()
        sizes = [features, *[width] * hidden, classes]
        drawn: list[Tensor] = [torch.randn(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        scales = [[math.sqrt(2 / len(w)) if row.scale is None else row.scale for row in rows] for w in drawn]
        # Every row starts from the same draw, at its own scale.
        self.weights = nn.ParameterList(torch.tensor(s)[:, None, None] * w for s, w in zip(scales, drawn, strict=True))
        self.biases = nn.ParameterList(torch.zeros(len(rows), 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(len(self.biases[0]), -1, -1)
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h.relu() if k else h, weight)
        return h


def train_rows(run: Run[Settings], rows: list[Row]) -> dict[str, Any]:
    """Train all rows for the same batches; test accuracy (%) and final training loss of each."""
    settings = run.settings
    data = run.data(settings.data, val=0, train_size=settings.train_size)
    (x, y), (x_test, y_test) = (
        (s.tensors[0].flatten(1).to(run.device), s.tensors[1].to(run.device)) for s in (data.train, data.test)
    )
    with seeded(run.seed):
        net = Perceptrons(rows, x.shape[1], data.num_classes or 10, settings.hidden, settings.width).to(run.device)
    draws = torch.Generator().manual_seed(run.seed)
    noise = torch.Generator(run.device).manual_seed(run.seed + 1)
    parameters = list(net.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    gradients: list[Any] = [p.grad for p in parameters]
    rates = torch.tensor([row.lr for row in rows], device=run.device)[:, None, None]
    noisy = slices(rows, parameters)
    every, curve = max(1, settings.steps // 40), []
    for step in run.progress(range(settings.steps), "steps"):
        torch._foreach_zero_(gradients)
        index = torch.randint(len(x), (settings.batch_size,), generator=draws)
        loss = losses(net(x[index]), y[index])
        loss.sum().backward()
        with torch.no_grad():
            norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
            for g in gradients:
                g.mul_((settings.clip / norms.clamp_min(settings.clip))[:, None, None])
            for (eta, gamma), parts in noisy.items():
                add_gradient_noise_(parts, step, eta=eta, gamma=gamma, generator=noise)
            # Plain SGD, with a rate for each row.
            for p, g in zip(parameters, gradients, strict=True):
                p.addcmul_(g, rates, value=-1.0)
        if step % every == 0:
            curve.append(loss.detach())
    with torch.no_grad():
        accuracy = 100 * (net(x_test).argmax(2) == y_test).float().mean(1)
        final = losses(net(x), y)
    names = [row.name for row in rows]
    found: dict[str, Any] = {name: float(a) for name, a in zip(names, accuracy, strict=True)}
    found |= {f"{name}.loss": float(a) for name, a in zip(names, final, strict=True)}
    return found | {f"{name}.curve": line for name, line in zip(names, torch.stack(curve).T.tolist(), strict=True)}


def slices(rows: list[Row], parameters: list[nn.Parameter]) -> dict[tuple[float, float], list[Tensor]]:
    """By noise, the rows that have it as parameters of their own, whose gradients are views into the whole ones."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for kind in sorted({(row.eta, row.gamma) for row in rows if row.eta}):
        places = [k for k, row in enumerate(rows) if (row.eta, row.gamma) == kind]
        for p in parameters:
            part = nn.Parameter(p.detach()[places[0] : places[-1] + 1])
            part.grad = None if p.grad is None else p.grad[places[0] : places[-1] + 1]
            found.setdefault(kind, []).append(part)
    return found


def losses(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of every row."""
    return F.cross_entropy(logits.movedim(2, 1), y.expand(len(logits), -1), reduction="none").mean(1)


def run(run: Run[Settings]) -> None:
    """Train all rows at once; then restarts and the other tasks where the scale asks for them."""
    settings = run.settings
    rows = run.arm("rows", train_rows, run, rows_of(settings))
    for name in ("zero", "simple"):
        noisy = {"small": rows[f"{name}_0.3_0.03"], "large": rows[f"{name}_1.0_0.02"]}
        plain = max(rows[f"{name}_0_{lr}"] for lr in settings.rates)
        if name == "zero":
            run.values("zero_init", **noisy, plain=plain)
        else:
            learned = {key: float(value >= 90) for key, value in {**noisy, "plain": plain}.items()}
            run.values("simple_init", {f"{key}_learned": value for key, value in learned.items()}, **noisy, plain=plain)
    run.values("good_init_control", noise=rows["he_noise"], plain=rows["he_plain"])
    run.values("annealing_control", constant=rows["zero_constant.loss"], annealed=rows["zero_0.3_0.03.loss"])
    if settings.restarts:
        found = run.arm("restarts", train_rows, run, restarts_of(settings, run.seed))
        reached = {
            n: [v >= 90 for k, v in found.items() if k.startswith(n) and "." not in k] for n in ("noise", "plain")
        }
        run.arm("restart_count", lambda: {name: sum(hits) / len(hits) for name, hits in reached.items()})
    if settings.repeats:
        for name, make in (("memory", Memory), ("program", Program)):
            for eta in settings.task_etas:
                s = settings
                run.arm(f"{name}_{eta}", trainings, make, eta, s.repeats, s.task_steps, s.clip, run.seed)


def figures(results: Results) -> dict[str, Figure]:
    """Training loss of the networks from poor weights, and accuracy by initialisation."""
    labels = {"zero, noise": "zero_0.3_0.03", "zero, no noise": "zero_0_0.03", "simple, noise": "simple_0.3_0.03",
              "simple, no noise": "simple_0_0.03", "zero, constant noise": "zero_constant"}  # fmt: skip
    scores = {**labels, "He, noise": "he_noise", "He, no noise": "he_plain"}
    every = max(1, results.settings.steps // 40)
    steps = [1 + every * k for k in range(len(range(0, results.settings.steps, every)))]
    made = {
        "training loss": plots.curves(
            results, {name: ("rows", f"{row}.curve") for name, row in labels.items()}, x=steps, xlabel="step",
            ylabel="training loss", logy=True,
        ),
        "accuracy": plots.bars(
            results, {name: ("rows", row) for name, row in scores.items()}, ylabel="test accuracy (%)"
        ),
    }  # fmt: skip
    if results.settings.restarts:
        made["restarts"] = plots.bars(
            results, {n: ("restart_count", n) for n in ("noise", "plain")}, ylabel="restarts that reach 90 %"
        )
    if results.settings.repeats:
        kinds = [(name, eta) for name in ("memory", "program") for eta in results.settings.task_etas]
        arms = {f"{name}, {eta}": (f"{name}_{eta}", "solved") for name, eta in kinds}
        made["other tasks"] = plots.bars(results, arms, ylabel="trainings that solve the task")
    return made


def peers(bench: Bench) -> None:
    """A training step of a ResNet-20 with and without noise, and the noise beside a draw for every parameter."""
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))

    def step(noise: bool) -> Callable[[], None]:
        net = resnet20()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        if noise:
            GradientNoise(optimizer, 0.01)

        def once() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()

        return once

    bench.compare("step of a ResNet-20, 32 images of 32x32", ours=step(True), without_noise=step(False), repeats=9)
    net = nn.Sequential(*(nn.Linear(50, 50) for _ in range(20)))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    GradientNoise(optimizer, 0.01)

    plain = torch.optim.SGD(net.parameters(), lr=0.0)

    def naive() -> None:
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad + 0.1 * torch.randn_like(p)
        plain.step()

    bench.compare("noise and step, 20 layers of 50x50", ours=optimizer.step, draw_for_every_parameter=naive)
