"""Measures hard constraints and experts on diffusion-sorption: accuracy, gradients, optimality, cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.dynamics.physics_moe import (
    Burgers1D,
    DiffusionSorption1D,
    ExpertConstraint,
    Grid,
    LevenbergMarquardt,
    equation_loss,
)
from torchfolio.experiments._constraint_solves import arrays, cost, gradient_errors, optimum
from torchfolio.experiments._diffusion_sorption import Tanh, inputs, instances, network
from torchfolio.runs import Results, Run, plots, threads
from torchfolio.runs.bench import Bench


@dataclass(frozen=True)
class Settings:
    """Diffusion-sorption on the smooth window from t = 50 to 500.

    Attributes:
        mesh: points in time and space.
        train_size: instances to learn from.
        test_size: instances to judge on.
        basis: K, number of basis functions.
        points: grid points at which a solve sees the equation.
        experts: blocks in time and space.
        width: width of the network.
        fno: whether it is a Fourier neural operator; a tanh network on (t, x, start at x, mean start) otherwise.
        steps: number of steps of Adam, at which all are compared.
        lr: learning rate of Adam, falling as a cosine.
        batch_size: instances of a step.
        max_iterations: maximum number of iterations of a solve.
        stationary: relative gradient up to which a solve passes its gradient on; retardation has a kink at u = 0.
        entries: random entries of the parameters for the gradient check.
        sizes: sampled points for the timing.
    """

    mesh: tuple[int, int] = (32, 48)
    train_size: int = 7
    test_size: int = 5
    basis: int = 8
    points: int = 32
    experts: tuple[int, int] = (4, 1)
    width: int = 64
    fno: bool = False
    steps: int = 100
    lr: float = 2e-3
    batch_size: int = 3
    max_iterations: int = 15
    stationary: float = 0.1
    entries: int = 24
    sizes: tuple[int, ...] = (200, 400, 800, 1600)


SCALES = {
    "smoke": Settings(mesh=(16, 16), train_size=3, test_size=2, basis=4, points=16, width=16, steps=5, sizes=(50, 100)),
    "quick": Settings(),
    "full": Settings(
        mesh=(64, 256), train_size=60, test_size=20, basis=16, points=2000, fno=True, width=32, steps=4000, lr=1e-3,
        batch_size=6, max_iterations=30,
    ),
}  # fmt: skip


def relative(u: Tensor, truth: Tensor) -> Tensor:
    return (u - truth).flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)


def constraint(settings: Settings, pde: DiffusionSorption1D, kind: str) -> ExpertConstraint | None:
    """The layer of an arm; none for the soft penalty."""
    solver = LevenbergMarquardt(max_steps=settings.max_iterations)
    if kind == "soft":
        return None
    experts = settings.experts if kind == "experts" else (1, 1)
    return ExpertConstraint(pde, experts, settings.points, solver=solver, stationary=settings.stationary)


def trained(run: Run[Settings], kind: str) -> dict[str, Any]:
    """Train one arm and judge it on the test instances."""
    settings = run.settings
    pde, grid, train, test = instances(settings, run.seed)
    torch.manual_seed(run.seed)
    net = network(settings, 1 if kind == "soft" else settings.basis)
    layer = constraint(settings, pde, "global" if kind == "detached" else kind)
    optimizer = torch.optim.Adam(net.parameters(), settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    points, order = torch.Generator().manual_seed(run.seed), torch.Generator().manual_seed(run.seed)

    def field(truth: Tensor, generator: torch.Generator | None) -> Tensor:
        basis = net(inputs(grid, truth[:, 0]).float())
        if layer is None:
            return basis[..., 0].double()
        found = layer(basis.double(), grid, truth[:, 0], generator=generator)
        if kind != "detached":
            return found.u
        return (basis.double() * found.weights.detach()[:, 0, None, None]).sum(-1)

    losses = []
    for _ in run.progress(range(settings.steps), kind):
        batch = train[torch.randperm(len(train), generator=order)[: settings.batch_size]]
        loss = equation_loss(pde, field(batch, points), grid, batch[:, 0])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        u = field(test, None)
        final = float(equation_loss(pde, field(train, None), grid, train[:, 0]))
        floor = float(equation_loss(pde, train, grid, train[:, 0]))
        residual = pde.residual(pde.terms(u, grid), {}).square()
    inner = torch.ones(settings.mesh[0], dtype=torch.bool)
    for seam in range(0, settings.mesh[0], settings.mesh[0] // settings.experts[0]):
        inner[max(seam - 1, 0) : seam + 1] = seam == 0  # differences cross a seam from the row before it and after it
    return {
        "error": relative(u, test).tolist(), "losses": losses, "loss": final, "floor": floor, "field": u[0],
        "truth": test[0], "residual": float(residual.mean().sqrt()),
        "residual_off_seams": float(residual[:, inner].mean().sqrt()),
    }  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Gradients, optimality, cost, then four arms trained alike."""
    with threads(1):
        errors = {name: run.arm(f"gradient_{name}", gradient_errors, run.settings, run.seed, name)
                  for name in ("diffusion_sorption", "burgers")}  # fmt: skip
        run.values("implicit_gradient", {n: e["full"] for n, e in errors.items()},
                   gauss_newton=max(e["gauss_newton"] for e in errors.values()))  # fmt: skip
        run.values("expert_optimum", run.arm("optimum", optimum, run.settings, run.seed))
        costs = run.arm("cost", cost, run.settings, run.seed)
        run.values("scaling", {name: costs[name] for name in ("slope", "jacobian", "equation_rows")})
        arms = {kind: run.arm(kind, trained, run, kind) for kind in ("soft", "global", "experts", "detached")}
    error = {kind: float(np.median(arm["error"])) for kind, arm in arms.items()}
    named = {"soft": error["soft"], "one": error["global"], "experts": error["experts"]}
    run.values("hard_beats_soft", named)
    run.values("experts_accuracy", {name: named[name] for name in ("one", "experts")},
               seams=arms["experts"]["residual"] / arms["experts"]["residual_off_seams"])  # fmt: skip
    run.values("negative_control", ratio=arms["detached"]["loss"] / arms["global"]["loss"],
               floor=arms["global"]["floor"], loss=arms["global"]["loss"])  # fmt: skip


