"""Brownian motion, solvers of stochastic equations, and gradients through them."""

import copy
import itertools
import math
import pickle
import random

import pytest
import torch
from torch import nn

from torchfolio.dynamics.brownian import BrownianGrid, BrownianInterval, joined_area
from torchfolio.dynamics.gradients import Adjoint, Checkpoint, Direct, Reversible
from torchfolio.dynamics.integrate import sdeint
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import RK4, Euler, Heun, Midpoint, Ralston
from torchfolio.dynamics.sde import SDE
from torchfolio.dynamics.sde_solvers import EulerHeun, Milstein, ShARK
from torchfolio.dynamics.stepping import SolveError
from torchfolio.measure import saved_bytes

# Brownian motion


def test_interval_is_one_path():
    w, rng, queries = BrownianInterval(0.0, 1.0, (5,), seed=3), random.Random(0), {}
    for _ in range(500):
        a, m, b = sorted(rng.choice([rng.random(), round(rng.random(), 1)]) for _ in range(3))
        if a < b:
            queries[a, b] = w(a, b)
            assert float((w(a, m) + w(m, b) - queries[a, b]).abs().max()) <= 1e-6
    for (a, b), value in rng.sample(sorted(queries.items()), len(queries)):
        assert torch.equal(w(a, b), value)
        assert torch.equal(w(b, a), -value)
    again = pickle.loads(pickle.dumps(BrownianInterval(0.0, 1.0, (5,), seed=3)))
    assert torch.equal(again(0.2, 0.4), BrownianInterval(0.0, 1.0, (5,), seed=3)(0.2, 0.4))
    assert torch.equal(copy.deepcopy(w)(0.123, 0.77), w(0.123, 0.77))


def test_interval_at_constant_memory_with_sweeps_both_ways():
    w, n = BrownianInterval(0.0, 1.0, (2,)), 700
    forwards = [w(k / n, (k + 1) / n) for k in range(n)]
    backwards = [w(k / n, (k + 1) / n) for k in reversed(range(n))]
    for x, y in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(x, y)
    assert len(w._values) <= w.cache
    torch.testing.assert_close(sum(forwards), w(0, 1), atol=1e-5, rtol=0)
    w(0.5, math.nextafter(0.5, 1))  # leaves no sliver


@pytest.mark.parametrize("kind", ["interval", "grid"])
def test_law_of_increments(kind):
    times = [0.0, 0.3, 0.9, 1.1, 2.0]

    def path(seed):
        return BrownianInterval(0.0, 2.0, (), seed) if kind == "interval" else BrownianGrid(times, (), seed, block=2)

    n = 2000
    x = torch.stack([torch.stack([w(s, t) for s, t in itertools.pairwise(times)]) for w in map(path, range(n))])
    variance = torch.tensor(times).diff()
    assert (x.mean(0).abs() <= 3.5 * (variance / n).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() <= 4 * math.sqrt(2 / n)).all()
    assert float((torch.corrcoef(x.T) - torch.eye(4)).abs().max()) < 0.08


def test_grid_repeats_itself():
    w = BrownianGrid(torch.linspace(0, 1, 101), (3,), seed=1, dtype=torch.float64)
    first = [w(w.times[k], w.times[k + 1]) for k in range(100)]
    assert all(torch.equal(w(w.times[k], w.times[k + 1]), first[k]) for k in reversed(range(100)))
    torch.testing.assert_close(w(0, 1), sum(first))
    with pytest.raises(ValueError, match="times of the grid"):
        w(0, 0.005)
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        w(0, 1.1)


# Solvers


def test_stationary_variance():
    theta, sigma = 1.0, 0.7
    sde = SDE(lambda t, y: -theta * y, lambda t, y: sigma * torch.ones_like(y), "additive", "ito")
    ys, _ = sdeint(sde, torch.zeros(2000, 1), torch.arange(3.0, 9.0), Euler(), dt=0.01, seed=0)
    ys, _ = sdeint(sde, ys[-1], torch.arange(0.0, 7.0), Euler(), dt=0.01, seed=1)
    # Values one time unit apart are almost independent.
    assert float(ys[1:].var() / (sigma**2 / (2 * theta))) == pytest.approx(1, abs=0.05)


STRATONOVICH = [(ReversibleHeun, 0.4), (Heun, 0.8), (Midpoint, 0.8), (Ralston, 0.8), (EulerHeun, 0.8)]


