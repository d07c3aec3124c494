"""Gradients through the sampler against backprop, closed forms and a fine reference; health, memory, errors, uses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.dynamics import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    DiffusionODE,
    adversarial_noise,
    finetune,
    optimize_condition,
    style_loss,
)
from torchfolio.dynamics.diffusion import MLPDenoiser
from torchfolio.dynamics.exponential_solver import METHODS
from torchfolio.dynamics.noise_schedules import CosineSchedule, DiscreteSchedule, LinearSchedule
from torchfolio.experiments._exact_diffusion import EXACT, mixture, on_mixture, point_mass
from torchfolio.measure import saved_bytes
from torchfolio.models import UNet


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def net(shape=(3,), dtype=torch.float64, **kw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MLPDenoiser(shape, hidden=16, depth=2, num_classes=4, cond_dim=5, **kw).to(dtype).eval()


def all_gradients(model, schedule=None, guidance=None, **solve):
    """With respect to noise, condition and weights."""
    noise, cond = draw(6, 3).requires_grad_(), (0.5 * draw(6, 5, seed=1)).requires_grad_()
    weights = [p for name, p in model.named_parameters() if name != "embed.weight"]
    ode = DiffusionODE(model, schedule or LinearSchedule(), guidance=guidance)
    solution = ode.solve(noise, cond=cond, **solve)
    loss = (solution.x - 0.3).square().sum()
    return torch.autograd.grad(loss, [noise, cond, *weights]), solution


def test_one_step_is_exact_on_a_point_mass_and_so_is_its_adjoint():
    result = point_mass(draw(8, 2))
    assert result["one_step"] <= 1e-10
    assert result["raw"] > 1e-3
    assert result["heun_error"] <= 1e-10
    assert result["rk4_error"] <= 1e-10
    assert result["midpoint_order"] >= 1.8


def test_accuracy_on_a_mixture_and_a_coarse_solver_that_is_told():
    result = on_mixture(draw(64, 2), 300)
    assert result["rk4_noise"] <= 5e-3
    assert result["rk4_scale"] <= 1e-4
    assert result["heun_noise"] <= 3e-2
    assert result["heun_scale"] <= 5e-3
    assert result["coarse_noise"] > 0.5
    assert result["coarse_reconstruction"] > 0.1
    assert result["coarse_warned"] == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", ["logsnr", "time_uniform", "time_quadratic"])
def test_symplectic_and_checkpoint_equal_backprop(method, grid):
    model = net()
    expected, _ = all_gradients(model, steps=5, method=method, grid=grid, grad="backprop")
    for grad in ("symplectic", "checkpoint"):
        found, solution = all_gradients(model, steps=5, method=method, grid=grid, grad=grad)
        for a, b in zip(found, expected, strict=True):
            assert float((a - b).norm()) <= 1e-9 * float(b.norm()), grad
        if grad == "symplectic":
            assert solution.stats.nfe_backward == solution.stats.nfe_forward == 5 * len(METHODS[method].offsets)


@pytest.mark.parametrize("grad", ["adjoint", "symplectic"])
def test_second_derivatives_are_refused_not_left_out(grad):
    noise = draw(4, 2).requires_grad_()
    x = DiffusionODE(mixture(), EXACT).sample(noise, 3, grad=grad)
    (first,) = torch.autograd.grad(x.square().sum() + noise.pow(4).sum(), noise, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(first.sum(), noise)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), DiscreteSchedule.linear(50, 1e-3, 0.2)])
def test_the_adjoint_tends_to_the_exact_gradient(schedule):
    model, errors = net(), []
    exact, _ = all_gradients(model, schedule, steps=40, method="rk4", grad="symplectic")
    for steps in (20, 40):
        found, _ = all_gradients(model, schedule, steps=steps, method="rk4")
        errors.append(max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)))
    assert errors[1] < 1e-3
    found, solution = all_gradients(model, schedule, steps=40, method="heun", backward_method="rk4")
    assert all(F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99 for a, b in zip(found, exact, strict=True))
    assert solution.stats.nfe_backward == 160


def test_the_adjoint_equals_torchdiffeq():
    torchdiffeq = pytest.importorskip("torchdiffeq")
    model, schedule = mixture(), EXACT
    noise, steps = draw(5, 2).requires_grad_(), 12
    solution = DiffusionODE(model, schedule).solve(noise, steps, "rk4")
    ours = torch.autograd.grad(solution.x.square().sum(), [noise, model.scale])
    t = solution.times
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    rho = alpha[0] * sigma / alpha - sigma[0]

    class Flow(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, rho, y):
            time = schedule.time(-torch.log((rho + sigma[0]) / alpha[0]))
            return self.model(schedule.alpha(time) / alpha[0] * y, time.expand(len(y)))

    leaf = noise.detach().clone().requires_grad_()
    y = torchdiffeq.odeint_adjoint(
        Flow(), leaf, rho[[0, -1]], method="rk4",
        options={"grid_constructor": lambda f, y, t: rho, "perturb": False},
        adjoint_options={"grid_constructor": lambda f, y, t: -rho.flip(0)},
    )  # fmt: skip
    x = y[-1] * alpha[-1] / alpha[0]
    assert torch.allclose(x, solution.x, rtol=2e-2, atol=1e-3)  # its rk4 is the 3/8 rule
    theirs = torch.autograd.grad(x.square().sum(), [leaf, model.scale])
    assert F.cosine_similarity(ours[0].flatten(), theirs[0].flatten(), dim=0) > 0.99


def test_memory_does_not_grow_with_steps():
    model = net(dtype=torch.float64)
    used = {
        (grad, steps): saved_bytes(lambda g=grad, s=steps: all_gradients(model, steps=s, grad=g), exclude=model).peak
        for grad in ("adjoint", "symplectic", "backprop")
        for steps in (10, 50)
    }
    assert used["adjoint", 50] <= 1.05 * used["adjoint", 10]
    assert used["backprop", 50] >= 4 * used["backprop", 10]
    assert used["symplectic", 50] < used["backprop", 50] / 5


def test_predictions_of_every_kind_and_trajectories():
    model, schedule = mixture(), EXACT
    noise = draw(4, 2)

    def told(kind):
        def predict(x, t):
            alpha, sigma, eps = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None], model(x, t)
            clean = (x - sigma * eps) / alpha
            return {"noise": eps, "clean": clean, "velocity": alpha * eps - sigma * clean, "score": -eps / sigma}[kind]

        return predict

    with torch.no_grad():
        samples = [DiffusionODE(told(k), schedule, k).solve(noise, 8, trajectory=True)
                   for k in ("noise", "clean", "velocity", "score")]  # fmt: skip
    for solution in samples:
        assert torch.allclose(solution.x, samples[0].x, atol=1e-8)
        assert solution.trajectory.shape == (9, 4, 2)
        assert torch.equal(solution.trajectory[0], noise)
        assert torch.allclose(solution.trajectory[-1], solution.x)
    whole = DiffusionODE(model, schedule).solve(noise, 20, "rk4", trajectory=True)
    rest = DiffusionODE(model, schedule).sample(whole.trajectory[10], grid=whole.times[10:], method="rk4")
    assert torch.allclose(rest, whole.x, atol=1e-8)
    assert bool((DiffusionODE(model, schedule).reconstruction_error(noise, 30) < 0.05).all())


def test_guidance_and_its_gradients():
    model = net()
    null = torch.zeros(5, dtype=torch.float64)
    plain, _ = all_gradients(model, steps=6, grad="symplectic")
    one, _ = all_gradients(model, guidance=ClassifierFreeGuidance(null, 1.0), steps=6, grad="symplectic")
    assert all(torch.allclose(a, b) for a, b in zip(plain, one, strict=True))
    free, classifier = ClassifierFreeGuidance(null, 3.0), ClassifierGuidance(
        lambda x, t, cond: -(x - cond[:, :3]).square().sum(1), 0.2, tell=True
    )  # fmt: skip
    for guidance in (free, classifier):
        exact, _ = all_gradients(model, guidance=guidance, steps=6, grad="backprop")
        same, _ = all_gradients(model, guidance=guidance, steps=6, grad="symplectic")
        near, _ = all_gradients(model, guidance=guidance, steps=60, method="rk4", grad="adjoint")
        fine, _ = all_gradients(model, guidance=guidance, steps=60, method="rk4", grad="symplectic")
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(exact, same, strict=True))
        for a, b in zip(near, fine, strict=True):
            assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.99
    assert not torch.allclose(free(lambda x, c: c[:, :3], draw(6, 3), None, draw(6, 5)), draw(6, 5)[:, :3])  # pyright: ignore
    with pytest.raises(ValueError, match="needs a condition"):
        DiffusionODE(lambda x, t: x, LinearSchedule(), guidance=free).sample(draw(2, 3), 2)


@pytest.mark.parametrize("grad", ["adjoint", "symplectic", "checkpoint", "backprop"])
def test_only_the_parameters_that_were_named(grad):
    model = net(dtype=torch.float32)
    noise, cond = draw(4, 3, dtype=torch.float32), torch.tensor([0, 1, 2, 3])
    DiffusionODE(model, LinearSchedule()).sample(
        noise, 4, cond=cond, grad=grad, params=[model.last.weight]
    ).sum().backward()
    assert model.last.weight.grad is not None
    assert all(p.grad is None for p in model.parameters() if p is not model.last.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_sums_in_32_bits(dtype):
    model = net(dtype=dtype)
    noise = draw(4, 3, dtype=torch.float32).to(dtype).requires_grad_()
    x = DiffusionODE(model, LinearSchedule()).sample(noise, 6, cond=torch.tensor([0, 1, 2, 3]))
    assert x.dtype == dtype
    x.float().sum().backward()
    assert noise.grad is not None
    assert noise.grad.dtype == dtype
    assert all(p.grad is not None and p.grad.dtype == dtype for p in model.parameters())


def test_what_would_silently_go_wrong_is_refused():
    model, noise = net(), draw(3, 3)
    schedule, cond = LinearSchedule(), draw(3, 5).requires_grad_()
    with pytest.raises(ValueError, match="cond="):
        DiffusionODE(lambda x, t: model(x, t, 2 * cond), schedule).sample(noise, 2, params=list(model.parameters()))
    with pytest.raises(ValueError, match="a parameter"):
        DiffusionODE(lambda x, t, c: model(x, t, c), schedule).sample(noise, 2, cond=cond.detach())
    random = nn.Sequential(nn.Dropout(0.1))
    random.forward = lambda x, t: x  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="training mode"):
        DiffusionODE(random, schedule).sample(noise, 2)
    ode = DiffusionODE(lambda x, t: x, schedule)
    for wrong in ({"steps": 0}, {"method": "hein"}, {"grid": "log"}, {"grad": "exact"}, {"backward_method": "x"},
                  {"grid": torch.tensor([0.5, 0.9])}, {"grid": torch.tensor([0.5, 0.5])}, {"grid": torch.tensor([2.0, 0.5])},
                  {"params": [torch.zeros(1)]}):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            ode.sample(noise, **wrong)
    for bad in (noise[0, 0], noise[:0], noise * float("nan")):
        with pytest.raises(ValueError, match="expected"):
            ode.sample(bad)
    with pytest.raises(TypeError, match="floating"):
        ode.sample(noise.long())
    with pytest.raises(ValueError, match="shape"):
        DiffusionODE(lambda x, t: x[:, :1], schedule).sample(noise, 2)
    with pytest.raises(ValueError, match="prediction"):
        DiffusionODE(lambda x, t: x, schedule, "eps")


def test_image_networks_and_those_of_diffusers():
    torch.manual_seed(0)
    noise = torch.randn(2, 1, 8, 8, requires_grad=True)
    model = UNet(1, widths=(8, 16), timed=True).eval()
    DiffusionODE(model, DiscreteSchedule.linear()).sample(noise, 3).mean().backward()
    assert noise.grad is not None
    assert noise.grad.abs().sum() > 0
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=6, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    cond = torch.randn(2, 3, 6, requires_grad=True)
    betas = diffusers.DDPMScheduler(1000).betas
    ode = DiffusionODE(theirs, DiscreteSchedule(betas))
    found = {
        grad: torch.autograd.grad(ode.sample(noise, 2, cond=cond, grad=grad).square().mean(), [noise, cond])
        for grad in ("symplectic", "backprop")
    }
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(*found.values(), strict=True))


def test_the_three_uses():
    model = net(dtype=torch.float32)
    ode, noise = DiffusionODE(model, LinearSchedule()), draw(8, 3, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    metric = lambda x: (x - 1.0).square().mean(1)  # noqa: E731
    for start in (torch.zeros(5), torch.zeros(2, 5)):
        cond, losses = optimize_condition(ode, metric, start, noise, iterations=8, lr=0.3, steps=5, grad="symplectic")
        assert cond.shape == start.shape
        assert losses[-1] < losses[0]
    y = torch.zeros(8, dtype=torch.long)
    classifier = lambda x: torch.stack([x.sum(1), -x.sum(1)], 1)  # noqa: E731
    arguments = {"tau": 0.3, "lr": 0.4, "cond": y, "steps": 5, "iterations": 6, "grad": "symplectic"}
    attack = adversarial_noise(ode, classifier, noise, y, **arguments)
    assert float((attack.noise - noise).abs().max()) == pytest.approx(0.3, abs=1e-6)
    fresh = ode.sample(attack.noise, 5, cond=y).detach()
    assert torch.equal(attack.success, attack.correct & (classifier(fresh).argmax(1) != 0))
    logits = [classifier(ode.sample(z, 5, cond=y)).detach()[:, 0].mean() for z in (noise, attack.noise)]
    assert logits[1] < logits[0]
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    losses = finetune(
        ode, lambda x, anchors: metric(x), noise, cond=y, iterations=8, lr=3e-3, steps=5, grad="symplectic"
    )
    assert losses[-1] < losses[0]
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ValueError, match="require gradients"):
        finetune(ode, lambda x, anchors: metric(x), noise, cond=y, params=[])


def test_the_style_loss_is_zero_on_the_style_itself():
    x = draw(1, 2, 4, 4)
    loss = style_loss(lambda x: [x, x.relu()], x, content_weight=0.5)
    assert float(loss(x, x)) < 1e-20
    shifted = x.roll(1, -1)  # features move, their Gram matrices stay
    assert float(loss(shifted, shifted)) < 1e-20
    assert float(loss(shifted, x)) == pytest.approx(0.5 * float((shifted.relu() - x.relu()).square().mean()))


def test_good_solves_are_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        all_gradients(net(), steps=30)
