"""Measures convex training of two-layer ReLU networks: against Adam, iteration by iteration, sampled, and robust."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from torchfolio.experiments._attacked_relu_networks import conic, pgd_trained
from torchfolio.experiments._convex_solver_times import seconds_of_an_iteration
from torchfolio.experiments._noisy_sines import by_adam, by_sampled_programs, noisy_sines, with_all_patterns
from torchfolio.experiments._two_class_tables import Pair, followed, two_classes
from torchfolio.runs import Results, Run, pick, plots, setting, threads


@dataclass(frozen=True)
class Settings:
    """The three problems and how long everything runs."""

    problems: int = setting(4, "draws of the noisy sine")
    points: int = setting(20, "examples of each")
    noise: float = setting(0.1, "its standard deviation")
    sine_beta: float = setting(0.1, "regularisation there")
    starts: int = setting(20, "runs of Adam at each width")
    widths: tuple[int, int] = setting((6, 60), "widths of Adam's networks, the narrow one first")
    adam_steps: int = setting(8_000, "number of steps of every Adam run")
    admm_steps: int = setting(20_000, "most ADMM iterations on the sine")
    neurons: tuple[int, ...] = setting((20, 100, 500, 2000), "sizes of the sampled programs")
    scp_steps: int = setting(10_000, "most iterations of each")
    task: str = setting(
        "breast_cancer",
        '`"breast_cancer"`, or two classes of an image set such as `"mnist:2,8"` in 30 principal components',
    )
    train_size: int = setting(400, "examples of the table")
    patterns: int = setting(60, "number of patterns on the table")
    beta: float = setting(0.05, "regularisation there")
    table_steps: int = setting(400, "iterations of ADMM there")
    robust_size: int = setting(100, "training examples of the robust problem")
    robust_patterns: int = setting(40, "patterns there")
    robust_beta: float = setting(1e-2, "regularisation there, chosen on training examples that it leaves out")
    epsilon: float = setting(0.1, "radius of the perturbations")
    robust_steps: int = setting(2_000, "steps of Adam of the PGD-trained network")
    sizes: tuple[int, ...] = setting((5, 10, 20, 40), "patterns for the timing")


SCALES = {
    "smoke": Settings(
        problems=2, starts=4, adam_steps=300, admm_steps=1_000, neurons=(20, 100), scp_steps=500, train_size=200,
        patterns=20, robust_size=30, robust_patterns=10, robust_steps=100, sizes=(2, 5),
    ),
    "quick": Settings(),
    "full": Settings(
        problems=10, adam_steps=30_000, task="mnist10k:2,8", train_size=1000, patterns=120, robust_size=200,
        robust_steps=10_000, sizes=(5, 10, 20, 40, 80),
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Everything on one thread: the matrices are small."""
    s = run.settings
    with threads(1), warnings.catch_warnings():
        # The caps on iterations are part of the design; what was reached is measured.
        warnings.simplefilter("ignore", ConvergenceWarning)
        _on_sines(run)
        parts = two_classes(run, s.task, s.train_size)
        _on_the_table(run, parts)
        _under_attack(run, parts)
        run.arm("cost", seconds_of_an_iteration, s.train_size, s.sizes, run.seed)


def _on_sines(run: Run[Settings]) -> None:
    """Several draws of the points: how easily narrow networks get stuck differs much between them."""
    s = run.settings
    X, y = noisy_sines(s.problems, s.points, s.noise, run.seed)
    common = {"X": X, "y": y, "beta": s.sine_beta}
    solved = run.arm("admm", with_all_patterns, **common, steps=s.admm_steps)
    relaxed = run.arm("gated", with_all_patterns, **common, steps=s.admm_steps, cones=False)
    narrow, wide = (
        run.arm(f"adam_{width}", by_adam, **common, starts=s.starts, width=width, steps=s.adam_steps)["objectives"]
        for width in s.widths
    )
    sampled = run.arm("scp", by_sampled_programs, **common, neurons=s.neurons, steps=s.scp_steps, seed=run.seed)
    optimum, network = solved["objective"], solved["network_objective"]
    run.values(
        "global_optimum", admm=network.mean(), adam_wide_best=wide.min(1).mean(),
        adam_narrow_median=np.median(narrow, 1).mean(), adam_narrow_worst=narrow.max(1).mean(),
        largest_excess=(network - wide.min(1)).max(),
    )  # fmt: skip
    run.values("recovery", np.abs(network / optimum - 1).max())
    gated, gated_network = relaxed["objective"], relaxed["network_objective"]
    run.values(
        "negative_control", admm=optimum.mean(), gated=gated.mean(), gated_network=gated_network.mean(),
        least_drop=(optimum - gated).min(), least_rise=(gated_network - optimum).min(),
    )  # fmt: skip
    gaps = (sampled["objectives"] / optimum[:, None] - 1).mean(0)
    by_size = {f"gap_{n}": gap for n, gap in zip(s.neurons, gaps, strict=True)}
    run.values("sampled_programs", by_size, largest_rise=np.diff(sampled["objectives"]).max())


