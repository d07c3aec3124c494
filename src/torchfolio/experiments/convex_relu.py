"""Measures convex training of two-layer ReLU networks: against Adam, iteration by iteration, sampled, and robust.

Longer than most because three problems, four solvers and an attack are measured.
"""

from __future__ import annotations

import importlib.util
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional as F

from torchfolio.runs import Results, Run, threads
from torchfolio.runs.bench import Bench
from torchfolio.theory.convex_relu import (
    Solution,
    activation_patterns,
    admm,
    conic_program,
    data_loss,
    network_output,
    nonconvex_objective,
    sample_neurons,
    sampled_convex_program,
)

Network = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """The three problems and how long everything runs.

    Attributes:
        problems: draws of the noisy sine.
        points: examples of each.
        noise: its standard deviation.
        sine_beta: regularisation there.
        starts: Adam runs at each width.
        widths: of Adam's networks, the narrow one first.
        adam_steps: of every Adam run.
        admm_steps: most ADMM iterations on the sine.
        neurons: sizes of the sampled programs.
        scp_steps: most iterations of each.
        task: `"breast_cancer"`, or two classes of an image set such as `"mnist:2,8"` in 30 principal components.
        train_size: examples of the table.
        patterns: on the table.
        beta: regularisation there.
        table_steps: ADMM iterations there.
        robust_size: training examples of the robust problem.
        robust_patterns: patterns there.
        robust_beta: regularisation there, chosen on training examples that the robust problem leaves out.
        epsilon: radius of the perturbations.
        robust_steps: Adam steps of the PGD-trained network.
        sizes: patterns for the timing.
    """

    problems: int = 4
    points: int = 20
    noise: float = 0.1
    sine_beta: float = 0.1
    starts: int = 20
    widths: tuple[int, int] = (6, 60)
    adam_steps: int = 8_000
    admm_steps: int = 20_000
    neurons: tuple[int, ...] = (20, 100, 500, 2000)
    scp_steps: int = 10_000
    task: str = "breast_cancer"
    train_size: int = 400
    patterns: int = 60
    beta: float = 0.05
    table_steps: int = 400
    robust_size: int = 100
    robust_patterns: int = 40
    robust_beta: float = 1e-2
    epsilon: float = 0.1
    robust_steps: int = 2_000
    sizes: tuple[int, ...] = (5, 10, 20, 40)


SCALES = {
    "smoke": Settings(
        problems=2,
        starts=4,
        adam_steps=300,
        admm_steps=1_000,
        neurons=(20, 100),
        scp_steps=500,
        train_size=200,
        patterns=20,
        robust_size=30,
        robust_patterns=10,
        robust_steps=100,
        sizes=(2, 5),
    ),
    "quick": Settings(),
    "full": Settings(
        problems=10,
        adam_steps=30_000,
        task="mnist10k:2,8",
        train_size=1000,
        patterns=120,
        robust_size=200,
        robust_steps=10_000,
        sizes=(5, 10, 20, 40, 80),
    ),
}


def run(run: Run[Settings]) -> None:
    """Everything on one thread: the matrices are small."""
    with threads(1), warnings.catch_warnings():
        # The caps on iterations are part of the design; what was reached is measured.
        warnings.simplefilter("ignore", ConvergenceWarning)
        _sine(run)
        _table(run)
        _robust(run)
        run.arm("cost", _cost, run.settings, run.seed)


def _sine(run: Run[Settings]) -> None:
    """Several draws of the points: how easily narrow networks get stuck differs much between them."""
    settings = run.settings
    X, y = _sine_data(settings, run.seed)
    solved = run.arm("admm", _solve_sine, settings, X, y, cones=True)
    relaxed = run.arm("gated", _solve_sine, settings, X, y, cones=False)
    narrow, wide = (
        np.asarray(run.arm(f"adam_{w}", _adam, settings, X, y, width=w)["objectives"]) for w in settings.widths
    )
    optimum, network = np.asarray(solved["objective"]), np.asarray(solved["network_objective"])
    run.values(
        "global_optimum",
        {
            "admm": network.mean(),
            "adam_wide_best": wide.min(1).mean(),
            "adam_narrow_median": np.median(narrow, 1).mean(),
            "adam_narrow_worst": narrow.max(1).mean(),
            "largest_excess": (network - wide.min(1)).max(),
        },
    )
    run.values("recovery", np.abs(network / optimum - 1).max())
    gated, gated_network = np.asarray(relaxed["objective"]), np.asarray(relaxed["network_objective"])
    run.values(
        "negative_control",
        {
            "admm": optimum.mean(),
            "gated": gated.mean(),
            "gated_network": gated_network.mean(),
            "least_drop": (optimum - gated).min(),
            "least_rise": (gated_network - optimum).min(),
        },
    )
    sampled = np.asarray(run.arm("scp", _sampled, settings, X, y, seed=run.seed)["objectives"])
    gaps = (sampled / optimum[:, None] - 1).mean(0)
    run.values(
        "sampled_programs",
        {
            **{f"gap_{n}": g for n, g in zip(settings.neurons, gaps, strict=True)},
            "largest_rise": np.diff(sampled).max(),
        },
    )


