"""Schedules against their definitions, training by noise, sampling against known distributions."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from torchfolio.dynamics.diffusion import (
    MLPDenoiser,
    NoisePrediction,
    ancestral,
    as_noise,
    ddim,
    noise_prediction_loss,
    train_diffusion,
)
from torchfolio.dynamics.noise_schedules import CosineSchedule, DiscreteSchedule, LinearSchedule
from torchfolio.engine import fit
from torchfolio.models import UNet

SCHEDULES = [LinearSchedule(), CosineSchedule(), DiscreteSchedule.linear(200, 1e-4, 0.05)]
ALL = pytest.mark.parametrize("schedule", SCHEDULES, ids=["linear", "cosine", "discrete"])


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@ALL
def test_signal_and_noise_fall_and_rise_and_the_inverse_is_exact(schedule):
    t = torch.linspace(schedule.t_min, schedule.t_max, 777)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    assert bool((alpha.diff() < 0).all())
    assert bool((sigma.diff() > 0).all())
    assert torch.allclose(schedule.log_snr(t), torch.log(alpha / sigma), atol=1e-6)
    assert torch.allclose(schedule.time(schedule.log_snr(t)), t.double(), atol=1e-8)
    times = schedule.times(7)
    assert times[0] == schedule.t_max
    assert times[-1] == pytest.approx(schedule.t_min)
    drawn = schedule.draw(1000, torch.Generator().manual_seed(0))
    assert drawn.min() >= schedule.t_min
    assert drawn.max() <= schedule.t_max


def test_discrete_steps_are_the_products_of_betas():
    betas = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    schedule = DiscreteSchedule(betas)
    t = torch.arange(1, 51) / 50
    assert torch.allclose(schedule.alpha(t).square(), (1 - betas).cumprod(0))
    assert torch.allclose(schedule.model_time(t.double()), torch.arange(50.0, dtype=torch.float64), atol=1e-5)
    assert len(schedule.times(50).unique()) == 50


@pytest.mark.parametrize("betas", [[], [0.1], [0.1, 1.0], [0.1, float("nan")], [[0.1, 0.2]]])
def test_betas_that_are_none(betas):
    with pytest.raises(ValueError, match="betas"):
        DiscreteSchedule(betas)


@pytest.mark.parametrize("make", [
    lambda: LinearSchedule(2.0, 1.0), lambda: LinearSchedule(t_min=0.0), lambda: LinearSchedule(float("nan")),
    lambda: CosineSchedule(t_max=1.0), lambda: CosineSchedule(t_min=0.99, t_max=0.5), lambda: LinearSchedule(scale=0),
    lambda: SCHEDULES[2].times(201), lambda: SCHEDULES[0].times(0),
    lambda: MLPDenoiser((2,), time_dim=3), lambda: MLPDenoiser((2,), depth=0),
    lambda: ddim(lambda x, t: x, SCHEDULES[0], torch.zeros(1, 2), eta=2.0),
])  # fmt: skip
def test_wrong_settings(make):
    with pytest.raises(ValueError, match="expected"):
        make()


def test_predictions_say_the_same():
    clean, noise = draw(5, 3), draw(5, 3, seed=1)
    alpha, sigma = torch.tensor(0.8).double(), torch.tensor(0.6).double()
    x = alpha * clean + sigma * noise
    outputs = {"noise": noise, "clean": clean, "velocity": alpha * noise - sigma * clean, "score": -noise / sigma}
    for name, output in outputs.items():
        assert torch.allclose(as_noise(output, x, alpha, sigma, name), noise, atol=1e-6), name
    with pytest.raises(ValueError, match="prediction"):
        as_noise(noise, x, alpha, sigma, "nois")


def gaussian(schedule, mean, std):
    """The exact denoiser of a Gaussian."""

    def model(x, t):
        t = t.double()
        time = (t + 1) / schedule.steps if isinstance(schedule, DiscreteSchedule) else t / schedule.scale
        alpha, sigma = schedule.alpha(time)[:, None], schedule.sigma(time)[:, None]
        return sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)

    return model


@ALL
@pytest.mark.parametrize("sampler", [ddim, ancestral])
def test_samplers_draw_the_distribution(schedule, sampler):
    drawn = sampler(gaussian(schedule, 0.5, 0.3), schedule, draw(4000, 2), steps=200, generator=torch.Generator())
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.std().item() == pytest.approx(0.3, abs=0.02)


def test_one_ancestral_step_is_that_of_the_posterior():
    schedule = DiscreteSchedule.linear(20, 1e-3, 0.3)
    betas, alpha_bar = schedule.betas, (1 - schedule.betas).cumprod(0)
    x, constant = draw(6, 2), draw(6, 2, seed=3)
    seen = []

    def model(x, t):
        seen.append(x.clone())
        return constant

    ancestral(model, schedule, x, generator=torch.Generator().manual_seed(5))
    z = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mean = (x - betas[-1] / (1 - alpha_bar[-1]).sqrt() * constant) / (1 - betas[-1]).sqrt()
    std = (betas[-1] * (1 - alpha_bar[-2]) / (1 - alpha_bar[-1])).sqrt()
    assert len(seen) == 20
    assert torch.allclose(seen[1], mean + std * z, atol=1e-10)


def test_the_loss_is_least_at_the_true_noise_and_says_wrong_shapes():
    schedule, x = LinearSchedule(), 0.5 + 0.3 * draw(20000, 1)
    loss = lambda model: noise_prediction_loss(model, schedule, x, generator=torch.Generator().manual_seed(0)).mean()  # noqa: E731
    best = loss(gaussian(schedule, 0.5, 0.3))
    assert best < loss(gaussian(schedule, 0.2, 0.3))
    assert best < loss(gaussian(schedule, 0.5, 0.6))
    with pytest.raises(ValueError, match="shape"):
        loss(lambda x, t: x[:, :0])


def test_training_learns_classes_and_leaves_generators_alone():
    centres = torch.tensor([[-0.6, 0.0], [0.6, 0.3]])
    y = torch.arange(400) % 2
    x = centres[y] + 0.05 * draw(400, 2, dtype=torch.float32)
    schedule = DiscreteSchedule.linear(100, 1e-3, 0.1)
    nets = []
    net, before = MLPDenoiser((2,)), torch.get_rng_state()
    for steps in (200, 20, 20):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = MLPDenoiser((2,), hidden=64, depth=2, num_classes=2)
        train_diffusion(net, x, y, schedule=schedule, steps=steps, batch_size=100, lr=5e-3)
        nets.append(net)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[1].parameters(), nets[2].parameters(), strict=True))
    labels = torch.tensor([0, 1]).repeat(50)
    drawn = ddim(nets[0], schedule, draw(100, 2, dtype=torch.float32), labels, steps=20)
    assert (drawn - centres[labels]).abs().mean() < 0.1
    assert nets[0].embed is not None
    embedded = ddim(nets[0], schedule, draw(100, 2, dtype=torch.float32), nets[0].embed(labels), steps=20)
    assert torch.allclose(embedded, drawn)
    with pytest.raises(ValueError, match="third input"):
        net(x, torch.zeros(400))


def test_a_rule_like_others_on_an_image_network():
    rule = NoisePrediction(CosineSchedule())
    with pytest.raises(RuntimeError, match="prepare"):
        rule.step((torch.zeros(1),), lambda loss: None)
    images, labels = torch.rand(20, 1, 8, 8) * 2 - 1, torch.zeros(20, dtype=torch.long)
    net = UNet(1, widths=(8, 16), timed=True)
    result = fit(
        net, (images, labels), rule=rule, max_steps=6, batch_size=8, val=(images, labels), evaluate=rule.evaluate
    )
    assert math.isfinite(result.history["val_loss"][-1])
    assert rule.evaluate(net, (images, labels)) == rule.evaluate(net, (images, labels))
    assert ddim(net, rule.schedule, torch.randn(2, 1, 8, 8), steps=3).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_copies_and_dtypes(dtype):
    net = MLPDenoiser((1, 4, 4), hidden=16, depth=1).to(dtype)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    x, t = torch.randn(3, 1, 4, 4, dtype=dtype), torch.tensor([0.0, 5.0, 99.0])
    assert net(x, t).dtype == dtype
    assert torch.equal(net(x, t), again(x, t))
    assert ddim(net, LinearSchedule(), x, steps=3).dtype == dtype
    assert sum(p.numel() for p in MLPDenoiser((64,)).parameters()) == 179_392
