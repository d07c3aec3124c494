"""Measures hard constraints and experts on diffusion-sorption: accuracy, gradients, optimality, cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from torchfolio.dynamics.physics_moe import (
    FNO,
    PDE,
    Burgers1D,
    DiffusionSorption1D,
    ExpertConstraint,
    Grid,
    HardConstraint,
    LevenbergMarquardt,
    equation_loss,
)
from torchfolio.dynamics.pointwise_rows import RowProblem
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
        width: of the network.
        fno: whether it is a Fourier neural operator; a tanh network on (t, x, start at x, mean start) otherwise.
        steps: of Adam, at which all are compared.
        lr: of Adam, falling as a cosine.
        batch_size: instances of a step.
        max_iterations: of a solve.
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
    "full": Settings(mesh=(64, 256), train_size=60, test_size=20, basis=16, points=2000, fno=True, width=32, steps=4000, lr=1e-3,
                     batch_size=6, max_iterations=30),
}  # fmt: skip
UNIT = 450.0  # the window's length: its time runs from 0 to 1


class Tanh(nn.Module):
    """Basis functions by a perceptron on (t, x, start at x, mean start), spread widely enough to be of use untrained."""

    def __init__(self, outputs: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for k in range(3):
            layers += [nn.Linear(4 if k == 0 else width, width), nn.Tanh()]
        self.net = nn.Sequential(*layers, nn.Linear(width, outputs))
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight, 1.5)
                nn.init.normal_(layer.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def inputs(grid: Grid, initial: Tensor) -> Tensor:
    """Coordinates, the start at x and its mean, at every point: `[B, T, X, 4]`."""
    points = grid.points().to(initial).expand(len(initial), *grid.shape, 2)
    start = initial[:, None].expand(-1, *grid.shape)
    return torch.cat([points, start[..., None], initial.mean(1).view(-1, 1, 1, 1).expand(*start.shape, 1)], -1)


def reference(settings: Settings, starts: np.ndarray, pde: DiffusionSorption1D, finer: int = 4) -> tuple[Grid, Tensor]:
    """Solutions by the method of lines on a finer grid: the mesh of the window, `[N, T, X]`."""
    from scipy.integrate import solve_ivp

    nt, nx = settings.mesh
    n = finer * (nx - 1) + 1
    h, times = 1 / (n - 1), np.linspace(50, 50 + UNIT, nt)
    d = pde.diffusion

    def slope(_t: float, inside: np.ndarray) -> np.ndarray:
        # u = 1 at the left end, u = D u_x by one-sided differences of second order at the right one
        end = d * (-4 * inside[-1] + inside[-2]) / (2 * h - 3 * d)
        u = np.concatenate([[1.0], inside, [end]])
        speed = d / pde.retardation(torch.from_numpy(inside)).numpy()
        return speed * (u[2:] - 2 * u[1:-1] + u[:-2]) / h**2

    found = []
    for start in starts:
        inside = solve_ivp(slope, (0, times[-1]), np.full(n - 2, start), "LSODA", times, rtol=1e-7, atol=1e-9,
                           lband=1, uband=1).y.T  # fmt: skip
        end = d * (-4 * inside[:, -1:] + inside[:, -2:-1]) / (2 * h - 3 * d)
        found.append(np.concatenate([np.ones_like(end), inside, end], 1)[:, ::finer])
    grid = Grid(t=torch.linspace(0, 1, nt, dtype=torch.float64), x=torch.linspace(0, 1, nx, dtype=torch.float64))
    return grid, torch.from_numpy(np.stack(found))


def instances(settings: Settings, seed: int) -> tuple[DiffusionSorption1D, Grid, Tensor, Tensor]:
    """The equation in the window's time, its grid, training and test solutions."""
    starts = np.random.default_rng(seed).uniform(0.01, 0.19, settings.train_size + settings.test_size)
    grid, u = reference(settings, starts, DiffusionSorption1D())
    return DiffusionSorption1D(time_unit=UNIT), grid, u[: settings.train_size], u[settings.train_size :]


def network(settings: Settings, outputs: int) -> nn.Module:
    if settings.fno:
        return FNO(4, outputs, (8, 8), settings.width, 5)
    return Tanh(outputs, settings.width)


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
    return {"error": relative(u, test).tolist(), "losses": losses, "loss": final, "floor": floor, "field": u[0], "truth": test[0],
            "residual": float(residual.mean().sqrt()), "residual_off_seams": float(residual[:, inner].mean().sqrt())}  # fmt: skip