def figures(results: Results) -> dict[str, Figure]:
    """Loss while training, test errors, one solution."""
    labels = {"soft": "soft penalty", "global": "one constraint", "experts": "experts", "detached": "no gradient"}
    curves = plots.curves(results, {text: (kind, "losses") for kind, text in labels.items()}, xlabel="step", ylabel="loss",
                          logy=True)  # fmt: skip
    bars = plots.bars(results, {text: (kind, "error") for kind, text in labels.items()}, ylabel="relative L2 error")
    fields = [results.values("global", "truth")[0], *(results.values(kind, "field")[0] for kind in labels)]
    return {
        "training": curves,
        "errors": bars,
        "a test solution": plots.grid(np.stack(fields), ["truth", *labels.values()]),
    }


def peers(bench: Bench) -> None:
    """Solves of 4 experts for 32 instances as in training, against SciPy's MINPACK with exact Jacobians, one by one."""
    from scipy.optimize import least_squares

    torch.manual_seed(0)
    settings = Settings(train_size=32, test_size=1)
    pde, grid, train, _ = instances(settings, 0)
    periodic = Grid(periodic=("x",), t=torch.linspace(0, 0.5, 32), x=torch.arange(48) / 48)
    waves = torch.randn(32, 1, dtype=torch.float64).exp() * torch.sin(2 * math.pi * periodic.axes["x"])
    solver, start = LevenbergMarquardt(max_steps=settings.max_iterations), torch.ones(128, 8, dtype=torch.float64)
    limits = {"method": "lm", "xtol": 1e-4, "ftol": 1e-4, "gtol": 1e-4, "max_nfev": settings.max_iterations}
    for equation, mesh, initial in ((pde, grid, train[:, 0]), (Burgers1D(0.02), periodic, waves)):
        basis = Tanh(8, 64)(inputs(mesh, initial).float()).detach().double()
        for points in (32, 384):
            problem = ExpertConstraint(equation, (4, 1), points).problem(basis, mesh, initial)
            single = [arrays(equation, problem, n) for n in range(128)]
            bench.compare(
                f"{type(equation).__name__}, 128 solves with {points} points, K = 8",
                ours=lambda problem=problem: solver(problem.compressed(), start),
                scipy=lambda single=single: [least_squares(f, np.ones(8), jac, **limits) for f, jac in single],
            )
