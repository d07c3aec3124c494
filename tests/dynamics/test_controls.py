"""Controls from incomplete series, and controlled differential equations."""

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline
from torch import nn

from torchfolio.dynamics.controls import Control, HermiteControl, LinearControl, NaturalCubicControl, RectilinearControl
from torchfolio.dynamics.gradients import Adjoint, Checkpoint, Direct, Reversible
from torchfolio.dynamics.integrate import cdeint
from torchfolio.dynamics.log_signatures import log_signatures
from torchfolio.dynamics.neural_de import NeuralCDE
from torchfolio.dynamics.reversible_heun import ReversibleHeun
from torchfolio.dynamics.runge_kutta import RK4, Tsit5

T = torch.tensor([0.0, 0.4, 1.0, 1.3, 2.0, 3.1], dtype=torch.float64)
KINDS = [HermiteControl, LinearControl, NaturalCubicControl]


def series(n_batch=3, channels=2, seed=0):
    return torch.randn(len(T), n_batch, channels, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_controls_meet_the_data(kind):
    x = series()
    control = kind(x, T)
    assert control.channels == 3
    for t, value in zip(T, x, strict=True):
        torch.testing.assert_close(control.evaluate(t)[:, 1:], value)
        torch.testing.assert_close(control.evaluate(t)[:, 0], t.expand(3))
    for t in (0.2, 0.7, 1.9, 2.9):
        slope = (control.evaluate(t + 1e-6) - control.evaluate(t - 1e-6)) / 2e-6
        torch.testing.assert_close(control.derivative(t), slope, atol=1e-7, rtol=1e-6)
    if control.smooth:
        for t in T[1:-1].tolist():
            torch.testing.assert_close(control.derivative(t - 1e-10), control.derivative(t + 1e-10), atol=1e-7, rtol=0)


def test_natural_cubic_is_scipys():
    x = series()
    control = NaturalCubicControl(x, T, append_time=False)
    reference = CubicSpline(T.numpy(), x.numpy(), bc_type="natural")
    for t in np.linspace(0, 3.1, 23):
        np.testing.assert_allclose(control.evaluate(t).numpy(), reference(t), atol=1e-12)


@pytest.mark.parametrize("kind", ["hermite", "linear"])
def test_agrees_with_torchcde(kind):
    torchcde = pytest.importorskip("torchcde")
    x = series()
    x[2, 0, 1] = x[3, 0, 1] = x[5, 1, 0] = float("nan")
    ours = Control.from_data(x, T, kind, append_time=False)
    swapped = x.transpose(0, 1)
    if kind == "linear":
        theirs = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(swapped, T), T)
    else:
        theirs = torchcde.CubicSpline(torchcde.hermite_cubic_coefficients_with_backward_differences(swapped, T), T)
    for t in (0.1, 0.9, 1.2, 1.7, 2.5, 3.1):
        torch.testing.assert_close(ours.evaluate(t), theirs.evaluate(torch.tensor(t, dtype=torch.float64)))


def test_hermite_is_causal_and_rectilinear_is_so_with_missing_values():
    x, changed = series(), series()
    changed[4:] = 7.0
    for t in (0.3, 1.25):  # before observation 3 at 1.3
        assert torch.equal(HermiteControl(x, T).evaluate(t), HermiteControl(changed, T).evaluate(t))
    x[2, :, 0] = changed[2, :, 0] = float("nan")
    a, b = RectilinearControl(x, T), RectilinearControl(changed, T)
    assert a.knots == list(range(11))
    for s in (0.0, 3.5, 6.0):  # index 6 is observation 3
        assert torch.equal(a.evaluate(s), b.evaluate(s))
    torch.testing.assert_close(a.evaluate(4)[:, 1], x[1, :, 0])  # the missing value is held
    torch.testing.assert_close(a.evaluate(5)[:, 0], T[3].expand(3))  # time goes first
    torch.testing.assert_close(a.evaluate(5)[:, 2], x[2, :, 1])


def test_missing_values():
    x = series()
    x[1:3, 0, 0] = float("nan")
    x[-1, 1, 1] = float("nan")
    control = LinearControl(x, T, append_mask=True)
    assert control.channels == 5
    share = (T[2] - T[0]) / (T[3] - T[0])
    torch.testing.assert_close(control.evaluate(T[2])[0, 1], torch.lerp(x[0, 0, 0], x[3, 0, 0], share))
    torch.testing.assert_close(control.evaluate(3.1)[1, 2], x[-2, 1, 1])
    torch.testing.assert_close(control.evaluate(3.1)[0, 3:], torch.tensor([4 / 6, 1.0], dtype=torch.float64))
    x[0, 2, 0], x[:, 2, 1] = float("nan"), float("nan")
    with pytest.warns(UserWarning, match="first values are missing in 2 channels.*0 in 1"):
        control = LinearControl(x, T)
    assert control.evaluate(0)[2, 2] == 0
    torch.testing.assert_close(control.evaluate(0)[2, 1], x[1, 2, 0])


class Field(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4 * channels), nn.Tanh()).double()

    def forward(self, t, z):
        return self.net(z).unflatten(-1, (4, -1))