@pytest.mark.parametrize(("method", "least"), [*STRATONOVICH, (Euler, 0.4), (Milstein, 0.8)])
def test_strong_order_on_geometric_brownian_motion(method, least):
    calculus = method.calculus
    # In Itô's calculus the drift ½ Y gives the same solution exp(W).
    drift = (lambda t, y: 0.5 * y) if calculus == "ito" else (lambda t, y: torch.zeros_like(y))
    sde = SDE(drift, lambda t, y: y, "diagonal", calculus)
    w = BrownianInterval(0.0, 1.0, (400, 1), seed=5, dtype=torch.float64)
    exact, errors = w(0, 1).exp(), []
    for n in (16, 64, 256):
        ys, _ = sdeint(sde, torch.ones(400, 1).double(), [0.0, 1.0], method(), dt=1 / n, brownian=w)
        errors.append(float((ys[-1] - exact).abs().mean()))
    assert math.log(errors[0] / errors[2]) / math.log(16) >= least


def test_kinds_of_noise_agree():
    y0, seed, results = torch.full((3, 2), 0.5, dtype=torch.float64), 4, []
    kinds = {
        "diagonal": lambda t, y: torch.stack([y[:, 0].cos(), y[:, 1].sin()], -1),
        "general": lambda t, y: torch.diag_embed(torch.stack([y[:, 0].cos(), y[:, 1].sin()], -1)),
    }
    for noise, diffusion in kinds.items():
        for method in (ReversibleHeun(), Heun(), EulerHeun()):
            results.append(sdeint(SDE(lambda t, y: -y, diffusion, noise), y0, [0, 1], method, dt=0.1, seed=seed).ys)
    for k in range(3):
        torch.testing.assert_close(results[k], results[k + 3])
    one = SDE(lambda t, y: -y, lambda t, y: y.unsqueeze(-1), "scalar")
    assert sdeint(one, y0, [0, 0.5, 1], dt=0.1, seed=1).ys.shape == (3, 3, 2)
    matrix = SDE(lambda t, y: -y, lambda t, y: torch.ones(3, 2, 4).double(), "additive")
    assert sdeint(matrix, y0, [0, 1], Heun(), dt=0.1).ys.shape == (2, 3, 2)


# Gradients


class Net(nn.Module):
    def __init__(self, n_out, dtype):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, n_out), nn.Tanh()).to(dtype)

    def forward(self, t, y):
        out = self.net(y)
        return out if out.shape == y.shape else out.unflatten(-1, (2, -1))


def model(noise, dtype):
    torch.manual_seed(0)
    if noise == "additive":
        scale = nn.Parameter(torch.tensor([0.5, 0.7], dtype=dtype))
        return SDE(Net(2, dtype), lambda t, y: scale.expand_as(y), noise), [scale]
    return SDE(Net(2, dtype), Net(6 if noise == "general" else 2, dtype), noise), []


def gradient_of(sde, params, y0, gradient, solver):
    y0 = y0.clone().requires_grad_()
    ys, stats = sdeint(sde, y0, [0.0, 3.01, 10.0], solver, gradient, dt=0.05, seed=7, params=params)
    grads = torch.autograd.grad((ys**2).sum(), [y0, *sde.parameters(), *params])
    return torch.cat([g.flatten() for g in grads]), stats


