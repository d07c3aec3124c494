"""Gradient noise: its variance at every step, no trace without it, what counts as a step, resuming, processes."""

from __future__ import annotations

import copy
import math
import os
import pickle
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from scipy import stats
from torch import distributed as dist
from torch import nn

from tests.contracts.rules import check_rule
from torchfolio.engine import Backprop, fit
from torchfolio.local import AugLocal
from torchfolio.models import MLP
from torchfolio.training import GradientNoise, NoisyGradients, add_gradient_noise_, gradient_noise_std


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(n=10, **kwargs):
    p = nn.Parameter(torch.zeros(n, **kwargs))
    p.grad = torch.zeros_like(p)
    return p


@pytest.mark.parametrize("step", [0, 10, 1000])
def test_the_noise_has_the_variance_of_its_step_and_is_normal(step):
    p = weights(10**6)
    std = add_gradient_noise_(p, step, eta=0.3, generator=generator(step))
    assert std == gradient_noise_std(step, 0.3) == pytest.approx(math.sqrt(0.3 / (1 + step) ** 0.55))
    assert float(p.grad.var()) == pytest.approx(0.3 / (1 + step) ** 0.55, rel=0.01)
    assert abs(float(p.grad.mean())) < 4 * std / 1000
    assert stats.kstest(p.grad[:100_000].numpy(), "norm", args=(0, std)).pvalue > 1e-3


def test_without_variance_nothing_is_drawn_and_nothing_changes():
    x, y = torch.randn(64, 4, generator=generator()), torch.randint(3, (64,), generator=generator())

    def train(noise):
        torch.manual_seed(0)
        net = MLP(4, 3, (8,))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if noise:
            GradientNoise(optimizer, eta=0.0)
        for _ in range(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return [*net.parameters(), torch.get_rng_state()]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_under_sgd_the_noise_alone_is_a_random_walk_of_known_variance():
    p, lr = weights(10**5), 0.03
    optimizer = torch.optim.SGD([p], lr=lr)
    noise = GradientNoise(optimizer, eta=0.3, generator=generator())
    for _ in range(200):
        p.grad.zero_()
        optimizer.step()
    expected = lr**2 * sum(gradient_noise_std(t, 0.3) ** 2 for t in range(200))
    assert float(p.detach().var()) == pytest.approx(expected, rel=0.02)
    assert noise.step == 200


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.complex64], ids=str)
def test_every_dtype_keeps_its_own_and_the_variance(dtype):
    p, q = weights(50_000, dtype=dtype), weights(7)
    add_gradient_noise_([p, q], 0, eta=0.3, generator=generator())
    assert p.grad.dtype == dtype
    assert float(p.grad.to(torch.complex128).abs().square().mean()) == pytest.approx(0.3, rel=0.03)
    if dtype.is_complex:
        assert float(p.grad.real.var()) == pytest.approx(0.15, rel=0.03)
    assert q.grad.abs().min() > 0


def test_unused_and_frozen_parameters_get_nothing_and_each_counts_once():
    p, unused, strided = weights(4), nn.Parameter(torch.zeros(3)), weights(6)
    strided.data, strided.grad = strided.data.view(2, 3), torch.zeros(3, 2).T
    groups = [{"params": [p, unused, strided]}, {"params": [p]}]
    add_gradient_noise_(groups, 0, eta=1.0, generator=generator())
    assert unused.grad is None
    expected = torch.randn(10, generator=generator())
    assert torch.allclose(torch.cat([p.grad, strided.grad.flatten()]), expected), "one draw for all"


