"""Measures neural differential equations: solvers, gradients, Brownian motion, formulas from a learned field, irregular
series, latent SDEs and implicit layers.

Longer than others because the thesis has six parts, each with a problem of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import sympy
import torch
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.expressions import Expression
from torchfolio.dynamics.implicit import jacobian_penalty
from torchfolio.dynamics.vector_fields import FormulaField, VectorField
from torchfolio.measure import saved_bytes
from torchfolio.runs import Results, Run, plots, threads


@dataclass(frozen=True)
class Settings:
    """Sizes.

    Attributes:
        steps: steps over which gradients are compared.
        seeds: seeds over which the law of Brownian increments is measured.
        paths: paths of the Ornstein-Uhlenbeck process, and of geometric Brownian motion.
        trajectories: trajectories of the oscillator.
        ode_steps: evaluations when the neural ODE is trained, three quarters of them on the first tenth of the horizon.
        points: visited states on which formulas are searched.
        populations: populations of the search.
        rounds: rounds of the search.
        tune_steps: evaluations when the formulas' constants are tuned.
        series: series of each of training and test set.
        length: points of a series.
        cde_steps: training steps of a neural CDE.
        latent_steps: training steps of the latent SDE.
        deq_steps: training steps of the equilibrium network, and of the weight-tied one beside it.
    """

    steps: int = 200
    seeds: int = 10_000
    paths: int = 2000
    trajectories: int = 64
    ode_steps: int = 400
    points: int = 400
    populations: int = 16
    rounds: int = 10
    tune_steps: int = 30
    series: int = 256
    length: int = 24
    cde_steps: int = 120
    latent_steps: int = 60
    deq_steps: int = 150


SCALES = {
    "smoke": Settings(100, 200, 200, 8, 10, 100, 3, 2, 4, 32, 8, 6, 4, 6),
    "quick": Settings(),
    "full": Settings(
        trajectories=256,
        ode_steps=2000,
        populations=100,
        tune_steps=500,
        cde_steps=600,
        latent_steps=1000,
        deq_steps=500,
    ),
}
SOLVERS = (de.Euler, de.Midpoint, de.Heun, de.Ralston, de.Bosh3, de.RK4, de.Dopri5, de.Tsit5, de.ReversibleHeun)


def run(run: Run[Settings]) -> None:
    """Everything on one thread: the networks are small."""
    with threads(1):
        run.values("order", **run.arm("order", _order))
        run.values("exact_gradient", **run.arm("gradients", _gradients, run.settings, run.seed))
        run.values("brownian_motion", **run.arm("brownian", _brownian, run.settings, run.seed))
        _symbolic(run)
        _series(run)
        run.arm("latent", _latent, run.settings, run.seed)
        run.values("implicit_layers", **run.arm("implicit", _implicit, run))


# 1 Orders


def _order() -> dict[str, float]:
    ts = torch.linspace(0, 5, 17, dtype=torch.float64)
    exact = 1.5 * (-ts).exp() + (ts.sin() - ts.cos()) / 2
    field, one = (lambda t, y: -y + torch.sin(t)), torch.ones(1, dtype=torch.float64)

    def error(solver: de.ReversibleHeun | Any, **options: Any) -> float:
        return float((de.odeint(field, one, ts, solver, **options).ys[:, 0] - exact).abs().max())

    slopes = {s.__name__: math.log2(error(s(), dt=5 / 80) / error(s(), dt=5 / 160)) for s in SOLVERS}
    ys = de.odeint(field, one, ts, de.Dopri5(), rtol=1e-6, atol=1e-8).ys[:, 0].numpy()
    reference = solve_ivp(lambda t, y: -y + np.sin(t), (0, 5), [1.0], "DOP853", ts.numpy(), rtol=1e-12, atol=1e-12).y[0]
    worst = max(abs(slopes[s.__name__] - s.order) for s in SOLVERS)
    adaptive = float(np.abs(ys - exact.numpy()).max())
    return {
        "worst_slope": worst,
        "adaptive_error": adaptive,
        "reference_gap": float(np.abs(ys - reference).max()),
        **slopes,
    }


# 2 Gradients


class _Tanh(nn.Module):
    """Three tanh layers and a bounded forcing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = ((3, 32), (32, 32), (32, 3))
        self.net = nn.Sequential(*(m for n, k in sizes for m in (nn.Linear(n, k), nn.Tanh()))).to(dtype)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 4 * self.net(y) + torch.cos(2 * t)