@pytest.mark.parametrize("kind", [*KINDS, RectilinearControl])
def test_gradients_reach_data_and_parameters(kind):
    field, z0, results = Field(), torch.randn(3, 4, dtype=torch.float64), []
    modes = [(Tsit5(), Direct()), (Tsit5(), Checkpoint()), (Tsit5(), Adjoint())]
    for solver, gradient in modes:
        x = series().requires_grad_()
        control = kind(x * 1.0, T)
        z, stats = cdeint(control, field, z0, solver=solver, gradient=gradient, rtol=1e-7, atol=1e-9)
        grads = torch.autograd.grad(z[-1].square().sum(), [x, *field.parameters()])
        results.append(torch.cat([g.flatten() for g in grads]))
        assert stats.n_rejected <= stats.n_steps
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0], atol=1e-3, rtol=1e-3)
    exact = None
    for gradient in (Direct(), Reversible()):
        x = series().requires_grad_()
        z, _ = cdeint(kind(x, T), field, z0, solver=ReversibleHeun(), gradient=gradient, dt=0.1)
        grad = torch.autograd.grad(z[-1].square().sum(), x)[0]
        torch.testing.assert_close(grad, grad if exact is None else exact)
        exact = grad


def test_linear_equation_has_its_exact_solution():
    # dz = z dX is solved by exp(X(t) - X(0)), whatever the path.
    x = series(channels=1)
    for kind in (*KINDS, RectilinearControl):
        control = kind(x, T)
        field = lambda t, z: torch.stack([torch.zeros_like(z), z], -1)  # noqa: E731
        z, _ = cdeint(control, field, torch.ones(3, 1).double(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(z[-1], (x[-1] - x[0]).exp(), atol=1e-6, rtol=1e-6)
    steps = cdeint(LinearControl(x, T), field, torch.ones(3, 1).double(), solver=RK4(), grid=T).stats.n_steps
    assert steps == len(T) - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearControl(series()[:1], T[:1]), "at least 2"),
        (lambda: LinearControl(series(), T.flip(0)), "strictly rising"),
        (lambda: LinearControl(series() / 0, T), "without infinite"),
        (lambda: RectilinearControl(series(), T, append_time=False), "append_time=True"),
        (lambda: Control.from_data(series(), T, "cubic"), "kind"),
        (lambda: cdeint(LinearControl(series(), T), Field(2), torch.ones(3, 4).double()), "field's output of shape"),
        (lambda: cdeint(LinearControl(series(), T), Field(), torch.ones(3, 4).double(), [0, 4]), "within the control"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="Control"):
        cdeint(series(), Field(), torch.ones(3, 4))  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="floating point"):
        LinearControl(torch.ones(3, 1, dtype=torch.int64))


def test_log_signatures_are_increments_and_areas_and_make_long_steps_accurate():
    generator = torch.Generator().manual_seed(0)
    path = (torch.randn(257, 4, 2, generator=generator).double().cumsum(0) / 16).requires_grad_()
    whole, times = log_signatures(path, window=256, append_time=False)
    assert times.tolist() == [0.0, 256.0]
    steps, before = path.diff(dim=0), path[:-1] - path[0]
    area = (before[..., 0] * steps[..., 1] - before[..., 1] * steps[..., 0]).sum(0) / 2
    torch.testing.assert_close(whole, torch.stack([torch.cat([path[0], 0 * area[:, None]], 1),
                                                   torch.cat([path[-1], area[:, None]], 1)]))  # fmt: skip
    assert torch.autograd.grad(whole.sum(), path)[0].abs().sum() > 0
    first, second = (0.4 * torch.randn(3, 3, generator=generator).double() for _ in range(2))
    matrices = torch.stack([first, second, second @ first - first @ second], -1)
    z0 = torch.ones(4, 3, dtype=torch.float64)

    def end(series, t, columns):
        control = LinearControl(series.detach()[..., :columns], t, append_time=False)
        field = lambda t, z: torch.einsum("ijc,bj->bic", matrices[..., :columns], z)  # noqa: E731
        return cdeint(control, field, z0, rtol=1e-7, atol=1e-9).ys[-1]

    exact = end(path, None, 2)
    series, t = log_signatures(path, window=16, append_time=False)
    errors = [float((end(series, t, columns) - exact).norm()) for columns in (2, 3)]
    assert errors[1] < errors[0] / 2  # with areas, against chords alone


def test_log_signatures_of_incomplete_series_and_errors():
    x = torch.randn(11, 3, 2)
    x[4, 1] = float("nan")
    series, times = log_signatures(x, torch.linspace(0, 1, 11), window=4)
    assert series.shape == (4, 3, 6)
    assert bool(series.isfinite().all())
    assert times.tolist() == pytest.approx([0.0, 0.4, 0.8, 1.0])
    model = NeuralCDE(6, 4, 2, LinearControl, width=8, append_time=False)
    assert model(series, times).shape == (3, 2)
    for options in ({"window": 0}, {"t": [0.0] * 11}, {"x": x[:1]}, {"x": x / 0}):
        with pytest.raises(ValueError, match="expected"):
            log_signatures(**{"x": x, **options})
    with pytest.raises(TypeError, match="series"):
        log_signatures(x.long())
