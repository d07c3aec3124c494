"""Implicit solvers on stiff equations."""

import math

import pytest
import torch
from scipy.integrate import solve_ivp

from torchfolio.dynamics.gradients import Adjoint, Checkpoint, Direct
from torchfolio.dynamics.implicit_runge_kutta import ImplicitEuler, Kvaerno3
from torchfolio.dynamics.integrate import odeint
from torchfolio.dynamics.stepping import SolveError
from torchfolio.dynamics.vector_fields import VectorField

RATES = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)


def robertson(rates=RATES):
    def field(t, y):
        a, b, c = y.unbind(-1)
        r1, r2, r3 = rates.to(y)[0] * a, rates.to(y)[1] * b * c, rates.to(y)[2] * b * b
        return torch.stack([-r1 + r2, r1 - r2 - r3, r3], -1)

    return field


@pytest.mark.parametrize("solver", [ImplicitEuler(), Kvaerno3()])
def test_order(solver):
    ts = torch.linspace(0, 5, 17, dtype=torch.float64)
    exact = 1.5 * (-ts).exp() + (ts.sin() - ts.cos()) / 2
    errors = []
    for steps in (80, 160):
        ys = odeint(lambda t, y: -y + torch.sin(t), ts.new_ones(1), ts, solver, dt=5 / steps).ys[:, 0]
        errors.append(float((ys - exact).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(solver.order, abs=0.25)


def test_a_stiff_reaction_takes_few_steps_and_an_explicit_solver_many():
    y0 = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64)
    field = robertson()
    ys, stats = odeint(field, y0, [0.0, 40.0], Kvaerno3(), rtol=1e-5, atol=1e-9)
    reference = solve_ivp(
        lambda t, y: field(t, torch.tensor(y)).numpy(), (0, 40), [1, 0, 0], "Radau", rtol=1e-9, atol=1e-13
    )
    torch.testing.assert_close(ys[-1, 0], torch.tensor(reference.y[:, -1]), atol=1e-5, rtol=1e-3)
    assert torch.equal(ys[-1, 0], ys[-1, 1])
    assert stats.n_steps < 200
    with pytest.raises(SolveError, match="max_steps"):
        odeint(field, y0, [0.0, 40.0], rtol=1e-5, atol=1e-9, max_steps=500)


@pytest.mark.parametrize("mode", [Direct(), Checkpoint()])
def test_gradients_are_those_of_finite_differences(mode):
    def value(rates):
        y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        ys = odeint(robertson(rates), y0, [0, 0.3, 2], Kvaerno3(), mode, dt=0.1, params=[rates]).ys
        return (ys[-1] * torch.tensor([1.0, 1e4, 2.0])).sum()

    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    rates = (RATES * scale).detach().requires_grad_()
    (grad,) = torch.autograd.grad(value(rates), rates)
    for i in range(3):
        moved = [RATES * (1 + sign * 1e-4 * torch.eye(3, dtype=torch.float64)[i]) for sign in (1, -1)]
        numeric = (value(moved[0]) - value(moved[1])) / 2e-4
        assert float(grad[i] * RATES[i]) == pytest.approx(float(numeric), rel=1e-4, abs=1e-7)


def test_coupled_examples_trees_constants_and_refusals():
    mix = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double()
    z = torch.ones(4, 2, dtype=torch.float64)
    ys = odeint(lambda t, y: mix @ y, z, [0, 1], Kvaerno3(coupled=True), rtol=1e-8, atol=1e-10).ys
    torch.testing.assert_close(ys[-1], torch.linalg.matrix_exp(mix) @ z, atol=1e-6, rtol=1e-6)
    with pytest.raises(SolveError, match="NaN"):  # rows that are not on their own, and a step too long to notice
        odeint(lambda t, y: 20 * mix @ y, z, [0, 1], Kvaerno3(), dt=1.0)
    tree = odeint(lambda t, y: {"a": -1e3 * (y["a"] - t.cos())}, {"a": torch.zeros(2)}, [0, 1], Kvaerno3()).ys["a"]
    torch.testing.assert_close(tree[-1], torch.full((2,), math.cos(1)), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        odeint(lambda t, y: torch.ones_like(y), torch.zeros(2), [0, 1], ImplicitEuler()).ys[-1], torch.ones(2)
    )
    with pytest.raises(ValueError, match="explicit solver of the adjoint"):
        odeint(VectorField(2, 4), torch.zeros(1, 2), [0, 1], Kvaerno3(), Adjoint())
    with pytest.raises(ValueError, match="newton_steps"):
        Kvaerno3(newton_steps=0)
    assert repr(Kvaerno3(coupled=True)) == "Kvaerno3(coupled=True)"