def _gradients(settings: Settings, seed: int) -> dict[str, float]:
    values: dict[str, list[float]] = {"single": [], "double": [], "adjoint": []}
    dt = 0.125
    horizon = settings.steps * dt
    for dtype, name in ((torch.float32, "single"), (torch.float64, "double")):
        field = _Tanh(dtype)
        y0 = torch.randn(8, 3, dtype=dtype)
        noise = {
            "additive": lambda t, y: torch.full_like(y, 0.3),
            "diagonal": VectorField(3, 16, 1, activation=nn.Tanh()).to(dtype),
        }
        solves: list[Callable[[Tensor, Any, Any], Tensor]] = [
            lambda y, solver, mode, f=field: de.odeint(f, y, [0, 0.3 * horizon, horizon], solver, mode, dt=dt).ys
        ]
        for kind, diffusion in noise.items():
            sde = de.SDE(field, diffusion, kind)
            params = list(field.parameters())
            solves.append(
                lambda y, solver, mode, sde=sde, p=params: (
                    de.sdeint(sde, y, [0, 0.3 * horizon, horizon], solver, mode, dt=dt, seed=seed, params=p).ys
                )
            )
        for k, solve in enumerate(solves):
            exact, reverse = (
                _gradient(solve, y0, field, de.ReversibleHeun(), m) for m in (de.Direct(), de.Reversible())
            )
            values[name].append(_gap(reverse, exact))
            solver = de.Heun() if k else de.ReversibleHeun()  # stochastic adjoints are solved by Heun's method
            exact, adjoint = (_gradient(solve, y0, field, solver, mode) for mode in (de.Direct(), de.Adjoint()))
            values["adjoint"].append(_gap(adjoint, exact))
    field, y0 = _Tanh(torch.float32), torch.randn(8, 3)

    def held(gradient: Any, steps: int) -> int:
        def forward() -> Tensor:
            return de.odeint(field, y0.clone().requires_grad_(), [0, 5], de.ReversibleHeun(), gradient, dt=5 / steps).ys

        kept: list[Tensor] = []
        return saved_bytes(lambda: kept.append(forward()), exclude=field).peak

    ratios = {
        name: held(g, 400) / held(g, 50) for name, g in (("growth", de.Reversible()), ("growth_direct", de.Direct()))
    }
    return {
        "single": max(values["single"]),
        "double": max(values["double"]),
        "adjoint": min(values["adjoint"]),
        **ratios,
    }


def _gradient(solve: Callable[..., Tensor], y0: Tensor, field: nn.Module, solver: Any, mode: Any) -> Tensor:
    y = y0.clone().requires_grad_()
    grads = torch.autograd.grad(solve(y, solver, mode).square().sum(), [y, *field.parameters()])
    return torch.cat([grad.flatten() for grad in grads])


def _gap(x: Tensor, y: Tensor) -> float:
    return float((x - y).norm() / y.norm())


# 3 Brownian motion