def _on_the_table(run: Run[Settings], parts: list[Pair]) -> None:
    """How fast ADMM gets accurate, and whether its residual falls along a line from iteration 20."""
    s = run.settings
    arguments = {"patterns": s.patterns, "beta": s.beta, "steps": s.table_steps, "seed": run.seed}
    course = run.arm("table", followed, parts, **arguments)
    late, test = course["residual"][19:], course["test_accuracy"]
    correlation = np.corrcoef(np.arange(20, 20 + len(late)), np.log10(late))[0, 1]
    run.values(
        "fast_start", train_at_10=course["train_accuracy"][9], test_at_10=test[9], test_final=test[-1],
        fall=late[0] / late[-1], r_squared=correlation**2,
    )  # fmt: skip


def _under_attack(run: Run[Settings], parts: list[Pair]) -> None:
    """A few of the training examples, so that robustness is hard to come by."""
    if importlib.util.find_spec("cvxpy") is None:
        run.say("robust training needs CVXPY (extra convex): left out")
        return
    s = run.settings
    train = parts[0][0][: s.robust_size], parts[0][1][: s.robust_size]
    common = {"train": train, "test": parts[2], "beta": s.robust_beta, "epsilon": s.epsilon, "seed": run.seed}
    standard = run.arm("standard", conic, **common, patterns=s.robust_patterns, radius=0.0)
    robust = run.arm("robust", conic, **common, patterns=s.robust_patterns, radius=s.epsilon)
    trained = run.arm("pgd_trained", pgd_trained, **common, width=2 * s.robust_patterns, steps=s.robust_steps)
    run.values(
        "robust", pick(robust, "worst_case", "pgd_loss"), robust_term=robust["data_term"],
        accuracy=robust["pgd_accuracy"], standard_accuracy=standard["pgd_accuracy"],
        pgd_trained_accuracy=trained["pgd_accuracy"],
    )  # fmt: skip


def figures(results: Results) -> plots.Figures:
    """Objectives on the sines, ADMM's course on the table, the cost of an iteration, and accuracies under attack."""
    s: Settings = results.settings
    objectives, ax = plots.axes("width", "objective / convex optimum")
    for k, width in enumerate(s.widths):
        ratio = results.values(f"adam_{width}", "objectives") / results.values("admm", "objective")[..., None]
        ax.plot(k + np.linspace(-0.2, 0.2, ratio.size), ratio.ravel(), ".")
    ax.axhline(1, ls="--", c="black")
    ax.set_xticks(range(len(s.widths)), [f"Adam, width {w}" for w in s.widths])
    residual = {"primal + dual": ("table", "residual")}
    accuracies = {split: ("table", f"{split}_accuracy") for split in ("train", "test")}
    seconds = {"factor of side 2dP": ("cost", "dense"), "factor of side n": ("cost", "woodbury")}
    drawn = {
        "objectives": objectives,
        "residual of admm": plots.curves(results, residual, xlabel="iteration", ylabel="residual", logy=True),
        "accuracy by admm": plots.curves(results, accuracies, xlabel="iteration", ylabel="accuracy", logx=True),
        "cost of an iteration": plots.curves(results, seconds, x=s.sizes, xlabel="patterns P",
                                             ylabel="seconds of an iteration", logx=True, logy=True),
    }  # fmt: skip
    if all("robust" in arms for arms in results.arms):
        arms = {"convex": "standard", "convex, robust": "robust", "PGD training": "pgd_trained"}
        series = {kind: {k: (arm, f"{kind}_accuracy") for k, arm in arms.items()} for kind in ("clean", "pgd")}
        drawn["robust accuracy"] = plots.groups(results, series, ylabel="test accuracy")
    return drawn
