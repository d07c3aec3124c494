"""Solvers, the driver of ordinary equations, and ways to differentiate."""

import copy
import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from torchfolio.dynamics.gradients import Adjoint, Checkpoint, Direct, Reversible
from torchfolio.dynamics.integrate import odeint
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import RK4, Bosh3, Dopri5, Euler, Heun, Midpoint, Ralston, Tsit5
from torchfolio.dynamics.stepping import Adaptive, SolveError
from torchfolio.dynamics.vector_fields import VectorField
from torchfolio.measure import saved_bytes

METHODS = [Euler, Midpoint, Heun, Ralston, Bosh3, RK4, Dopri5, Tsit5]


def damped(t, y):
    return -y + torch.sin(t)


def solution(t):
    return 1.5 * np.exp(-t) + 0.5 * (np.sin(t) - np.cos(t))


ONE = torch.ones(1, dtype=torch.float64)


class Field(nn.Module):
    def __init__(self, width=16, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3), nn.Tanh()]
        self.net = nn.Sequential(*layers).to(dtype)

    def forward(self, t, y):
        return 4 * self.net(y) + torch.cos(2 * t)


def gradient_of(field, y0, gradient, solver, ts=(0.0, 3.3, 10.0), **options):
    y0 = y0.clone().requires_grad_()
    ys, stats = odeint(field, y0, ts, solver, gradient, **options)
    loss = (ys**2 * torch.linspace(1, 2, 3, dtype=y0.dtype)).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [y0, *field.parameters()])]), stats


def gap(x, y):
    return float((x - y).norm() / y.norm())


# Solvers


@pytest.mark.parametrize("method", METHODS)
def test_tableaux_fulfil_the_order_conditions(method):
    tableau, order = method.tableau, method.order
    s = len(tableau.b)
    A = np.zeros((s, s))
    for i, row in enumerate(tableau.a):
        A[i + 1, : len(row)] = row
    c = A.sum(1)
    np.testing.assert_allclose(tableau.c, c, atol=1e-14)
    trees = {
        1: [(np.ones(s), 1.0)],
        2: [(c, 1 / 2)],
        3: [(c**2, 1 / 3), (A @ c, 1 / 6)],
        4: [(c**3, 1 / 4), (c * (A @ c), 1 / 8), (A @ c**2, 1 / 12), (A @ A @ c, 1 / 24)],
        5: [
            (c**4, 1 / 5),
            (c**2 * (A @ c), 1 / 10),
            ((A @ c) ** 2, 1 / 20),
            (c * (A @ c**2), 1 / 15),
            (c * (A @ A @ c), 1 / 30),
            (A @ c**3, 1 / 20),
            (A @ (c * (A @ c)), 1 / 40),
            (A @ A @ c**2, 1 / 60),
            (A @ A @ A @ c, 1 / 120),
        ],
    }
    for k in range(1, order + 1):
        for vector, value in trees[k]:
            assert np.dot(tableau.b, vector) == pytest.approx(value, abs=1e-12)
    if tableau.b_error is not None:
        for k in range(1, method.error_order):
            for vector, _ in trees[k]:
                assert np.dot(tableau.b_error, vector) == pytest.approx(0, abs=1e-12)
    if tableau.b_mid is not None:
        for k in range(1, 5):
            for vector, value in trees[k]:
                assert np.dot(tableau.b_mid, vector) == pytest.approx(value * 0.5**k, abs=1e-9)


@pytest.mark.parametrize("method", [*METHODS, ReversibleHeun])
def test_order_of_convergence(method):
    ts = torch.linspace(0, 5, 17, dtype=torch.float64)
    errors = []
    for n in (80, 160):  # the outputs fall on every fifth step
        ys, stats = odeint(damped, ONE, ts, method(), dt=5 / n)
        errors.append(np.abs(ys[:, 0].numpy() - solution(ts.numpy())).max())
        assert stats.n_steps == n
    assert math.log2(errors[0] / errors[1]) == pytest.approx(method.order, abs=0.25)


@pytest.mark.parametrize("method", [Heun, Bosh3, RK4, Dopri5, Tsit5, ReversibleHeun])
def test_outputs_between_steps_keep_the_order(method):
    ts = [0, *np.linspace(0.013, 4.97, 40), 5]
    errors = []
    for n in (40, 80):
        ys, _ = odeint(damped, ONE, ts, method(), dt=5 / n)
        errors.append(np.abs(ys[:, 0].numpy() - solution(np.array(ts))).max())
    assert math.log2(errors[0] / errors[1]) > min(method.order, 4) - 0.45