def _brownian(settings: Settings, seed: int) -> dict[str, float]:
    w, rng = de.BrownianInterval(0.0, 1.0, (8,), seed), np.random.default_rng(seed)
    queries = [tuple(sorted(rng.random(3))) for _ in range(300)]
    first = [w(s, t) for s, _, t in queries]
    additivity = max(float((w(s, m) + w(m, t) - v).abs().max()) for (s, m, t), v in zip(queries, first, strict=True))
    order = rng.permutation(len(queries))
    repeat = max(float((w(queries[i][0], queries[i][2]) - first[i]).abs().max()) for i in order)
    base = seed * settings.seeds
    draws = torch.stack([de.BrownianInterval(0.0, 1.0, (), base + k)(0.3, 0.9) for k in range(settings.seeds)])
    theta, sigma = 1.0, 0.7
    ou = de.SDE(lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma), "additive", "ito")
    ys = de.sdeint(ou, torch.zeros(settings.paths, 1), torch.arange(0.0, 21.0), de.Euler(), dt=0.01, seed=seed).ys[6:]
    n = min(400, settings.paths)
    w = de.BrownianInterval(0.0, 1.0, (n, 1), seed, dtype=torch.float64)
    gbm = de.SDE(lambda t, y: torch.zeros_like(y), lambda t, y: y)
    errors = []
    for steps in (16, 64, 256):
        end = de.sdeint(gbm, torch.ones(n, 1).double(), [0, 1], dt=1 / steps, brownian=w).ys[-1]
        errors.append(float((end - w(0, 1).exp()).abs().mean()))
    return {
        "additivity": additivity,
        "repeat": repeat,
        "mean_sigmas": abs(float(draws.mean())) / math.sqrt(0.6 / settings.seeds),
        "variance_error": abs(float(draws.var()) / 0.6 - 1),
        "ou_error": abs(float(ys.var()) / (sigma**2 / (2 * theta)) - 1),
        "strong_slope": math.log(errors[0] / errors[2]) / math.log(16),
    }


# 4 Formulas


