"""Densities by continuous normalising flows."""

import copy
import pickle

import pytest
import torch

from torchfolio.dynamics import ContinuousFlow
from torchfolio.dynamics.gradients import Adjoint, Checkpoint, Direct
from torchfolio.dynamics.runge_kutta import RK4
from torchfolio.dynamics.vector_fields import VectorField

X = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).double()


def test_a_linear_flow_gives_a_normal_density():
    A = torch.tensor([[0.3, -1.0], [0.5, -0.2]], dtype=torch.float64)
    flow = ContinuousFlow(lambda t, y: y @ A.T, 2, "exact", rtol=1e-8, atol=1e-10)
    M = torch.linalg.matrix_exp(A)
    normal = torch.distributions.MultivariateNormal(torch.zeros(2).double(), M @ M.T)
    torch.testing.assert_close(flow.log_prob(X).detach(), normal.log_prob(X), atol=1e-7, rtol=0)


def test_hutchinson_is_unbiased_and_the_density_integrates_to_one():
    torch.manual_seed(0)
    field = VectorField(2, 16, time=True).double()
    exact, probed = (ContinuousFlow(field, 2, trace, solver=RK4(), dt=0.25) for trace in ("exact", "hutchinson"))
    with torch.no_grad():
        drawn = torch.stack([probed.log_prob(X, seed=s) for s in range(100)])
        spread = drawn.std(0) / 10
        assert bool(((drawn.mean(0) - exact.log_prob(X)).abs() <= 4 * spread + 1e-9).all())
        axis = torch.linspace(-7, 7, 71).double()
        grid = torch.cartesian_prod(axis, axis)
        assert float(exact.log_prob(grid).exp().sum() * 0.2**2) == pytest.approx(1, abs=1e-2)


def test_gradients_of_all_kinds_agree_and_training_raises_the_likelihood():
    torch.manual_seed(0)
    flow = ContinuousFlow(VectorField(2, 8, 1, time=True), 2, rtol=1e-6, atol=1e-8).double()
    grads = []
    for flow.gradient in (Direct(), Checkpoint(), Adjoint()):
        parts = torch.autograd.grad(flow.log_prob(X, seed=1).sum(), list(flow.parameters()), materialize_grads=True)
        grads.append(torch.cat([part.flatten() for part in parts]))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=1e-3, rtol=1e-4)
    flow = ContinuousFlow(VectorField(1, 16, 1, time=True), 1, "exact", solver=RK4(), dt=0.25)
    data = 2 + 0.5 * torch.randn(64, 1)
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    losses = []
    for _ in range(30):
        loss = -flow.log_prob(data).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 1
    assert float(flow.sample(200, seed=0).detach().mean()) == pytest.approx(2, abs=0.5)
    again = copy.deepcopy(pickle.loads(pickle.dumps(flow)))
    assert torch.equal(again.log_prob(data), flow.log_prob(data))


def test_errors():
    flow = ContinuousFlow(VectorField(2, 4), 2)
    for x in (X[:, :1], X[:0], X[0]):
        with pytest.raises(ValueError, match=r"expected examples \[B, 2\]"):
            flow.log_prob(x.float())
    with pytest.raises(ValueError, match="trace"):
        ContinuousFlow(VectorField(2, 4), 2, "trace")
    assert "channels=2" in repr(flow)