def test_an_accumulated_gradient_is_one_step_and_clipping_comes_before():
    net = nn.Linear(100, 100, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    noise, before = GradientNoise(optimizer, eta=0.3, generator=generator()), net.weight.detach().clone()
    for _ in range(4):
        net(torch.zeros(2, 100)).sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    optimizer.step()
    assert noise.step == 1
    assert float((net.weight.detach() - before).var()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_get_noise_of_their_own_scale_and_skipped_steps_do_not_count(fused):
    p = nn.Parameter(torch.zeros(50_000))
    optimizer = torch.optim.SGD([p], lr=1.0, fused=fused)
    noise = GradientNoise(optimizer, eta=0.3, generator=generator())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor, steps in ((0.0, 1), (math.inf, 1), (0.0, 2)):
        optimizer.zero_grad()
        scaler.scale((p * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert noise.step == steps
    expected = 0.3 + 0.3 / 2**0.55
    assert float(p.detach().var()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_training_resumes_from_checkpoints_of_fit_as_if_it_had_not_stopped(tmp_path, make, own):
    x, y = torch.randn(40, 4, generator=generator()), torch.randint(3, (40,), generator=generator())

    def train(steps, folder):
        torch.manual_seed(0)
        net, noises = MLP(4, 3, (8,)), []

        def factory(parameters):
            noises.append(GradientNoise(make(parameters, lr=0.01), 0.3, generator=generator(5) if own else None))
            return noises[0].optimizer

        fit(net, (x, y), optimizer=factory, max_steps=steps, batch_size=10, checkpoint=folder, progress=False)
        return net, noises[0]

    whole, noise = train(6, tmp_path / "a")
    train(3, tmp_path / "b")
    parts, resumed = train(6, tmp_path / "b")
    assert noise.step == resumed.step == 6
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_the_state_goes_through_the_optimizers_and_is_missed_where_it_is_not():
    optimizer, other = (torch.optim.Adam([weights()]) for _ in range(2))
    noise, plain = GradientNoise(optimizer, generator=generator()), other.state_dict()
    optimizer.step()
    state = pickle.loads(pickle.dumps(optimizer.state_dict()))
    assert state["gradient_noise"]["step"] == 1
    other.load_state_dict(state)  # an optimizer without noise does not mind
    again = GradientNoise(other, 0.01)
    other.load_state_dict(state)
    assert again.step == 1
    assert torch.equal(again.generator.get_state(), noise.generator.get_state())
    with pytest.warns(UserWarning, match="without gradient noise"):
        optimizer.load_state_dict(plain)
    with pytest.raises(ValueError, match="'step'"):
        noise.load_state_dict({})
    noise.remove()
    assert "gradient_noise" not in optimizer.state_dict()
    noise.remove()
    GradientNoise(optimizer)
    assert repr(again) == "GradientNoise(Adam, eta=0.01, gamma=0.55, step=1)"


def test_schedulers_keep_working():
    p = weights()
    optimizer = torch.optim.SGD([p], lr=1.0)
    noise, scheduler = GradientNoise(optimizer), torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert noise.std == gradient_noise_std(1)


def _process(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)
    p = weights(1000)
    optimizer = torch.optim.SGD([p], lr=1.0)
    GradientNoise(optimizer, 0.3)
    for _ in range(3):
        optimizer.step()
    torch.save(p.detach(), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_all_processes_add_the_same_noise(tmp_path):
    mp.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    assert first.std() > 0.1
    assert torch.equal(first, second)


def test_what_cannot_be_is_refused():
    for bad in ({"step": -1}, {"eta": -0.1}, {"gamma": -1.0}, {"eta": float("nan")}, {"gamma": math.inf}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            gradient_noise_std(**{"step": 0, **bad})
    p = weights()
    p.grad = None
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(NotImplementedError, match=r"parameter 1, of shape \(5, 3\), is sparse"):
        add_gradient_noise_([p, embedding.weight], 0)
    with pytest.raises(TypeError, match="expected parameters"):
        add_gradient_noise_(["weight"], 0)
    with pytest.raises(TypeError, match="LBFGS"):
        GradientNoise(torch.optim.LBFGS([p]))
    with pytest.raises(TypeError, match="expected a torch optimizer"):
        GradientNoise([p])
    optimizer = torch.optim.SGD([p], lr=0.1)
    GradientNoise(optimizer)
    with pytest.raises(ValueError, match="already"):
        GradientNoise(optimizer)
    for call in (lambda: optimizer.step(lambda: 0.0), lambda: optimizer.step(closure=lambda: 0.0)):
        with pytest.raises(RuntimeError, match="closure"):
            call()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda noise: pickle.loads(pickle.dumps(noise))])
def test_copies_are_noisy_too_and_draw_the_same(copied):
    p = weights(50)
    noise = GradientNoise(torch.optim.SGD([p], lr=1.0), eta=0.3, generator=generator(3))
    noise.optimizer.step()
    twin = copied(noise)
    (q,) = twin.optimizer.param_groups[0]["params"]
    for each, parameter in ((noise, p), (twin, q)):
        parameter.grad = torch.zeros_like(parameter)
        each.optimizer.step()
        assert each.step == 2
    assert q is not p
    assert torch.equal(p, q)
    noise.remove()
    assert copied(noise)._handles == []
    with pytest.raises(TypeError, match=r"torch\.Generator, got int"):
        GradientNoise(torch.optim.SGD([p], lr=1.0), generator=3)


@pytest.mark.parametrize("host", [Backprop, partial(AugLocal, 1)])
def test_noise_beside_a_rule_keeps_the_contract(host):
    x, y = torch.randn(12, 6, generator=generator()), torch.arange(12) % 3
    check_rule(lambda: NoisyGradients(0.01).on(host()), MLP(6, 3, (8, 8)), (x, y))


def test_noise_beside_a_rule_is_that_of_the_optimizer_and_comes_off():
    x, y = torch.randn(40, 6, generator=generator()), torch.arange(40) % 3
    nets, made = [], []

    def plain(parameters):
        made.append(torch.optim.SGD(parameters, lr=0.1))
        return made[-1]

    def noisy(parameters):
        return GradientNoise(torch.optim.SGD(parameters, lr=0.1), eta=0.3).optimizer

    for rule, optimizer in ((NoisyGradients(eta=0.3).on(), plain), (None, noisy)):
        torch.manual_seed(0)
        nets.append(MLP(6, 3, (8,)))
        fit(nets[-1], (x, y), rule=rule, optimizer=optimizer, epochs=2, batch_size=10, progress=False, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    assert "gradient_noise" not in made[0].state_dict()
    with pytest.raises(ValueError, match="eta"):
        NoisyGradients(eta=-1)
