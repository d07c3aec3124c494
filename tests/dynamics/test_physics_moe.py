"""The constraint layer: closed form, gradient, experts, equations, what is refused."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from scipy import optimize
from torch import nn

from torchfolio.dynamics import (
    FNO,
    PDE,
    Burgers1D,
    DiffusionSorption1D,
    ExpertConstraint,
    Grid,
    HardConstraint,
    Heat1D,
    LevenbergMarquardt,
    NavierStokes2D,
    equation_loss,
)
from torchfolio.dynamics.physics_moe import partition, unpartition

F64 = torch.float64
GRID = Grid(t=torch.linspace(0, 0.2, 8), x=torch.linspace(0, 1, 12))
PERIODIC = Grid(periodic=("x",), t=torch.linspace(0, 0.5, 12), x=torch.arange(16) / 16)
TIGHT = LevenbergMarquardt(tol=1e-12, max_steps=300)


def basis(grid=GRID, batch=2, kinds=5, seed=0, dtype=F64):
    """Smooth functions on a grid."""
    net = nn.Sequential(nn.Linear(len(grid.shape), 24), nn.Tanh(), nn.Linear(24, batch * kinds)).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=g)
        return net(grid.points()).unflatten(-1, (batch, kinds)).movedim(-2, 0).to(dtype)


def test_a_linear_equation_has_the_ridge_solution_and_its_gradient():
    B, start = basis().requires_grad_(), torch.sin(math.pi * GRID.axes["x"]).expand(2, 12)
    pde = Heat1D(0.5)

    def closed(B):
        terms = pde.terms(B.movedim(-1, 1), GRID)
        t = {name: value.movedim(1, -1) for name, value in terms.items()}
        zeros = torch.zeros(2, 200, dtype=F64)
        rows = [(pde.residual(t, {}).flatten(1, 2), zeros[:, :96]), (t["u"][:, 0], start),
                (t["u"][:, :, 0], zeros[:, :8]), (t["u"][:, :, -1], zeros[:, :8])]  # fmt: skip
        matrix = torch.cat(
            [a / a.shape[1] ** 0.5 for a, _ in rows] + [1e-3 * torch.eye(5, dtype=F64).expand(2, 5, 5)], 1
        )
        right = torch.cat([b / b.shape[1] ** 0.5 for _, b in rows] + [zeros[:, :5]], 1)
        return torch.linalg.lstsq(matrix, right[..., None])[0][..., 0]

    out = HardConstraint(pde, ridge=1e-3, solver=TIGHT)(B, GRID, start)
    w = closed(B)
    assert torch.allclose(out.weights[:, 0], w, atol=1e-8, rtol=1e-8)
    assert out.converged.all()
    assert torch.allclose(out.u, torch.einsum("btxk,bk->btx", B, w), atol=1e-8)
    probe = torch.randn(2, 8, 12, dtype=F64, generator=torch.Generator().manual_seed(1))
    ours, theirs = (torch.autograd.grad((u * probe).sum(), B, retain_graph=True)[0] for u in
                    (out.u, torch.einsum("btxk,bk->btx", B, w)))  # fmt: skip
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(("pde", "grid"), [(Burgers1D(0.05), PERIODIC), (DiffusionSorption1D(0.05), GRID)])
def test_the_implicit_gradient_matches_finite_differences(pde, grid):
    B = basis(grid, 1, 4, seed=3)
    start = 0.5 + 0.2 * torch.sin(2 * math.pi * grid.axes["x"])[None]
    probe = torch.randn(grid.shape, dtype=F64, generator=torch.Generator().manual_seed(1))

    def loss(B, hessian="full"):
        layer = ExpertConstraint(pde, (2, 2), solver=TIGHT, hessian=hessian)
        return (layer(B, grid, start).u * probe).sum()

    B.requires_grad_()
    (full,) = torch.autograd.grad(loss(B), B)
    (newton,) = torch.autograd.grad(loss(B, "gauss_newton"), B)
    entries = torch.randperm(B.numel(), generator=torch.Generator().manual_seed(2))[:20]
    found = []
    with torch.no_grad():
        for entry in entries:
            step = torch.zeros(B.numel(), dtype=F64)
            step[entry] = 1e-5
            found.append(float(loss(B + step.view_as(B)) - loss(B - step.view_as(B))) / 2e-5)
    differences = torch.tensor(found, dtype=F64)
    error = (full.flatten()[entries] - differences).norm() / differences.norm()
    assert error <= 1e-4
    assert (newton.flatten()[entries] - differences).norm() / differences.norm() > 10 * error


def test_experts_alone_permuted_and_local():
    B, start, pde = (
        basis(PERIODIC, 3),
        torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).double(),
        Burgers1D(0.05),
    )
    one, same = HardConstraint(pde, 50)(B, PERIODIC, start), ExpertConstraint(pde, (1, 1), 50)(B, PERIODIC, start)
    assert torch.equal(one.u, same.u)
    layer = ExpertConstraint(pde, (2, 2), solver=TIGHT)
    out = layer(B, PERIODIC, start)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(layer(B[order], PERIODIC, start[order]).u, out.u[order], atol=1e-9)
    single = torch.cat([layer(B[k : k + 1], PERIODIC, start[k : k + 1]).u for k in range(3)])
    assert torch.allclose(single, out.u, atol=1e-9)
    moved = B.clone()
    moved[:, 9, 11] += 0.1  # in the last block, two points off its seams, not at the start
    change = (layer(moved, PERIODIC, start).weights - out.weights).abs().amax((0, 2))
    assert change[3] > 1e-6
    assert (change[:3] == 0).all()
    # gradients do not couple either
    B.requires_grad_()
    layer(B, PERIODIC, start).weights[:, 0].sum().backward()
    assert (B.grad[:, 9, 11] == 0).all()
    assert B.grad[:, 2, 2].abs().sum() > 0


def test_blocks_go_apart_and_together():
    g = torch.Generator().manual_seed(0)
    for experts, shape, rest in (
        ((2, 3), (4, 9), (5,)),
        ((1, 4), (3, 8), ()),
        ((2, 2, 3), (4, 6, 9), (2, 3)),
        ((5,), (10,), (1,)),
    ):
        field = torch.randn(3, *shape, *rest, generator=g)
        blocks = partition(field, experts)
        assert blocks.shape == (3, math.prod(experts), math.prod(shape) // math.prod(experts), *rest)
        assert torch.equal(unpartition(blocks, experts, shape), field)
    assert torch.equal(partition(torch.arange(8).view(1, 2, 4), (1, 2))[0, 0], torch.tensor([0, 1, 4, 5]))


def test_every_expert_is_at_least_as_good_as_the_one_solution():
    B, start, pde = basis(GRID, 3), torch.full((3, 12), 0.4, dtype=F64), DiffusionSorption1D(0.05)
    whole = HardConstraint(pde, solver=TIGHT)(B, GRID, start)
    out = ExpertConstraint(pde, (4, 2), solver=TIGHT)(B, GRID, start, start=whole.weights)
    assert (out.residual_after <= out.residual_before).all()
    assert (out.residual_after < 0.9 * out.residual_before).any()


def test_levenberg_marquardt_finds_the_optima_of_scipy():
    B, start, pde = (
        basis(PERIODIC, 2),
        torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).double(),
        Burgers1D(0.05),
    )
    problem = ExpertConstraint(pde, (2, 2), 20).problem(B, PERIODIC, start)
    found = LevenbergMarquardt(tol=1e-10, max_steps=100)(problem.compressed(), torch.ones(8, 5, dtype=F64))
    for n in (0, 3, 6):
        take = [group.take(torch.tensor([n])) for group in problem.groups]
        one = type(problem)(take, 1e-4, True)
        rows = lambda w, one=one: one.linearise(torch.tensor(w)[None])[0][0].numpy()  # noqa: E731
        slopes = lambda w, one=one: one.linearise(torch.tensor(w)[None])[1][0].numpy()  # noqa: E731
        best = optimize.least_squares(rows, [1.0] * 5, slopes, method="lm", xtol=1e-12, ftol=1e-12)
        assert found.cost[n].item() == pytest.approx(best.cost, rel=1e-8)
        assert torch.allclose(found.w[n], torch.tensor(best.x), atol=1e-5, rtol=1e-5)
    # Rosenbrock as a plain function, problems that take different numbers of steps
    curve = lambda w: torch.stack([10 * (w[:, 1] - w[:, 0] ** 2), 1 - w[:, 0]], 1)  # noqa: E731
    result = LevenbergMarquardt(tol=1e-10)(curve, torch.tensor([[-1.2, 1.0], [1.0, 1.0], [3.0, -2.0]], dtype=F64))
    assert torch.allclose(result.w, torch.ones(3, 2, dtype=F64), atol=1e-8)
    assert result.converged.all()
    assert result.steps[1] == 0
    capped = LevenbergMarquardt(tol=1e-10, max_steps=2)(curve, torch.tensor([[-1.2, 1.0]], dtype=F64))
    assert not capped.converged.any()
    with pytest.raises(ValueError, match="residual at the start"):
        TIGHT(lambda w: w / 0, torch.ones(1, 2))


def test_an_equation_of_ones_own_and_its_parameters():
    class Advection(PDE):
        edges = {"left": ("x", 0)}  # noqa: RUF012

        def terms(self, field, grid):
            return {"u": field, "u_t": grid.derivative(field, "t"), "u_x": grid.derivative(field, "x")}

        def residual(self, terms, params):
            return terms["u_t"] + params["speed"] * terms["u_x"]

        def boundary(self, edge, terms, params):
            return terms["u"]

    t, x = GRID.points().unbind(-1)
    speed = torch.tensor([0.5, 1.5], dtype=F64)
    moving = torch.stack([torch.where(x > s * t, (x - s * t) ** 2, 0) for s in speed])
    B = torch.cat([moving[:, ..., None], basis(GRID, 2, 3)], -1)
    out = ExpertConstraint(Advection(), (2, 1), ridge=1e-8)(B, GRID, moving[:, 0], {"speed": speed})
    assert (out.u - moving).abs().max() < 0.05
    assert equation_loss(Advection(), moving, GRID, moving[:, 0], {"speed": speed}) < 0.1
    wrong = ExpertConstraint(Advection())(B, GRID, moving[:, 0], {"speed": speed.flip(0)})
    assert wrong.residual_after.sum() > 10 * out.residual_after.sum()


def test_flows_start_where_they_should():
    n = 16
    axis = 2 * math.pi * torch.arange(n) / n
    grid = Grid(periodic=("x", "y"), t=torch.linspace(0, 1, 8), x=axis, y=axis)
    t, x, y = grid.points().unbind(-1)
    pde = NavierStokes2D(viscosity=0.1, scale=1.0)
    vortex = 2 * torch.cos(x) * torch.cos(y) * torch.exp(-0.2 * t)  # Taylor and Green's
    residual = pde.residual(pde.terms(vortex[None], grid), {})
    assert residual.abs().max() < 0.02 * vortex.abs().max()
    assert pde.residual(pde.terms((vortex * (1 + t))[None], grid), {}).abs().max() > 0.5
    out = ExpertConstraint(pde, (1, 2, 2), 200)(basis(grid, 1, 6), grid, vortex[None, 0])
    assert torch.allclose(out.u[0, 0], vortex[0], atol=1e-12)
    assert out.u.mean((-2, -1)).abs().max() < 0.2
    assert (out.residual_after <= out.residual_before).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.basis, self.layer = FNO(2, 6, (2, 3), 8, 2), ExpertConstraint(Heat1D(0.5), (2, 1), 30)

    def forward(self, start, generator=None):
        x = torch.stack([start[:, None].expand(-1, *GRID.shape), GRID.points()[..., 0].expand(2, -1, -1)], -1)
        return self.layer(self.basis(x.float()), GRID, start, generator=generator).u


def test_a_network_learns_through_the_layer():
    torch.manual_seed(0)
    net, start = Net(), torch.sin(math.pi * GRID.axes["x"]).expand(2, 12)
    u = net(start)
    assert u.dtype == torch.float32
    assert net.basis(torch.rand(2, 8, 12, 2)).std() > 0.2
    losses, optimizer, draws = [], torch.optim.Adam(net.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(15):
        losses.append(equation_loss(Heat1D(0.5), net(start, draws), GRID, start))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    state = torch.get_rng_state()
    assert torch.equal(net(start), net(start))  # the same points at every call
    assert not torch.equal(net(start), net(start, draws))
    assert torch.equal(state, torch.get_rng_state())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(start), net(start))
    assert "Heat1D, experts=(2, 1), points=30" in repr(net)


def test_a_unet_of_somebody_else_gives_the_basis():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(
        sample_size=(8, 12), in_channels=3, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    start = torch.sin(math.pi * GRID.axes["x"]).expand(2, 12).float()
    layer, optimizer = ExpertConstraint(Heat1D(0.5), (2, 1), 30), torch.optim.Adam(net.parameters(), 1e-3)
    x = torch.cat([start[:, None, None].expand(-1, 1, 8, 12), GRID.points().movedim(-1, 0).expand(2, -1, -1, -1)], 1)
    losses = []
    for _ in range(3):
        out = layer(net(x.float(), 0).sample.movedim(1, -1), GRID, start)
        losses.append(equation_loss(Heat1D(0.5), out.u, GRID, start))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert out.u.shape == (2, 8, 12)
    assert losses[-1] < losses[0]


def test_what_cannot_be_is_refused():
    B, start = basis(), torch.zeros(2, 12, dtype=F64)
    for message, call in (
        ("divide axis 0 of 8", lambda: ExpertConstraint(Heat1D(), (3, 1))(B, GRID, start)),
        ("a number of experts for each axis", lambda: ExpertConstraint(Heat1D(), (2,))(B, GRID, start)),
        ("at most the 24 points", lambda: ExpertConstraint(Heat1D(), (2, 2), 25)(B, GRID, start)),
        ("as many rows as basis", lambda: HardConstraint(Heat1D(), ridge=0)(basis(kinds=300), GRID, start)),
        ("expected a basis", lambda: HardConstraint(Heat1D())(B[:, 1:], GRID, start)),
        ("initial values", lambda: HardConstraint(Heat1D())(B, GRID, start[:1])),
        ("basis to be finite", lambda: HardConstraint(Heat1D())(B * torch.nan, GRID, start)),
        ("one value of nu an instance", lambda: HardConstraint(Heat1D())(B, GRID, start, {"nu": start})),
        ("evenly spaced", lambda: Grid(t=torch.tensor([0.0, 1, 3]))),
        ("three points", lambda: Grid(t=torch.tensor([0.0, 1]))),
        ("hessian", lambda: HardConstraint(Heat1D(), hessian="half")),
        ("points as modes", lambda: FNO(1, 1, (8, 8))(torch.zeros(1, 8, 8, 1))),
    ):
        with pytest.raises(ValueError, match=message):
            call()

    class Root(Heat1D):
        def residual(self, terms, params):
            return terms["u"].sqrt()

    with pytest.raises(ValueError, match="finite residual of the equation"):
        HardConstraint(Root())(B, GRID, start)
    with pytest.warns(UserWarning, match="float32"):
        HardConstraint(Heat1D(), dtype=torch.float32)
    layer = HardConstraint(Burgers1D(0.05), solver=LevenbergMarquardt(max_steps=1), stationary=1e-9)
    with pytest.warns(UserWarning, match="not at a stationary point"):
        out = layer(basis(PERIODIC).requires_grad_(), PERIODIC, torch.rand(2, 16, dtype=F64))
    assert not out.converged.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad():
            layer(basis(PERIODIC), PERIODIC, torch.rand(2, 16, dtype=F64))