@pytest.mark.parametrize("noise", ["additive", "diagonal", "general"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_reversible_gradient_is_exact(noise, dtype, bound):
    sde, params = model(noise, dtype)
    y0 = torch.randn(4, 2, dtype=dtype)
    exact, _ = gradient_of(sde, params, y0, Direct(), ReversibleHeun())
    reverse, stats = gradient_of(sde, params, y0, Reversible(), ReversibleHeun())
    assert float((reverse - exact).norm() / exact.norm()) < bound
    assert stats.nfe_backward == 201
    again, _ = gradient_of(sde, params, y0, Checkpoint(), ReversibleHeun())
    assert float((again - exact).norm() / exact.norm()) < bound


def test_adjoint_is_not_exact():
    sde, params = model("diagonal", torch.float64)
    y0 = torch.randn(4, 2, dtype=torch.float64)
    exact, _ = gradient_of(sde, params, y0, Direct(), Heun())
    adjoint, _ = gradient_of(sde, params, y0, Adjoint(), Heun())
    assert 1e-4 < float((adjoint - exact).norm() / exact.norm()) < 0.5
    for method in (Euler(), Milstein()):
        sde.calculus = "ito"
        exact, _ = gradient_of(sde, params, y0, Direct(), method)
        again, _ = gradient_of(sde, params, y0, Checkpoint(), method)
        assert float((again - exact).norm() / exact.norm()) < 1e-12


def test_memory_does_not_grow():
    sde, _ = model("diagonal", torch.float32)

    def held(steps):
        def forward():
            return sdeint(sde, torch.ones(16, 2, requires_grad=True), [0.0, 1.0], dt=1 / steps, seed=0).ys.sum()

        return saved_bytes(forward, exclude=[sde]).peak

    assert held(400) <= 1.05 * held(50)


GOOD = SDE(lambda t, y: -y, lambda t, y: y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": Euler()}, ValueError, "calculus 'stratonovich'"),
        ({"sde": SDE(GOOD.drift, GOOD.diffusion, calculus="ito"), "solver": Heun()}, ValueError, "calculus 'ito'"),
        ({"solver": RK4()}, ValueError, "solver of stochastic equations"),
        ({"dt": None}, ValueError, "dt or grid"),
        ({"ts": [1.0, 0.0]}, ValueError, "forwards"),
        ({"sde": GOOD.drift}, TypeError, "SDE"),
        ({"y0": torch.tensor(1.0)}, TypeError, "channels"),
        ({"sde": SDE(GOOD.drift, lambda t, y: y[:, :1])}, ValueError, r"diffusion of diagonal noise of shape \(3, 2\)"),
        ({"sde": SDE(lambda t, y: y[:, :1], GOOD.diffusion)}, ValueError, "drift of shape"),
        ({"sde": SDE(lambda t, y: y * float("nan"), GOOD.diffusion)}, SolveError, "NaN or infinite at t = 0.1"),
        ({"brownian": BrownianInterval(0, 1, (3, 3))}, ValueError, r"Brownian motion of shape \(3, 2\)"),
        ({"brownian": BrownianGrid([0, 0.5, 1], (3, 2))}, ValueError, "times of the grid"),
        ({"gradient": Adjoint()}, ValueError, r"Heun\(\) or Midpoint\(\)"),
        ({"gradient": Reversible(), "solver": Heun()}, ValueError, "reversible solver"),
    ],
)
def test_refusals(options, error, message):
    y0 = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(error, match=message):
        sdeint(**({"sde": GOOD, "y0": y0, "ts": [0.0, 1.0], "dt": 0.1, "seed": 0} | options))
    for kind in ({"noise": "coloured"}, {"calculus": "Ito"}):
        with pytest.raises(ValueError, match="expected"):
            SDE(GOOD.drift, GOOD.diffusion, **kind)


# Space-time Lévy area


@pytest.mark.parametrize("kind", ["interval", "grid"])
def test_areas_have_their_law_and_are_those_of_one_path(kind):
    n, paths = 200, 4000
    grid = [0.25 + 0.5 * k / n for k in range(n + 1)]
    w = (
        BrownianInterval(0.0, 1.0, (paths,), 3, levy=True, dtype=torch.float64)
        if kind == "interval"
        else BrownianGrid(grid, (paths,), 3, dtype=torch.float64)
    )
    total, area = w.area(0.25, 0.75)
    assert float(total.var()) == pytest.approx(0.5, rel=0.08)
    assert float(area.var()) == pytest.approx(0.5 / 12, rel=0.08)
    assert abs(float((total * area).mean())) < 4 * math.sqrt(0.5 * 0.5 / 12 / paths)
    steps = [(0.5 / n, *w.area(a, b)) for a, b in itertools.pairwise(grid)]
    torch.testing.assert_close(joined_area(steps), area, atol=1e-12, rtol=0)
    path = torch.stack([step for _, step, _ in steps]).cumsum(0)
    shares = torch.arange(1, n + 1).double()[:, None] / n
    torch.testing.assert_close((path - shares * total).mean(0), area, atol=6e-3, rtol=0)
    assert all(torch.equal(a, b) for a, b in zip(w.area(0.25, 0.75), (total, area), strict=True))


def test_shark_has_order_one_and_a_half_for_additive_noise():
    sde = SDE(lambda t, y: torch.sin(3 * y) - y**3, lambda t, y: torch.full_like(y, 0.8), "additive")
    w = BrownianInterval(0.0, 1.0, (200, 1), 1, levy=True, dtype=torch.float64)
    y0 = torch.ones(200, 1, dtype=torch.float64)
    ends = {n: sdeint(sde, y0, [0, 1], ShARK(), dt=1 / n, brownian=w).ys[-1] for n in (8, 64, 1024)}
    errors = [float((ends[n] - ends[1024]).abs().mean()) for n in (8, 64)]
    assert math.log(errors[0] / errors[1]) / math.log(8) > 1.3
    leaf = y0.clone().requires_grad_()
    grads = [
        torch.autograd.grad(sdeint(sde, leaf, [0, 1], ShARK(), mode, dt=1 / 16, seed=1).ys[-1].sum(), leaf)[0]
        for mode in (Direct(), Checkpoint(3))
    ]
    torch.testing.assert_close(*grads)


def test_areas_are_refused_where_there_are_none():
    w = BrownianInterval(0.0, 1.0, (2, 1), 1)
    with pytest.raises(ValueError, match="levy=True"):
        w.area(0.0, 0.5)
    with pytest.raises(ValueError, match="end is after its start"):
        w.area(0.5, 0.5)
    sde = SDE(lambda t, y: -y, lambda t, y: y)
    with pytest.raises(ValueError, match="expected additive noise for ShARK"):
        sdeint(sde, torch.ones(2, 1), [0, 1], ShARK(), dt=0.1)