@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("method", [Bosh3, Dopri5, Tsit5])
def test_adaptive_steps_keep_the_tolerance(method, pi):
    ts = torch.linspace(0, 5, 50, dtype=torch.float64)
    ys, stats = odeint(damped, ONE, ts, method(), adaptive=Adaptive(1e-6, 1e-8, pi=pi))
    assert np.abs(ys[:, 0].numpy() - solution(ts.numpy())).max() < 1e-5
    back, _ = odeint(damped, ys[-1], ts.flip(0), method(), rtol=1e-6, atol=1e-8)
    assert float((back[-1] - 1).abs()) < 1e-3  # errors grow backwards by exp(5)
    assert stats.nfe_forward == 2 + (len(method.tableau.b) - 1) * (stats.n_steps + stats.n_rejected)


def test_dopri5_agrees_with_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    field, y0, ts = Field(), torch.randn(5, 3, dtype=torch.float64), torch.linspace(0, 6, 9, dtype=torch.float64)
    reference = torchdiffeq.odeint(field, y0, ts, rtol=1e-9, atol=1e-9)
    assert float((odeint(field, y0, ts, Dopri5(), rtol=1e-6, atol=1e-8).ys - reference).detach().abs().max()) < 1e-5


def test_jumps_are_met_exactly():
    calls = []

    def field(t, y):
        calls.append(float(t))
        return torch.where(t < 0.3, 1.0, -1.0).to(y) * torch.ones_like(y)

    for options in ({}, {"dt": 0.25}):
        ys, _ = odeint(field, torch.zeros(2), [0.0, 0.3, 1.0], Tsit5(), jump_ts=[0.3], **options)
        torch.testing.assert_close(ys[:, 0], torch.tensor([0, 0.3, -0.4]), atol=1e-6, rtol=0)
    assert np.float32(0.3) not in np.array(calls, dtype=np.float32)


def test_trees_as_states():
    y0 = {"x": torch.ones(2, 3), "v": (torch.zeros(2, 3), torch.ones(4))}
    ts = torch.linspace(0, 1, 5)
    ys, _ = odeint(lambda t, y: {"x": y["v"][0], "v": (-y["x"], -y["v"][1])}, y0, ts)
    torch.testing.assert_close(ys["x"][:, 0, 0], ts.cos(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ys["v"][1][:, 0], (-ts).exp(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="form of y0"):
        odeint(lambda t, y: {"x": y["x"], "v": y["v"][0]}, y0, ts)


# Gradients


@pytest.mark.parametrize("jumps", [(), (2.1, 3.3)])
@pytest.mark.parametrize("method", [ReversibleHeun, Tsit5, RK4])
def test_recomputed_gradients_are_those_through_the_solver(method, jumps):
    field, y0 = Field(), torch.randn(4, 3, dtype=torch.float64)
    options = {"dt": 0.1, "jump_ts": jumps}
    exact, _ = gradient_of(field, y0, Direct(), method(), **options)
    modes = [Checkpoint(), Checkpoint(1), Checkpoint(7)] + ([Reversible()] if method.reversible else [])
    for mode in modes:
        assert gap(gradient_of(field, y0, mode, method(), **options)[0], exact) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_reversing_is_exact_and_the_adjoint_is_not(dtype, bound):
    field, y0 = Field(dtype=dtype), torch.randn(8, 3, dtype=dtype)
    options = {"ts": (0.0, 6.0, 20.0), "dt": 0.1}
    exact, _ = gradient_of(field, y0, Direct(), ReversibleHeun(), **options)
    reverse, stats = gradient_of(field, y0, Reversible(), ReversibleHeun(), **options)
    assert gap(reverse, exact) < bound
    assert stats.nfe_forward == stats.nfe_backward == 201
    assert gap(gradient_of(field, y0, Adjoint(), ReversibleHeun(), **options)[0], exact) > 1e-4


def test_adaptive_solves_are_differentiated():
    field, y0 = Field(), torch.randn(4, 3, dtype=torch.float64)
    options = {"rtol": 1e-7, "atol": 1e-9}
    exact, _ = gradient_of(field, y0, Direct(), Tsit5(), **options)
    assert gap(gradient_of(field, y0, Checkpoint(), Tsit5(), **options)[0], exact) < 1e-12
    adjoint, semi = gradient_of(field, y0, Adjoint(), Tsit5(), **options)
    assert gap(adjoint, exact) < 1e-4
    _, full = gradient_of(field, y0, Adjoint(seminorm=False), Tsit5(), **options)
    assert semi.nfe_backward < full.nfe_backward


def test_gradients_against_finite_differences():
    y0 = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    for gradient, solver in ((Direct(), Tsit5()), (Checkpoint(2), Bosh3()), (Reversible(), ReversibleHeun())):

        def solve(y0, scale, gradient=gradient, solver=solver):
            field = lambda t, y: torch.tanh(scale * y.flip(0)) + t  # noqa: E731
            return odeint(field, y0, [0.0, 0.41, 1.0], solver, gradient, dt=0.1, params=[scale]).ys

        assert torch.autograd.gradcheck(solve, (y0, scale))


def test_memory():
    field, y0 = Field(64, torch.float32), torch.randn(32, 3)

    def held(gradient, steps):
        def forward():
            return odeint(
                field, y0.clone().requires_grad_(), [0.0, 5.0], ReversibleHeun(), gradient, dt=5 / steps
            ).ys.sum()

        return saved_bytes(forward, exclude=[field]).peak

    assert held(Reversible(), 400) <= 1.05 * held(Reversible(), 50)
    assert held(Adjoint(), 400) <= 1.05 * held(Adjoint(), 50)
    assert held(Direct(), 400) >= 4 * held(Direct(), 50)
    assert held(Checkpoint(), 400) <= 4 * held(Checkpoint(), 50)


def test_computed_tensors_as_parameters():
    # A tensor that the field uses and that was itself computed gets its gradient if it is declared.
    base = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    grads = []
    for gradient in (Direct(), Checkpoint(3), Adjoint()):
        shift = base * 2
        ys, _ = odeint(
            lambda t, y, s=shift: s - y, torch.zeros(2).double(), [0, 1], RK4(), gradient, dt=0.1, params=[shift]
        )
        grads.append(torch.autograd.grad(ys[-1].sum(), base)[0])
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-6, rtol=0)


def test_parameters_behind_computed_ones():
    base = torch.tensor([0.5, -0.5], dtype=torch.float64, requires_grad=True)
    shift = base.exp()
    y0, options = torch.zeros(2).double(), {"dt": 0.1, "params": [shift, base]}
    grads = []
    for gradient in (Direct(), Checkpoint(3)):
        ys, _ = odeint(lambda t, y: shift - y, y0, [0, 1], RK4(), gradient, **options)
        grads.append(torch.autograd.grad(ys[-1].sum(), base, retain_graph=True)[0])
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match="none was computed from another"):
        odeint(lambda t, y: shift - base * y, y0, [0, 1], RK4(), Checkpoint(3), **options)


