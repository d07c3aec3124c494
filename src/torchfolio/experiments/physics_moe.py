"""Measures hard constraints and experts on diffusion-sorption: accuracy, gradients, optimality, cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.dynamics.physics_moe import DiffusionSorption1D, ExpertConstraint, LevenbergMarquardt, equation_loss
from torchfolio.experiments._constraint_solves import cost, gradient_errors, optimum
from torchfolio.experiments._diffusion_sorption import inputs, instances, network
from torchfolio.runs import Results, Run, pick, plots, setting, threads


@dataclass(frozen=True)
class Settings:
    """Diffusion-sorption on the smooth window from t = 50 to 500."""

    mesh: tuple[int, int] = setting((32, 48), "points in time and space")
    train_size: int = setting(7, "instances to learn from")
    test_size: int = setting(5, "instances to judge on")
    basis: int = setting(8, "number K of basis functions")
    points: int = setting(32, "grid points at which a solve sees the equation")
    experts: tuple[int, int] = setting((4, 1), "blocks in time and space")
    width: int = setting(64, "width of the network")
    fno: bool = setting(
        False, "whether it is a Fourier neural operator; a tanh network on (t, x, start at x, mean start) otherwise"
    )
    steps: int = setting(100, "number of steps of Adam, at which all are compared")
    lr: float = setting(2e-3, "learning rate of Adam, falling as a cosine")
    batch_size: int = setting(3, "instances of a step")
    max_iterations: int = setting(15, "maximum number of iterations of a solve")
    stationary: float = setting(
        0.1, "relative gradient up to which a solve passes its gradient on; retardation has a kink at u = 0"
    )
    entries: int = setting(24, "random entries of the parameters for the gradient check")
    sizes: tuple[int, ...] = setting((200, 400, 800, 1600), "sampled points for the timing")


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
    points, order = run.generator(), run.generator()

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
        run.values("scaling", pick(costs, "slope", "jacobian", "equation_rows"))
        arms = {kind: run.arm(kind, trained, run, kind) for kind in ("soft", "global", "experts", "detached")}
    error = {kind: float(np.median(arm["error"])) for kind, arm in arms.items()}
    named = {"soft": error["soft"], "one": error["global"], "experts": error["experts"]}
    run.values("hard_beats_soft", named)
    run.values("experts_accuracy", pick(named, "one", "experts"),
               seams=arms["experts"]["residual"] / arms["experts"]["residual_off_seams"])  # fmt: skip
    run.values("negative_control", ratio=arms["detached"]["loss"] / arms["global"]["loss"],
               floor=arms["global"]["floor"], loss=arms["global"]["loss"])  # fmt: skip


def figures(results: Results) -> plots.Figures:
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