def _oscillator(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack([b / (1 + b), -a / (1 + a)], -1)


def _symbolic(run: Run[Settings]) -> None:
    formulas = run.arm("formulas", _formulas, run)
    run.values("symbolic", **{name: formulas[name] for name in ("recovered", "constants_off", "shuffled_score")})


def _formulas(run: Run[Settings]) -> dict[str, Any]:
    """Train a neural ODE, search formulas for its field on visited states, put them back and tune their constants."""
    s = run.settings
    y0, ts = torch.rand(s.trajectories, 2) * 1.6 - 0.6, torch.linspace(0, 10, 100)
    data = de.odeint(_oscillator, y0.double(), ts.double(), rtol=1e-8, atol=1e-10).ys.float()
    field = VectorField(2, 64, 2, activation=nn.Tanh())
    losses = _train_field(field, y0, ts[:10], data[:10], 3 * s.ode_steps // 4, dt=10 / 99)
    losses += _train_field(field, y0, ts, data, s.ode_steps // 4, dt=20 / 99)
    states = data.flatten(0, 1)[torch.randperm(data.shape[0] * data.shape[1])[: s.points]]
    with torch.no_grad():
        slopes = field(torch.tensor(0.0), states)
    search: dict[str, Any] = {"populations": s.populations, "rounds": s.rounds, "random_state": run.seed}
    X, targets = states.double().numpy(), slopes.double().numpy().T
    fits = [de.SymbolicRegressor(**search).fit(X, y) for y in targets]
    shuffled = [de.SymbolicRegressor(**search).fit(X, np.random.permutation(y)) for y in targets]  # noqa: NPY002
    formulas = FormulaField([fit.expression_ for fit in fits])
    _train_field(formulas, y0, ts, data, s.tune_steps, dt=10 / 99)
    formulas.snap(0.01)
    errors = [_constants_off(e, k) for k, e in enumerate(formulas.expressions)]
    scores = [[max(c.score for c in fit.pareto_) for fit in group] for group in (fits, shuffled)]
    return {
        "recovered": sum(error is not None for error in errors),
        "constants_off": max(1.0 if error is None else error for error in errors),
        "shuffled_score": max(b / a if a else 1.0 for a, b in zip(*scores, strict=True)),
        "formulas": [str(e) for e in formulas.expressions],
        "losses": losses,
    }


def _train_field(field: nn.Module, y0: Tensor, ts: Tensor, data: Tensor, steps: int, dt: float) -> list[float]:
    """Fit a field to trajectories by L-BFGS: fixed steps make the loss a smooth function."""
    losses: list[float] = []
    if not any(p.numel() for p in field.parameters()):
        return losses
    optimizer = torch.optim.LBFGS(
        field.parameters(), max_iter=steps, max_eval=steps, history_size=30, line_search_fn="strong_wolfe"
    )
    optimizer.param_groups[0].update(tolerance_grad=1e-9, tolerance_change=1e-12)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (de.odeint(field, y0, ts, de.RK4(), de.Direct(), dt=dt).ys - data).square().mean()
        value.backward()
        losses.append(float(value.detach()))
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return losses


def _constants_off(expression: Expression, k: int) -> float | None:
    """Largest error in the constants of ±x / (1 + x), written with 1 below; None if the formula is another one."""
    x = sympy.Symbol(f"x{1 - k}")
    top, bottom = sympy.fraction(sympy.cancel(sympy.together(sympy.nsimplify(expression.to_sympy(), rational=True))))
    if (top.free_symbols | bottom.free_symbols) != {x}:
        return None
    a, b = (sympy.Poly(part, x).all_coeffs()[::-1] for part in (top, bottom))
    if len(a) != 2 or len(b) != 2 or b[0] == 0:
        return None
    return float(max(abs(a[0] / b[0]), abs(a[1] / b[0] - (1 - 2 * k)), abs(b[1] / b[0] - 1)))


# 5 Irregular series


def _spirals(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Clockwise and anticlockwise spirals from random angles, with 30 % of the points missing."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    angle = 2 * math.pi * (torch.rand(n) + (2 * y - 1) * 2 * t[:, None])
    x = torch.stack([angle.cos(), angle.sin()], -1) * (0.2 + t)[:, None, None]
    gone = torch.rand(length, n) < 0.3
    gone[0] = False
    return t, x.masked_fill(gone[..., None], math.nan), y


def _speeds(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same straight paths, walked steadily or with a late rush: only the speed differs."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    share = torch.where(y == 1, t[:, None] ** 3, t[:, None])
    return t, 0.5 * torch.randn(n, 2) + share[..., None] * F.normalize(torch.randn(n, 2), dim=-1), y


def _starts(n: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same movements from the left or from the right: only the first value differs."""
    t, y = torch.linspace(0, 1, length), torch.arange(n) % 2
    x = (torch.randn(length, n, 2) / length**0.5).cumsum(0)
    return t, x - x[0] + torch.stack([2.0 * y - 1, torch.zeros(n)], -1), y


class _FixedStart(de.NeuralCDE):
    """A neural CDE whose start does not depend on the series (negative control)."""

    def start(self, control: de.Control) -> Tensor:
        return self.initial(torch.zeros_like(control.evaluate(control.t0)))


def _series(run: Run[Settings]) -> None:
    arms = {
        "spirals": (_spirals, de.NeuralCDE, True),
        "speeds": (_speeds, de.NeuralCDE, True),
        "speeds_without_time": (_speeds, de.NeuralCDE, False),
        "starts": (_starts, de.NeuralCDE, True),
        "starts_with_fixed_start": (_starts, _FixedStart, True),
    }
    run.values(
        "irregular_series",
        **{name: run.arm(name, _classify, run.settings, *arm)["accuracy"] for name, arm in arms.items()},
    )


def _classify(s: Settings, task: Callable[..., Any], kind: type[de.NeuralCDE], time: bool) -> dict[str, Any]:
    t, x, y = task(2 * s.series, s.length)
    model = kind(2, 8, 2, width=32, append_time=time, solver=de.Midpoint(), gradient=de.Direct())
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.cde_steps)
    for _ in range(s.cde_steps):
        loss = F.cross_entropy(model(x[:, : s.series], t), y[: s.series])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        accuracy = (model(x[:, s.series :], t).argmax(-1) == y[s.series :]).float().mean()
    return {"accuracy": 100 * float(accuracy), "losses": losses}


# 6 Latent SDE


def _latent(s: Settings, seed: int) -> dict[str, Any]:
    """A latent SDE of an Ornstein-Uhlenbeck process; its prior's mean and deviation over time beside the data's."""
    ts = torch.linspace(0, 2, 11)
    ou = de.SDE(lambda t, y: -y, lambda t, y: torch.full_like(y, 0.5), "additive", "ito")
    x = de.sdeint(ou, 1.5 + 0.2 * torch.randn(s.series, 1), ts, dt=0.02, seed=seed).ys
    model = de.LatentSDE(1, latent=2, context=8, width=16, dt=0.1)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for step in range(s.latent_steps):
        loss = model.loss(x, ts, kl_weight=min(1.0, step / (0.2 * s.latent_steps)), seed=seed * s.latent_steps + step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    drawn = model.sample(1000, ts, seed)
    moments = {name: torch.cat([v.mean((1, 2)), v.std((1, 2))]) for name, v in (("data", x), ("model", drawn))}
    return {"losses": losses, "ts": ts, **moments}


# 7 Implicit layers


class _Cell(nn.Module):
    """z ← tanh(W z + U x), with W small enough at first to contract."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(channels, width)
        with torch.no_grad():
            self.inner.weight *= 0.8

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(z) + self.outer(x))


def _implicit(run: Run[Settings]) -> dict[str, float]:
    s, data, width = run.settings, run.data("digits"), 64
    x, x_test = (part.tensors[0].flatten(1) for part in (data.train, data.test))
    y, y_test = data.train.tensors[1], data.test.tensors[1]
    values: dict[str, float] = {}
    for name in ("deq", "tied"):
        cell, readout = _Cell(x.shape[1], width), nn.Linear(width, 10)
        deq = de.DEQ(cell, width)

        def layer(v: Tensor, name: str = name, cell: _Cell = cell, deq: de.DEQ = deq) -> Tensor:
            return deq(v) if name == "deq" else _unrolled(cell, v, width, 10)

        optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], 1e-3)
        for _ in range(s.deq_steps):
            rows = torch.randint(len(x), (128,))
            z = layer(x[rows])
            loss = F.cross_entropy(readout(z), y[rows])
            if name == "deq":  # keeps the equilibrium easy to find
                loss = loss + 4 * jacobian_penalty(cell, z, x[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            values[f"accuracy_{name}"] = 100 * float((readout(layer(x_test)).argmax(-1) == y_test).float().mean())
        if name == "deq":
            values |= _equilibrium(deq, cell, x[:128], width)
    return {**values, **_quadratic(run.seed)}


def _unrolled(cell: _Cell, x: Tensor, width: int, steps: int) -> Tensor:
    z = x.new_zeros(len(x), width)
    for _ in range(steps):
        z = cell(z, x)
    return z


def _equilibrium(deq: de.DEQ, cell: _Cell, x: Tensor, width: int) -> dict[str, float]:
    weight, params = torch.randn(len(x), width), list(cell.parameters())
    held, grads = [], []
    for solve in (lambda: deq(x), lambda: _unrolled(cell, x, width, 60)):
        held.append(saved_bytes(lambda solve=solve: (solve() * weight).sum().backward(), exclude=[cell, x]).peak)
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad((solve() * weight).sum(), params)]))
    with torch.no_grad():
        z = deq(x)
        residual = ((cell(z, x) - z).norm(dim=-1) / z.norm(dim=-1)).max()
    cosine = F.cosine_similarity(grads[0].double(), grads[1].double(), 0)
    return {"residual": float(residual), "cosine": float(cosine), "memory": held[0] / held[1]}


def _quadratic(seed: int) -> dict[str, float]:
    """A quadratic program without constraints against its formula, and with them against finite differences."""
    generator = torch.Generator().manual_seed(seed)
    root, p, G = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((4, 4), (4,), (3, 4)))
    layer, Q, h = de.QPLayer(), root @ root.T + torch.eye(4).double(), torch.full((3,), 0.2).double()
    free = float((layer(Q, p) + torch.linalg.solve(Q, p)).abs().max())
    inputs = [v.requires_grad_() for v in (Q, p, G, h)]
    weight = torch.arange(1.0, 5).double()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(layer(*inputs) @ weight, inputs)])
    flat = torch.cat([v.detach().flatten() for v in inputs])

    def value(v: Tensor) -> Tensor:
        parts = [part.view_as(old) for part, old in zip(v.split([i.numel() for i in inputs]), inputs, strict=True)]
        return layer(*parts) @ weight

    eye = 1e-5 * torch.eye(len(flat)).double()
    with torch.no_grad():
        numeric = torch.stack([(value(flat + e) - value(flat - e)) / 2e-5 for e in eye])
    return {"qp_free": free, "qp_gradient": float((exact - numeric).abs().max())}


