"""Measures what noise does for a deep perceptron from poor initialisations; memory and program tasks at full scale.

Rows of one batched network train side by side, each with its own initialisation, noise and learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from torchfolio.experiments._gradient_noise_tasks import Memory, Program, trainings
from torchfolio.experiments._perceptrons_side_by_side import Row, train_rows
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings:
    """A deep perceptron under plain SGD."""

    data: str = setting("digits", "name of the data set")
    train_size: int | None = setting(1400, "training examples")
    hidden: int = setting(20, "number of hidden layers")
    width: int = setting(50, "width of each layer")
    steps: int = setting(10_000, "number of steps of training")
    batch_size: int = setting(32, "examples of a batch")
    clip: float = setting(10.0, "largest norm of a row's gradient, before the noise")
    rates: tuple[float, ...] = setting((0.01, 0.03, 0.1, 0.3), "learning rates of the rows without noise")
    grid: bool = setting(False, "whether rows with noise have all these rates too")
    restarts: int = setting(
        0, "further rows with random rate and scale, with and without noise, whose successes are counted"
    )
    repeats: int = setting(0, "trainings of the memory and the program task, with and without noise")
    task_steps: int = setting(3000, "number of steps of each of these")
    task_etas: tuple[float, ...] = setting(
        (0.0, 0.0001, 0.01),
        "variances of the noise in these; Adam divides by the size of gradients and wants less of it",
    )


SCALES = {
    "smoke": Settings(train_size=256, hidden=4, width=16, steps=60, restarts=2, repeats=1, task_steps=30),
    "quick": Settings(),
    "full": Settings("mnist10k", 8000, steps=30_000, grid=True, restarts=64, repeats=20),
}


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
        scores = {name: value for name, value in found.items() if "." not in name}
        reached = {n: [v >= 90 for k, v in scores.items() if k.startswith(n)] for n in ("noise", "plain")}
        run.arm("restart_count", lambda: {name: sum(hits) / len(hits) for name, hits in reached.items()})
    if settings.repeats:
        own = settings.repeats, settings.task_steps, settings.clip, run.seed
        for name, make in (("memory", Memory), ("program", Program)):
            for eta in settings.task_etas:
                run.arm(f"{name}_{eta}", trainings, make, eta, *own)


def figures(results: Results) -> plots.Figures:
    """Training loss of the networks from poor weights, and accuracy by initialisation."""
    labels = {"zero, noise": "zero_0.3_0.03", "zero, no noise": "zero_0_0.03", "simple, noise": "simple_0.3_0.03",
              "simple, no noise": "simple_0_0.03", "zero, constant noise": "zero_constant"}  # fmt: skip
    scores = {**labels, "He, noise": "he_noise", "He, no noise": "he_plain"}
    every = max(1, results.settings.steps // 40)
    steps = [1 + every * k for k in range(len(range(0, results.settings.steps, every)))]
    made = {
        "training loss": plots.curves(results, {name: ("rows", f"{row}.curve") for name, row in labels.items()},
                                      x=steps, xlabel="step", ylabel="training loss", logy=True),
        "accuracy": plots.bars(results, {name: ("rows", row) for name, row in scores.items()},
                               ylabel="test accuracy (%)"),
    }  # fmt: skip
    if results.settings.restarts:
        restarts = {name: ("restart_count", name) for name in ("noise", "plain")}
        made["restarts"] = plots.bars(results, restarts, ylabel="share of restarts that reach 90 %")
    if results.settings.repeats:
        series = {
            f"noise {eta:g}": {name: (f"{name}_{eta}", "solved") for name in ("memory", "program")}
            for eta in results.settings.task_etas
        }
        made["other tasks"] = plots.groups(results, series, ylabel="share of trainings that solve the task")
    return made
