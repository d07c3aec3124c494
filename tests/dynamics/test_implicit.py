"""Layers defined by a problem: fixed points, minima, quadratic programs, and their gradients."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from scipy import optimize
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from torchfolio.dynamics.implicit import DEQ, Anderson, QPLayer, argmin_layer, attach_gradient, jacobian_penalty
from torchfolio.measure import saved_bytes

F64 = torch.float64


class Cell(nn.Module):
    """A map of width 32 that contracts."""

    def __init__(self, rho=0.9, width=32, inputs=8, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.outer = nn.Linear(width, width, dtype=dtype), nn.Linear(inputs, width, dtype=dtype)
        with torch.no_grad():
            self.inner.weight.mul_(rho / torch.linalg.matrix_norm(self.inner.weight, 2))

    def forward(self, z, x):
        return torch.tanh(self.inner(z) + self.outer(x))


def gradients(loss, tensors):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tensors)])


def test_the_equilibrium_and_its_gradient_are_those_of_the_unrolled_net_at_a_fraction_of_the_memory():
    cell, x = Cell(), torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    layer, weights = DEQ(cell, 32), list(cell.parameters())

    def unrolled():
        z = torch.zeros(16, 32)
        for _ in range(60):
            z = cell(z, x)
        return z.square().sum()

    z = layer(x)
    assert ((z - cell(z, x)).norm(dim=1) <= 1e-4 * z.norm(dim=1)).all()
    ours, theirs = gradients(layer(x).square().sum(), weights), gradients(unrolled(), weights)
    assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.999
    assert saved_bytes(lambda: layer(x).square().sum()).peak <= 0.25 * saved_bytes(unrolled).peak
    assert layer.last["forward"][1] <= 1e-4
    assert layer.last["backward"][1] <= 1e-4
    with torch.no_grad():
        assert not layer(x).requires_grad


def test_the_gradient_is_exact_by_finite_differences_and_of_any_scale():
    cell, x = Cell(0.7, 5, 3, F64), torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    layer = DEQ(cell, 5, solver=Anderson(tol=1e-13, max_steps=100))
    assert torch.autograd.gradcheck(layer, (x.requires_grad_(),), atol=1e-7)
    loss, weights = layer(x).sum(), list(cell.parameters())
    whole = gradients(loss, weights)
    small = gradients(1e-12 * layer(x).sum(), weights)
    assert torch.allclose(small * 1e12, whole, rtol=1e-8)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0].sum(), x)


def test_anderson_needs_far_fewer_steps_than_iterating():
    rates = torch.linspace(0.5, 0.98, 32, dtype=F64)
    b = torch.randn(8, 32, dtype=F64, generator=torch.Generator().manual_seed(0))
    ours = Anderson(tol=1e-8, max_steps=1000)(lambda z: rates * z + b, torch.zeros_like(b))
    plain = Anderson(memory=1, tol=1e-8, max_steps=1000)(lambda z: rates * z + b, torch.zeros_like(b))
    assert ours.steps < 0.3 * plain.steps
    assert torch.allclose(ours.z, b / (1 - rates), atol=1e-5)
    one = Anderson(tol=1e-8, max_steps=1000)(lambda z: rates * z + b[:1], torch.zeros_like(b[:1]))
    assert torch.allclose(one.z, ours.z[:1], atol=1e-5)
    damped = Anderson(beta=0.5, tol=1e-8)(lambda z: -3 * z + 4, torch.zeros(2, 3, dtype=F64))
    assert torch.allclose(damped.z, torch.ones(2, 3, dtype=F64))


def test_other_shapes_types_and_copies():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    layer = DEQ(lambda z, x: torch.tanh(0.3 * conv(z) + x))
    z = layer(torch.randn(3, 2, 5, 5))
    assert z.shape == (3, 2, 5, 5)
    z.sum().backward()
    assert conv.weight.grad is not None
    half = DEQ(Cell(0.5).bfloat16(), 32, solver=Anderson(tol=2e-2))
    assert half(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16
    net = DEQ(Cell(), 32)
    x = torch.randn(2, 8)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), net(x))
    assert list(net.state_dict()) == ["f.inner.weight", "f.inner.bias", "f.outer.weight", "f.outer.bias"]
    assert "Anderson(memory=5" in repr(net)
    matrix = torch.randn(6, 6, dtype=F64)
    probes = torch.zeros(4000, 6, dtype=F64)
    found = jacobian_penalty(lambda z, x: z @ matrix.T, probes, probes, torch.Generator().manual_seed(0))
    assert found.item() == pytest.approx(matrix.square().sum().item() / 6, rel=0.1)


def test_what_is_not_reached_is_said():
    with pytest.warns(ConvergenceWarning, match="stopped after 4 steps"):
        DEQ(Cell(), 32, solver=Anderson(max_steps=4))(torch.randn(2, 8))
    with pytest.raises(ValueError, match="into itself"):
        DEQ(lambda z, x: z[:, :2])(torch.randn(2, 8))
    with pytest.raises(ValueError, match="finite values of the map"):
        DEQ(lambda z, x: z * torch.nan)(torch.randn(2, 8))
    with pytest.raises(ValueError, match="x to be finite"):
        DEQ(Cell(), 32)(torch.full((2, 8), torch.nan))
    with pytest.raises(ValueError, match="at least one example"):
        DEQ(Cell(), 32)(torch.zeros(0, 8))
    with pytest.raises(ValueError, match="tol"):
        Anderson(tol=float("nan"))
    with pytest.raises(ValueError, match="beta"):
        Anderson(beta=0)


def test_attached_solutions_keep_their_value_and_get_their_gradient():
    p = torch.tensor([[2.0, 9.0]], dtype=F64, requires_grad=True)

    def root():
        return attach_gradient(p.detach().sqrt(), p.detach() - p, torch.diag_embed(2 * p.sqrt()))

    assert torch.equal(root(), p.sqrt())
    assert torch.allclose(gradients(root().sum(), [p]), (0.5 / p.sqrt()).flatten())
    for loss in (root().sum(), root().square().sum()):
        (first,) = torch.autograd.grad(loss, p, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(first.sum(), p)
    with pytest.raises(ValueError, match="expected a condition"):
        attach_gradient(torch.zeros(2, 3), torch.zeros(2, 2), torch.zeros(2, 3, 3))


def test_minima_match_closed_forms_and_finite_differences():
    p = torch.randn(6, 3, dtype=F64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def objective(z, p):
        return torch.logsumexp(torch.cat([z, -z], 1), 1) + 0.5 * (z - p).square().sum(1) + (z[:, 0] * z[:, 1]) ** 2

    z = argmin_layer(objective, torch.zeros(6, 3, dtype=F64), p)
    best = optimize.minimize(lambda v: float(objective(torch.tensor(v)[None], p[:1].detach())), [0, 0, 0], tol=1e-12)
    assert torch.allclose(z[0].detach(), torch.tensor(best.x), atol=1e-5)
    assert torch.autograd.gradcheck(lambda p: argmin_layer(objective, torch.zeros(6, 3, dtype=F64), p), (p,), atol=1e-6)
    # Rosenbrock: not convex where it starts
    found = argmin_layer(lambda z, a: (a[:, 0] - z[:, 0]) ** 2 + 100 * (z[:, 1] - z[:, 0] ** 2) ** 2,
                         torch.tensor([[-1.2, 1.0]], dtype=F64), torch.ones(1, 1, dtype=F64))  # fmt: skip
    assert torch.allclose(found, torch.ones(1, 2, dtype=F64))
    with pytest.warns(ConvergenceWarning, match="was not reached"):
        argmin_layer(lambda z: z.pow(4).sum(1), torch.full((2, 2), 10.0), max_steps=2)
    with pytest.raises(ValueError, match="one value an example"):
        argmin_layer(lambda z: z.square(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="start"):
        argmin_layer(lambda z: z.square().sum(1), torch.zeros(2))


def programs(batch=5, n=4, m=6, e=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=g)  # noqa: E731
    root, inside = draw(batch, n, n), draw(batch, n)
    G, A = draw(batch, m, n), draw(batch, e, n)
    h = (G @ inside[..., None])[..., 0] + torch.rand(batch, m, dtype=F64, generator=g)
    return [
        root @ root.mT + 0.5 * torch.eye(n, dtype=F64),
        3 * draw(batch, n),
        G,
        h,
        A,
        (A @ inside[..., None])[..., 0],
    ]


def test_quadratic_programs_are_solved():
    Q, p, G, h, A, b = programs()
    layer = QPLayer()
    assert torch.allclose(layer(Q, p), -torch.linalg.solve(Q, p), atol=1e-10)
    solution = layer.solve(Q, p, G, h, A, b)
    for k in range(len(Q)):
        best = optimize.minimize(lambda z, k=k: 0.5 * z @ Q[k].numpy() @ z + p[k].numpy() @ z, [0.0] * 4, method="SLSQP",
            tol=1e-12, constraints=[{"type": "ineq", "fun": lambda z, k=k: h[k].numpy() - G[k].numpy() @ z},
                                    {"type": "eq", "fun": lambda z, k=k: A[k].numpy() @ z - b[k].numpy()}])  # fmt: skip
        assert torch.allclose(solution.z[k], torch.tensor(best.x), atol=1e-5)
    slack = h - (G @ solution.z[..., None])[..., 0]
    assert (slack > -1e-7).all()
    assert (solution.inequality > 0).all()
    assert (slack * solution.inequality).abs().max() < 1e-6
    assert (slack < 1e-5).any()  # some constraints are active
    assert torch.allclose(layer(Q[0], p[0], G[0], h[0]), layer(Q[:1], p[:1], G[:1], h[:1])[0])
    shared = layer(Q[0], p, G[0], h[0] + 1)
    assert torch.allclose(shared[2], layer(Q[0], p[2], G[0], h[0] + 1), atol=1e-6)
    assert layer(torch.eye(2), torch.ones(2)).dtype == torch.float32
    many = programs(64, 20, 30, 5)
    first = QPLayer(1e-11)(*many)
    for unit in (1e-4, 1e4):  # of the objective
        assert torch.allclose(QPLayer(1e-11)(many[0] * unit, many[1] * unit, *many[2:]), first, atol=1e-8)


@pytest.mark.parametrize("constraints", [0, 1, 2])
def test_gradients_of_quadratic_programs_match_finite_differences(constraints):
    program = programs(3, 3, 4)[: 2 + 2 * constraints]
    tensors = [t.requires_grad_() for t in program]
    assert torch.autograd.gradcheck(lambda *t: QPLayer(1e-11, 30)(*t), tensors, eps=1e-5, atol=1e-4, rtol=1e-4)


def test_gradients_of_quadratic_programs_are_those_of_optnet():
    Q, _, G, h, A, _ = tensors = [t.requires_grad_() for t in programs()]
    z, lam, nu = (t.detach() for t in QPLayer(1e-12, 30).solve(*tensors))
    v = torch.randn(5, 4, dtype=F64, generator=torch.Generator().manual_seed(3))
    ours = torch.autograd.grad((QPLayer(1e-12, 30)(*tensors) * v).sum(), tensors)
    D = torch.diag_embed
    zero = torch.zeros(5, 1, 1, dtype=F64)
    slack = (G @ z[..., None])[..., 0] - h
    system = torch.cat([torch.cat([Q, G.mT @ D(lam), A.mT], 2), torch.cat([G, D(slack), torch.zeros(5, 6, 1, dtype=F64)], 2),
                        torch.cat([A, torch.zeros(5, 1, 6, dtype=F64), zero], 2)], 1)  # fmt: skip
    d = torch.linalg.solve(system, -torch.cat([v, torch.zeros(5, 7, dtype=F64)], 1)[..., None])[..., 0]
    dz, dl, dn = d.split([4, 6, 1], 1)
    outer = lambda a, b: a[:, :, None] * b[:, None]  # noqa: E731
    optnet = [(outer(dz, z) + outer(z, dz)) / 2, dz, outer(lam * dl, z) + outer(lam, dz), -lam * dl,
              outer(dn, z) + outer(nu, dz), -dn]  # fmt: skip
    for one, other in zip(ours, optnet, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_wrong_programs_are_refused():
    eye, p = torch.eye(2), torch.ones(2)
    layer = QPLayer()
    for message, args in (
        ("both G and h", (eye, p, eye)),
        ("positive definite", (-eye, p)),
        ("Q of shape", (torch.eye(3), p)),
        ("G of shape", (eye, p, eye, torch.ones(1))),
        ("p to be finite", (eye, p * torch.nan)),
        ("one batch", (eye.expand(2, 2, 2), p.expand(3, 2))),
    ):
        with pytest.raises(ValueError, match=message):
            layer(*args)
    with pytest.warns(ConvergenceWarning, match="no feasible point"):
        layer(eye, p, torch.tensor([[1.0, 0], [-1, 0]]), torch.tensor([-1.0, -1]))
    assert pickle.loads(pickle.dumps(layer)).max_steps == 20