def test_copies_and_dtypes():
    for thing in (Tsit5(), ReversibleHeun(), Checkpoint(3), Adjoint(), Reversible()):
        assert repr(copy.deepcopy(thing)) == repr(pickle.loads(pickle.dumps(thing)))
    half = odeint(lambda t, y: -y, torch.ones(2, dtype=torch.bfloat16), [0, 1], Heun(), dt=0.1).ys
    assert half.dtype == torch.bfloat16
    assert float(half[-1, 0]) == pytest.approx(math.exp(-1), abs=0.02)
    assert not any(a == b for a, b in itertools.combinations(map(repr, (Tsit5(), Heun(), Direct())), 2))


# Refusals

WEIGHT = torch.ones(2, requires_grad=True)


class Noisy(nn.Dropout):
    def forward(self, t, y):
        return super().forward(y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ts": [0.0, 1.0, 1.0]}, ValueError, "strictly rising or falling"),
        ({"ts": [0.0]}, ValueError, "at least 2"),
        ({"ts": [0.0, float("nan")]}, ValueError, "strictly"),
        ({"y0": torch.ones(2, dtype=torch.int64)}, TypeError, "floating point"),
        ({"y0": []}, ValueError, "hold a tensor"),
        ({"y0": (torch.ones(1), torch.ones(1).double())}, TypeError, "share dtype"),
        ({"field": lambda t, y: y[:1]}, ValueError, r"field's output.*\(2,\), got \(1,\)"),
        ({"field": lambda t, y: y / (t - 0.5).relu()}, SolveError, "NaN or infinite at t = 0"),
        ({"field": lambda t, y: y + (0.5 - t).sqrt(), "dt": 0.1}, SolveError, "NaN or infinite at t = 0.6"),
        ({"field": lambda t, y: y / (0.5 - t)}, SolveError, r"singular.* at t = 0\.(49|5)"),
        ({"field": lambda t, y: -1e6 * y, "max_steps": 10}, SolveError, "max_steps = 10"),
        ({"solver": "dopri5"}, TypeError, "solver such as"),
        ({"gradient": "adjoint"}, TypeError, "gradient such as"),
        ({"gradient": Reversible(), "y0": WEIGHT}, ValueError, "reversible solver"),
        ({"gradient": Adjoint(), "field": lambda t, y: WEIGHT * y}, ValueError, r"params.*shape \(2,\)"),
        ({"gradient": Checkpoint(), "field": Noisy(), "y0": WEIGHT}, ValueError, "Noisy in training mode"),
        ({"rtol": float("nan")}, ValueError, "rtol"),
        ({"atol": 0.0}, ValueError, "atol"),
        ({"dt": 0.0}, ValueError, "dt"),
        ({"dt": 0.1, "grid": [0, 1]}, ValueError, "got both"),
        ({"grid": [0, 2]}, ValueError, "grid from 0 to 1"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"field": 3}, TypeError, "function"),
    ],
)
def test_refusals(options, error, message):
    arguments = {"field": lambda t, y: -y, "y0": torch.ones(2), "ts": [0.0, 1.0]} | options
    if isinstance(arguments.get("gradient"), Adjoint):
        arguments["params"] = [torch.ones(1, requires_grad=True)]
    with pytest.raises(error, match=message):
        odeint(**arguments)