def figures(results: Results) -> dict[str, Figure]:
    """Training losses of the parts, and the latent SDE beside its data."""
    curves = {
        name: (name, "losses") for name in ("spirals", "speeds", "speeds_without_time", "starts_with_fixed_start")
    }
    latent = {"data": ("latent", "data"), "prior of the latent SDE": ("latent", "model")}
    return {
        "neural CDE": plots.curves(results, curves, xlabel="step", ylabel="loss"),
        "neural ODE": _oscillator_losses(results),
        "latent SDE": plots.curves(results, latent, xlabel="mean at 11 times, then deviation", ylabel="value"),
    }


def _oscillator_losses(results: Results) -> Figure:
    """One line a seed: line searches end after different numbers of evaluations."""
    fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
    for seed, arms in zip(results.seeds, results.arms, strict=True):
        ax.semilogy(np.asarray(arms["formulas"]["losses"]), lw=1, label=f"seed {seed}")
    ax.set(xlabel="evaluation", ylabel="loss")
    ax.legend(fontsize=8)
    return fig


def peers(bench: Any) -> None:
    """A small field over 30 outputs with torchdiffeq, and a sweep of Brownian increments with torchsde."""
    import torchdiffeq  # pyright: ignore[reportMissingImports]
    import torchsde  # pyright: ignore[reportMissingImports]

    field, y0, ts = VectorField(4, 64), torch.randn(64, 4), torch.linspace(0, 10, 30)
    tolerance: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}

    def train(solve: Callable[[Tensor], Any]) -> None:
        solve(y0.clone().requires_grad_()).square().mean().backward()

    theirs: dict[str, Any] = {"method": "dopri5", **tolerance}
    options = {"norm": "seminorm"}
    bench.compare(
        "dopri5, backpropagated",
        ours=lambda: train(lambda y: de.odeint(field, y, ts, de.Dopri5(), de.Direct(), **tolerance).ys),
        torchdiffeq=lambda: train(lambda y: torchdiffeq.odeint(field, y, ts, **theirs)),
    )
    bench.compare(
        "dopri5, adjoint with seminorm",
        ours=lambda: train(lambda y: de.odeint(field, y, ts, de.Dopri5(), de.Adjoint(), **tolerance).ys),
        torchdiffeq=lambda: train(
            lambda y: torchdiffeq.odeint_adjoint(field, y, ts, **theirs, adjoint_options=options)
        ),
    )
    n, shape = 1000, (128, 4)

    def sweep(w: Any) -> None:
        for k in [*range(n), *reversed(range(n))]:
            w(k / n, (k + 1) / n)

    def peer() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sweep(torchsde.BrownianInterval(0.0, 1.0, size=shape, entropy=0, dt=1 / n))

    grid = [k / n for k in range(n + 1)]
    bench.compare(
        "Brownian grid, 1,000 steps there and back", ours=lambda: sweep(de.BrownianGrid(grid, shape)), torchsde=peer
    )
    bench.compare(
        "Brownian interval, 1,000 steps there and back",
        ours=lambda: sweep(de.BrownianInterval(0, 1, shape)),
        torchsde=peer,
    )