def gradient_errors(settings: Settings, seed: int, name: str) -> dict[str, float]:
    """Relative error of the implicit gradient, and of its Gauss-Newton variant, against central differences."""
    if name == "burgers":
        n, m = (16, 24)
        grid = Grid(periodic=("x",), t=torch.linspace(0, 0.5, n), x=torch.arange(m) / m)
        pde, initial = Burgers1D(0.02), torch.sin(2 * math.pi * grid.axes["x"])[None]
    else:
        pde, grid, train, _ = instances(settings, seed)
        initial = train[:1, 0]
    torch.manual_seed(seed)
    net = Tanh(4, 16).double()
    probe = torch.randn(grid.shape, dtype=torch.float64)

    def loss(hessian: str = "full") -> Tensor:
        solver = LevenbergMarquardt(tol=1e-12, max_steps=200)
        layer = HardConstraint(pde, solver=solver, hessian=hessian, stationary=1e-6)
        return (layer(net(inputs(grid, initial)), grid, initial).u * probe).sum()

    weights = list(net.parameters())
    full, newton = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss(h), weights)]) for h in ("full", "gauss_newton")
    )
    chosen = torch.randperm(len(full))[: settings.entries]
    flat, h = nn.utils.parameters_to_vector(weights).detach(), 1e-5
    differences = torch.zeros(len(chosen), dtype=torch.float64)
    with torch.no_grad():
        for k, entry in enumerate(chosen):
            for sign in (1, -1):
                moved = flat.clone()
                moved[entry] += sign * h
                nn.utils.vector_to_parameters(moved, weights)
                differences[k] += sign * loss() / (2 * h)
    error = [float((g[chosen] - differences).norm() / differences.norm()) for g in (full, newton)]
    return {"full": error[0], "gauss_newton": error[1]}


def optimum(settings: Settings, seed: int) -> dict[str, float]:
    """Every expert's objective over that of the global solution on the same rows: the largest."""
    pde, grid, _, test = instances(settings, seed)
    torch.manual_seed(seed)
    basis, initial = network(settings, settings.basis)(inputs(grid, test[:, 0]).float()).detach().double(), test[:, 0]
    solver, worst = LevenbergMarquardt(tol=1e-8, max_steps=100), 0.0
    whole = HardConstraint(pde, solver=solver)(basis, grid, initial).weights
    for experts in (settings.experts, settings.experts[::-1], (2, 2)):
        found = ExpertConstraint(pde, experts, solver=solver)(basis, grid, initial, start=whole)
        worst = max(worst, float((found.residual_after / found.residual_before).max()))
    return {"worst": worst}


def cost(settings: Settings, seed: int) -> dict[str, Any]:
    """CPU seconds of the layer by points for a fixed number of steps, and the Jacobian's bytes an expert."""
    pde, grid, _, test = instances(
        replace(settings, mesh=(64, 48) if max(settings.sizes) > 200 else settings.mesh), seed
    )
    basis = torch.randn(1, *grid.shape, settings.basis, dtype=torch.float64, requires_grad=True)
    solver, initial = LevenbergMarquardt(tol=1e-300, max_steps=8), test[:1, 0]

    def once(layer: ExpertConstraint) -> float:
        start = time.thread_time()
        layer(basis, grid, initial).u.sum().backward()
        return time.thread_time() - start

    seconds = [
        min(once(HardConstraint(pde, p, solver=solver, stationary=1e9)) for _ in range(7)) for p in settings.sizes
    ]
    slope = float(np.polyfit(np.log(settings.sizes), np.log(seconds), 1)[0])
    total = max(settings.sizes)
    rows = {}
    for count in (1, 4):
        problem = ExpertConstraint(pde, (count, 1), total // count).problem(basis.detach(), grid, initial)
        jacobian = problem.linearise(torch.ones(count, settings.basis, dtype=torch.float64))[1]
        rows[count] = (jacobian.nbytes / count, problem.groups[0].terms.shape[2])
    return {"points": list(settings.sizes), "seconds": seconds, "slope": slope, "jacobian": rows[4][0] / rows[1][0],
            "equation_rows": rows[4][1] / rows[1][1]}  # fmt: skip


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


def arrays(pde: PDE, problem: RowProblem, n: int) -> tuple[Callable, Callable]:
    """One problem's residual and Jacobian in NumPy, its linear rows stacked beforehand."""
    groups, c = (
        [{name: t.numpy() for name, t in zip(g.names, g.terms[n], strict=True)} for g in problem.groups],
        problem.scale,
    )
    equation = {name: c[0] * t for name, t in groups[0].items()}
    values, initial = groups[0]["u"], problem.groups[1].constants["initial"][n].numpy()
    linear, wanted = (
        [problem.ridge * np.eye(values.shape[1]), c[1] * groups[1]["u"]],
        [np.zeros(values.shape[1]), c[1] * initial],
    )
    if isinstance(pde, DiffusionSorption1D):
        linear += [c[2] * groups[2]["u"], c[3] * (groups[3]["u"] - pde.diffusion * groups[3]["u_x"])]
        wanted += [np.full(len(groups[2]["u"]), c[2]), np.zeros(len(groups[3]["u"]))]
        power, speed = pde.exponent - 1, pde.time_unit * pde.diffusion

        def bent(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            inside = values @ w
            base, curved = np.maximum(inside, 0) + 1e-6, equation["u_xx"] @ w
            rate = speed / (1 + pde.retention * base**power)
            bend = (inside > 0) * rate**2 / speed * pde.retention * power * base ** (power - 1) * curved
            return equation["u_t"] @ w - rate * curved, equation["u_t"] - rate[:, None] * equation["u_xx"] + bend[
                :, None
            ] * values
    else:
        straight = equation["u_t"] - 0.02 * equation["u_xx"]

        def bent(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            u, u_x = values @ w, equation["u_x"] @ w
            return straight @ w + u * u_x, straight + u[:, None] * equation["u_x"] + u_x[:, None] * values

    rows, right = np.concatenate(linear), np.concatenate(wanted)
    return lambda w: np.concatenate([bent(w)[0], rows @ w - right]), lambda w: np.concatenate([bent(w)[1], rows])


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
