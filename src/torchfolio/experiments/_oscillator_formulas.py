"""Formulas from a trained neural ODE, for the experiment on neural differential equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, nn

from torchfolio.dynamics import neural_de as de
from torchfolio.dynamics.expressions import Expression
from torchfolio.dynamics.stepping import SolveError
from torchfolio.dynamics.vector_fields import FormulaField, VectorField

__all__ = ["formulas_of_an_oscillator"]


def _oscillator(t: Tensor, y: Tensor) -> Tensor:
    a, b = y.unbind(-1)
    return torch.stack([b / (1 + b), -a / (1 + a)], -1)


def formulas_of_an_oscillator(s: Any, seed: int) -> dict[str, Any]:
    """Train a neural ODE, search formulas for its field on visited states, put them back and tune their constants.

    Args:
        s: settings of the experiment.
        seed: seed of the search and of the control's permutations.
    """
    y0, ts = torch.rand(s.trajectories, 2) * 1.6 - 0.6, torch.linspace(0, 10, 100)
    data = de.odeint(_oscillator, y0.double(), ts.double(), rtol=1e-8, atol=1e-10).ys.float()
    field = VectorField(2, 64, 2, activation=nn.Tanh())
    losses = _train_field(field, y0, ts[:10], data[:10], 3 * s.ode_steps // 4, dt=10 / 99)
    losses += _train_field(field, y0, ts, data, s.ode_steps // 4, dt=20 / 99)
    states = data.flatten(0, 1)[torch.randperm(data.shape[0] * data.shape[1])[: s.points]]
    with torch.no_grad():
        slopes = field(torch.tensor(0.0), states)
    search: dict[str, Any] = {"populations": s.populations, "rounds": s.rounds, "random_state": seed}
    X, targets = states.double().numpy(), slopes.double().numpy().T
    fits = [de.SymbolicRegressor(**search).fit(X, y) for y in targets]
    draws = np.random.default_rng(seed)
    shuffled = [de.SymbolicRegressor(**search).fit(X, draws.permutation(y)) for y in targets]
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
        optimizer.zero_grad(set_to_none=False)
        try:
            value = (de.odeint(field, y0, ts, de.RK4(), de.Direct(), dt=dt).ys - data).square().mean()
        except SolveError:  # a trial step met a pole: too far, says a large value, and the line search turns back
            return torch.tensor(1e3)
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