def _sine_data(settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Data `[problems, points, 2]` and targets `[problems, points]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (settings.problems, settings.points)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.stack([x, torch.ones_like(x)], -1), torch.sin(3 * x) + settings.noise * noise


def _with_bias(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _solve_sine(settings: Settings, X: Tensor, y: Tensor, cones: bool) -> dict[str, Any]:
    found: dict[str, list[float]] = {"objective": [], "network_objective": [], "neurons": [], "iterations": []}
    beta = settings.sine_beta
    for data, target in zip(X, y, strict=True):
        D = activation_patterns(data, "all")
        solution = admm(data, target, D, beta=beta, tol=1e-7, max_iter=settings.admm_steps, cones=cones, balance=True)
        network = nonconvex_objective(data, target, solution.hidden, solution.output, beta)
        found["objective"].append(solution.objective)
        found["network_objective"].append(float(network))
        found["neurons"].append(len(solution.output))
        found["iterations"].append(solution.convergence.n_iter)
    return {**found, "patterns": D.shape[1]}


def _adam(settings: Settings, X: Tensor, y: Tensor, width: int) -> dict[str, Any]:
    """Many starts at once: Adam treats every number by itself, so runs stacked in one tensor do not meet."""
    shape = (len(X), settings.starts, width)
    hidden = (torch.randn(*shape, X.shape[-1], dtype=X.dtype) / X.shape[-1] ** 0.5).requires_grad_()
    output = (torch.randn(shape, dtype=X.dtype) / width**0.5).requires_grad_()

    def objectives() -> Tensor:
        prediction = (output[:, :, None] @ F.relu(hidden @ X.mT[:, None]))[:, :, 0]
        decay = hidden.square().sum((2, 3)) + output.square().sum(2)
        return (prediction - y[:, None]).square().sum(2) / 2 + settings.sine_beta / 2 * decay

    _descend([hidden, output], lambda: objectives().sum(), settings.adam_steps)
    return {"objectives": objectives().detach()}


def _descend(parameters: list[Tensor], loss: Callable[[], Tensor], steps: int) -> None:
    """Adam with a rate that falls from 0.02 to nothing along a cosine."""
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        schedule.step()


def _sampled(settings: Settings, X: Tensor, y: Tensor, seed: int) -> dict[str, Any]:
    neurons = sample_neurons(max(settings.neurons), X.shape[-1], torch.Generator().manual_seed(seed))
    objectives = []
    for data, target in zip(X, y, strict=True):
        start = None
        for n in settings.neurons:
            solution = sampled_convex_program(
                data, target, neurons[:n], beta=settings.sine_beta, tol=1e-3, max_iter=settings.scp_steps, start=start
            )
            objectives.append(solution.objective)
            start = solution.state
    return {"objectives": torch.tensor(objectives, dtype=torch.float64).view(len(X), -1)}


def _table_data(run: Run[Settings], train_size: int) -> list[tuple[Tensor, Tensor]]:
    """Training, validation and test data: 30 standardised features over √30, and labels -1 and +1."""
    name, _, pair = run.settings.task.partition(":")
    if not pair:
        data = run.data(name, train_size=train_size)
        return [(part.tensors[0].double() / 30**0.5, part.tensors[1].double() * 2 - 1) for part in _parts(data)]
    first, second = map(int, pair.split(","))
    rows = []
    for part in _parts(run.data(name)):
        x, y = part.tensors
        kept = (y == first) | (y == second)
        rows.append((x[kept].flatten(1).double(), torch.where(y[kept] == first, 1.0, -1.0).double()))
    project = _principal(rows[0][0], 30)
    rows = [(project(x), y) for x, y in rows]
    return [(rows[0][0][:train_size], rows[0][1][:train_size]), *rows[1:]]


def _parts(data: Any) -> tuple[Any, Any, Any]:
    return data.train, data.val, data.test


def _principal(x: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """The map to the first `n` principal components of `x`, scaled together to a mean squared norm of 1."""
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean, full_matrices=False)[2][:n].T
    scale = ((x - mean) @ directions).square().sum(1).mean().sqrt()
    return lambda other: (other - mean) @ directions / scale


def _table(run: Run[Settings]) -> None:
    settings = run.settings
    (x, y), (x_val, y_val), (x_test, y_test) = _table_data(run, settings.train_size)
    result = run.arm("table", _solve_table, settings, [(x, y), (x_val, y_val), (x_test, y_test)], run.seed)
    residual = np.asarray(result["residual"])
    late = residual[19:]
    iterations = np.arange(20, len(residual) + 1)
    r_squared = float(np.corrcoef(iterations, np.log10(late))[0, 1] ** 2)
    train, test = result["train_accuracy"], result["test_accuracy"]
    run.values(
        "fast_start",
        {
            "train_at_10": train[9],
            "test_at_10": test[9],
            "test_final": test[-1],
            "fall": float(late[0] / late[-1]),
            "r_squared": r_squared,
        },
    )


def _solve_table(settings: Settings, parts: list[tuple[Tensor, Tensor]], seed: int) -> dict[str, Any]:
    data = [(_with_bias(x), y) for x, y in parts]
    X, y = data[0]
    D = activation_patterns(X, settings.patterns, generator=torch.Generator().manual_seed(seed))
    accuracies: list[list[float]] = []

    def watch(k: int, blocks: Tensor) -> None:
        # A block's ReLU response is its neuron's times its output weight, whatever the scaling between them.
        accuracies.append(
            [_accuracy(F.relu(X @ blocks[0].T).sum(1) - F.relu(X @ blocks[1].T).sum(1), labels) for X, labels in data]
        )

    started = time.perf_counter()
    solution = admm(X, y, D, beta=settings.beta, tol=1e-12, max_iter=settings.table_steps, callback=watch)
    seconds = time.perf_counter() - started
    history = solution.convergence.to_frame()
    train, val, test = zip(*accuracies, strict=True)
    return {
        "residual": (history["primal"] + history["dual"]).to_numpy(),
        "train_accuracy": list(train),
        "val_accuracy": list(val),
        "test_accuracy": list(test),
        "seconds": seconds,
        "neurons": len(solution.output),
    }


def _accuracy(output: Tensor, y: Tensor) -> float:
    return float(((output > 0) == (y > 0)).double().mean())


def _robust(run: Run[Settings]) -> None:
    if importlib.util.find_spec("cvxpy") is None:
        run.say("robust training needs CVXPY (extra convex): left out")
        return
    settings = run.settings
    (x, y), _, (x_test, y_test) = _table_data(run, settings.train_size)
    X, y = _with_bias(x[: settings.robust_size]), y[: settings.robust_size]
    test = _with_bias(x_test), y_test
    standard = run.arm("standard", _conic, settings, X, y, test, 0.0, run.seed)
    robust = run.arm("robust", _conic, settings, X, y, test, settings.epsilon, run.seed)
    trained = run.arm("pgd_trained", _pgd_training, settings, X, y, test)
    run.values(
        "robust",
        {
            "robust_term": robust["data_term"],
            "worst_case": robust["worst_case"],
            "pgd_loss": robust["pgd_loss"],
            "accuracy": robust["pgd_accuracy"],
            "standard_accuracy": standard["pgd_accuracy"],
            "pgd_trained_accuracy": trained["pgd_accuracy"],
        },
    )


def _conic(
    settings: Settings, X: Tensor, y: Tensor, test: tuple[Tensor, Tensor], epsilon: float, seed: int
) -> dict[str, Any]:
    """Solve the convex program, robust or not, and attack the recovered network."""
    generator = torch.Generator().manual_seed(seed)
    D = activation_patterns(X, settings.robust_patterns, epsilon, generator, bias=True)
    # Tighter than the default: an attack may gain what the cones are violated by.
    solution = conic_program(X, y, D, beta=settings.robust_beta, loss="hinge", epsilon=epsilon, bias=True, tol=1e-11)
    assert solution.blocks is not None
    network = solution.hidden, solution.output
    worst = _worst_case(X, y, D, solution, settings.epsilon)
    return {
        "data_term": solution.objective - settings.robust_beta * float(solution.blocks.norm(dim=-1).sum()),
        "worst_case": float(data_loss(network_output(worst, *network), y, "hinge")),
        "pgd_loss": float(data_loss(network_output(_pgd(network, X, y, settings.epsilon), *network), y, "hinge")),
        "neurons": len(solution.output),
        **_attacked(network, test, settings.epsilon),
    }


def _worst_case(X: Tensor, y: Tensor, D: Tensor, solution: Solution, epsilon: float) -> Tensor:
    """Every example moved by $-\\epsilon y \\operatorname{sign}(g)$, the worst case where patterns stay as they are."""
    assert solution.blocks is not None
    g = D.to(X) @ (solution.blocks[0] - solution.blocks[1])
    move = -epsilon * y[:, None] * g.sign()
    move[:, -1] = 0
    return X + move


def _attacked(network: Network, test: tuple[Tensor, Tensor], epsilon: float) -> dict[str, Any]:
    X, y = test
    return {
        "clean_accuracy": _accuracy(network_output(X, *network), y),
        "pgd_accuracy": _accuracy(network_output(_pgd(network, X, y, epsilon), *network), y),
        "hidden": network[0],
        "output": network[1],
    }


def _pgd(network: Network, X: Tensor, y: Tensor, epsilon: float, steps: int = 20) -> Tensor:
    """Signed gradient ascent from a random point of the ball; the column of ones stays."""
    hidden, output = (p.detach() for p in network)
    move = (torch.rand_like(X) * 2 - 1) * epsilon
    move[:, -1] = 0
    for _ in range(steps):
        at = (X + move).requires_grad_()
        margin = y * network_output(at, hidden, output)
        (gradient,) = torch.autograd.grad(margin.sum(), at)
        gradient[:, -1] = 0
        move = (move - 2.5 * epsilon / steps * gradient.sign()).clamp(-epsilon, epsilon)
    return X + move


def _pgd_training(settings: Settings, X: Tensor, y: Tensor, test: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """Adam on the same objective at examples that PGD finds anew in every step."""
    width = 2 * settings.robust_patterns
    hidden = (torch.randn(width, X.shape[1], dtype=X.dtype) / X.shape[1] ** 0.5).requires_grad_()
    output = (torch.randn(width, dtype=X.dtype) / width**0.5).requires_grad_()

    def loss() -> Tensor:
        worst = _pgd((hidden, output), X, y, settings.epsilon, steps=5)
        return nonconvex_objective(worst, y, hidden, output, settings.robust_beta, "hinge")

    _descend([hidden, output], loss, settings.robust_steps)
    return _attacked((hidden.detach(), output.detach()), test, settings.epsilon)


def _cost(settings: Settings, seed: int) -> dict[str, Any]:
    """Seconds of one ADMM iteration, the median of ten, with each way to take the main step."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(settings.train_size, 31, generator=generator, dtype=torch.float64) / 31**0.5
    y = torch.randn(len(X), generator=generator, dtype=torch.float64)
    seconds: dict[str, list[float]] = {"dense": [], "woodbury": []}
    for n in settings.sizes:
        D = activation_patterns(X, n, generator=generator)
        for name, column in seconds.items():
            stamps: list[float] = []
            admm(
                X,
                y,
                D,
                tol=1e-12,
                max_iter=12,
                linear_solver=name,  # pyright: ignore[reportArgumentType]
                callback=lambda k, v, stamps=stamps: stamps.append(time.perf_counter()),
            )
            column.append(float(np.median(np.diff(stamps))))
    return {"patterns": list(settings.sizes), **seconds}


def figures(results: Results) -> dict[str, Figure]:
    """Objectives on the sine, ADMM's course on the table, the robust boundary, and the cost of an iteration."""
    made = {
        "objectives": _objectives(results),
        "course of admm": _course(results),
        "cost of an iteration": _cost_figure(results),
    }
    if all("robust" in arms for arms in results.arms):
        made["robust accuracy"] = _robust_figure(results)
    return made


def _objectives(results: Results) -> Figure:
    settings: Settings = results.settings
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    optimum = results.values("admm", "objective")
    for k, width in enumerate(settings.widths):
        ratio = results.values(f"adam_{width}", "objectives") / optimum[..., None]
        jitter = np.linspace(-0.2, 0.2, ratio.size)
        left.plot(k + jitter, ratio.ravel(), ".", label=f"Adam, width {width}")
    left.axhline(1, ls="--", c="black", label="ADMM (all patterns)")
    left.set(xticks=range(len(settings.widths)), xticklabels=[f"width {w}" for w in settings.widths])
    left.set(ylabel="objective / convex optimum", title="every start of Adam, every draw")
    left.legend()
    gaps = (results.values("scp", "objectives") / optimum[..., None] - 1).reshape(-1, len(settings.neurons))
    right.errorbar(settings.neurons, 100 * gaps.mean(0), yerr=100 * gaps.std(0), marker="o", capsize=3)
    right.set(xscale="log", xlabel="sampled neurons", ylabel="gap to the optimum (%)", title="sampled convex programs")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return fig


def _course(results: Results) -> Figure:
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for split, name in (("train", "training"), ("test", "test")):
        accuracy = 100 * results.values("table", f"{split}_accuracy").mean(0)[:50]
        left.plot(np.arange(1, len(accuracy) + 1), accuracy, label=name)
    left.set(xlabel="iteration", ylabel="accuracy (%)", title="first 50 iterations")
    left.legend()
    for row in results.values("table", "residual"):
        right.semilogy(np.arange(1, len(row) + 1), row)
    right.set(xlabel="iteration", ylabel="primal + dual residual", title="a line for each seed")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    return fig


def _robust_figure(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    arms = {"standard": "convex", "robust": "convex, robust", "pgd_trained": "PGD training"}
    for k, metric in enumerate(("clean_accuracy", "pgd_accuracy")):
        values = [100 * results.values(arm, metric) for arm in arms]
        places = np.arange(len(arms)) + 0.2 * (2 * k - 1)
        label = "clean" if k == 0 else f"PGD, ε = {results.settings.epsilon}"
        ax.bar(places, [v.mean() for v in values], 0.38, yerr=[v.std() for v in values], capsize=3, label=label)
    ax.set(xticks=range(len(arms)), xticklabels=list(arms.values()), ylabel="test accuracy (%)", ylim=(0, 100))
    ax.legend(loc="lower right")
    ax.grid(alpha=0.3, axis="y")
    return fig


def _cost_figure(results: Results) -> Figure:
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, label in (("dense", "factor of side 2dP (dense)"), ("woodbury", "factor of side n (woodbury)")):
        milliseconds = 1e3 * results.values("cost", name)
        ax.loglog(results.settings.sizes, milliseconds.mean(0), marker="o", label=label)
    ax.set(xlabel="patterns P", ylabel="time of an iteration (ms)")
    ax.set_xticks(results.settings.sizes, [str(n) for n in results.settings.sizes])
    ax.minorticks_off()
    ax.legend()
    ax.grid(alpha=0.3, which="both")
    return fig


def peers(bench: Bench) -> None:
    """Whole solves beside the program written plainly in CVXPY and solved by Clarabel.

    ADMM stops at objectives (of the recovered networks) within 2e-4 of Clarabel's.
    """
    for n, d, patterns in ((60, 31, 10), (100, 20, 20), (400, 31, 20)):
        generator = torch.Generator().manual_seed(0)
        X = _with_bias(torch.randn(n, d - 1, generator=generator, dtype=torch.float64) / (d - 1) ** 0.5)
        y = torch.sign(X @ torch.randn(d, generator=generator, dtype=torch.float64))
        D = activation_patterns(X, patterns, generator=generator)
        solve = lambda X=X, y=y, D=D: admm(X, y, D, beta=0.05, tol=1e-3, relaxation=1.8)  # noqa: E731
        plain = lambda X=X, y=y, D=D: _plain_cvxpy(X, y, D, 0.05)  # noqa: E731
        bench.compare(f"ADMM, {n} x {d}, {D.shape[1]} patterns", ours=solve, cvxpy=plain)
        if n == 100:
            conic = lambda X=X, y=y, D=D: conic_program(X, y, D, beta=0.05)  # noqa: E731
            bench.compare(f"conic program, {n} x {d}, {D.shape[1]} patterns", ours=conic, cvxpy=plain)


def _plain_cvxpy(X: Tensor, y: Tensor, D: Tensor, beta: float) -> float:
    import cvxpy as cp

    data, target, active = (t.double().numpy() for t in (X, y, D))
    v, w = (cp.Variable((active.shape[1], data.shape[1])) for _ in range(2))
    prediction = cp.sum(cp.multiply(active, data @ (v - w).T), axis=1)
    cones: Any = [cp.multiply(2 * active - 1, data @ block.T) >= 0 for block in (v, w)]
    size = cp.sum(cp.norm(v, 2, axis=1)) + cp.sum(cp.norm(w, 2, axis=1))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(prediction - target) / 2 + beta * size), cones)
    problem.solve(solver="CLARABEL")
    return float(problem.value)  # pyright: ignore[reportArgumentType]