@pytest.mark.parametrize(("damping", "warned"), [(0.1, False), (6.0, True)])
def test_a_way_back_that_rounding_leads_astray_is_said(damping, warned):
    a = torch.tensor(1.0, requires_grad=True)
    y0 = torch.tensor([1.0, 0.0])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        field = lambda t, y: torch.sin(a * t) - damping * y  # noqa: E731
        ys, _ = odeint(field, y0, [0.0, 4.0], ReversibleHeun(), Reversible(), dt=0.05, params=[a])
        ys[-1].sum().backward()
    assert any("run backwards" in str(w.message) for w in seen) == warned


@pytest.mark.parametrize("gradient", [Checkpoint(), Adjoint(), Reversible()])
def test_second_derivatives_are_refused_not_left_out(gradient):
    y0 = torch.randn(3, 2, requires_grad=True)
    ys = odeint(VectorField(2, 8), y0, [0.0, 1.0], ReversibleHeun(), gradient, dt=0.25).ys
    (grad,) = torch.autograd.grad(ys[-1].square().sum() + y0.pow(4).sum(), y0, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(grad.sum(), y0)


@pytest.mark.parametrize("solver", [Tsit5(), Bosh3(), Heun()])
@pytest.mark.parametrize("ts", [[0.0, 0.3, 0.31, 1.0], [1.0, 0.5, -0.2]])
def test_steps_for_each_example_are_those_of_solving_it_alone(solver, ts):
    speed = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    y0 = torch.stack([torch.ones(3).double(), torch.zeros(3).double(), speed], -1).requires_grad_()
    field = Field()

    def turning(t, y):
        turn = torch.stack([y[..., 1] * y[..., 2], -y[..., 0] * y[..., 2], torch.zeros_like(y[..., 2])], -1)
        return turn + 0.1 * field.net(y) * torch.cos(t)

    options = {"rtol": 10.0**-solver.order, "atol": 1e-4, "params": list(field.parameters())}
    together, stats = odeint(turning, y0, ts, solver, per_sample=True, **options)
    alone = [odeint(turning, y, ts, solver, Direct(), **options) for y in y0]
    expected = torch.stack([ys for ys, _ in alone], 1)
    torch.testing.assert_close(together, expected, atol=1e-10, rtol=1e-10)
    assert stats.n_steps == max(s.n_steps for _, s in alone)
    wanted = [y0, *field.parameters()]
    for a, b in zip(*(torch.autograd.grad(ys.square().sum(), wanted) for ys in (together, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_what_steps_for_each_example_cannot_do_is_refused():
    y0 = torch.ones(2, 1)
    for options in ({"dt": 0.1}, {"solver": RK4()}, {"jump_ts": [0.5]}, {"y0": {"a": y0}}, {"gradient": Checkpoint()}):
        with pytest.raises(ValueError, match=r"per.sample"):
            odeint(**{"field": damped, "y0": y0, "ts": [0, 1], "per_sample": True, **options})
    with pytest.raises(SolveError, match=r"singular at t = 0\.5.* for example 1"):
        odeint(lambda t, y: y * y, torch.tensor([[0.1], [2.0]]), [0, 1], per_sample=True)
    with pytest.raises(SolveError, match="max_steps"):
        odeint(damped, y0, [0, 1], per_sample=True, max_steps=2)
