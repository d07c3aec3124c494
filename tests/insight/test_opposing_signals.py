"""Opposing signals: the solvable model against autograd, groups that were planted, what is said where nothing is seen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import fit
from torchfolio.insight import (
    LossRecorder,
    OpposingSignalModel,
    SignSplitSGD,
    find_groups,
    inject,
    measure_groups,
    trace,
)


def model():
    return OpposingSignalModel(3, 4, 5.0, 0.1, 2.0)


def state(seed=0):
    g = torch.Generator().manual_seed(seed)
    c, b, b_o = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((), 3, 4))
    return c, b, b_o


def test_gradient_and_hessian_are_autograds():
    m, s = model(), state()
    leaves = [t.clone().requires_grad_() for t in s]
    grads = torch.autograd.grad(m.loss(*leaves), leaves)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(m.grad(*s), grads, strict=True))
    flat = torch.cat([t.flatten() for t in s])
    expected = torch.autograd.functional.hessian(lambda v: m.loss(v[0], v[1:4], v[4:]), flat)
    assert torch.allclose(m.hessian(*s), expected, atol=1e-12)
    assert m.sharpness(*s) == pytest.approx(float(torch.linalg.eigvalsh(expected)[-1]))


def test_the_population_loss_is_that_of_a_large_sample():
    m, (c, b, b_o) = model(), state()
    x, y, sign = m.sample(400_000, generator=torch.Generator().manual_seed(0))
    sampled = 0.5 * (c * (x @ torch.cat([b, b_o])) - y).square().mean()
    assert float(sampled) == pytest.approx(float(m.loss(c, b, b_o)), rel=0.02)
    assert float((sign != 0).double().mean()) == pytest.approx(0.1, abs=0.003)


def test_groups_of_the_model_oppose_each_other_exactly():
    m = model()
    b_o = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(loss, b_o, retain_graph=True)[0] for loss in m.group_losses(torch.tensor(0.7).double(), b_o)
    ]
    assert (grads[0] + grads[1]).abs().max() <= 1e-12
    assert grads[0].norm() == pytest.approx(0.7 * 5.0 / 0.1)


def test_gradient_flow_keeps_q_and_ends_at_the_closed_form():
    m = OpposingSignalModel(5, 5, 20.0, 0.05, 2.0)
    start = m.start(generator=torch.Generator().manual_seed(0))
    path = m.simulate(5e-4, 20_000, start, every=400)
    q = path.conserved
    assert float((q - q[0]).abs().max()) <= 1e-3 * max(1.0, float(q[0].abs()))
    assert float(path.sharpness[-1]) == pytest.approx(m.final_sharpness(*start), rel=5e-3)
    assert torch.equal(path.state[0], m.simulate(5e-4, 20_000, start, every=20_000).state[0])


def planted_losses(steps=30, n=400):
    rng = np.random.default_rng(0)
    losses = 2.0 - 0.03 * np.arange(steps)[:, None] + 1e-3 * rng.standard_normal((steps, n))
    swing = np.where(np.arange(steps) % 2, 1.0, -1.0) * np.exp(0.3 * np.arange(steps)) / 500
    losses[:, :10] += swing[:, None]
    losses[:, 10:20] -= swing[:, None]
    losses[21:, :10] += 3.0
    return losses


def test_planted_groups_are_found_at_the_first_rise():
    groups = find_groups(planted_losses(), k=10)
    assert groups.instability
    assert groups.step == 20
    assert set(groups.positive) == set(range(10))
    assert groups.opposition < -0.5
    assert groups.concentration > 0.3
    assert set(np.argsort(groups.score)[::-1][:10]) <= set(range(20))
    assert len(find_groups(planted_losses()).positive) == 10
    calm = find_groups(np.linspace(2, 1, 12)[:, None] * np.ones((1, 40)))
    assert not calm.instability
    chosen = find_groups(planted_losses(), k=10, step=18, window=5)
    assert chosen.step == 18


def test_bad_losses():
    good = planted_losses()
    for bad, arguments, match in (
        (good[:1], {}, "two steps"), (good[0], {}, "two steps"), (good * np.nan, {}, "finite"), (good, {"k": 201}, "k"),
        (good, {"step": 29}, "step"), (good, {"window": 0}, "window"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            find_groups(bad, **arguments)


def conv_net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Dropout(dropout), nn.Flatten(), nn.Linear(4 * 16, 3))


def images(n=60):
    g = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(3, 1, 6, 6, generator=g)[y] + 0.5 * torch.randn(n, 1, 6, 6, generator=g), y


def test_the_recorder_keeps_the_training_loss_and_leaves_the_network():
    x, y = images()
    net = conv_net()
    path = trace(net, (x, y), lr=0.05, steps=6, sharpness_every=3)
    assert path.losses.shape == (7, 60)
    assert path.steps == (0, 3, 6)
    again = conv_net()
    recorder = LossRecorder(again, (x, y), batch_size=7)
    fit(again, (x, y), callbacks=[recorder], optimizer=lambda p: torch.optim.SGD(p, lr=0.05), epochs=6, batch_size=60)
    assert np.allclose(recorder.losses, path.losses, atol=1e-5)
    assert np.allclose(recorder.losses.mean(1)[-1], F.cross_entropy(again(x), y).item(), atol=1e-5)
    dropping = conv_net(0.5).train()
    for _ in range(2):
        LossRecorder(dropping, (x, y)).record()
    assert dropping.training
    with pytest.raises(ValueError, match="reduction='none'"):
        LossRecorder(net, (x, y), F.cross_entropy).record()
    with pytest.raises(ValueError, match="60 examples as before"):
        recorder.record(torch.zeros(3))


def test_groups_are_measured_beside_random_ones():
    x, y = images()
    net = conv_net(0.3).train()
    before = copy.deepcopy(net.state_dict())
    path = trace(conv_net(), (x, y), lr=0.05, steps=4, sharpness_every=0)
    groups = find_groups(path.losses, k=6)
    table = measure_groups(net, (x, y), groups, n_random=3)
    assert list(table.index) == ["opposing", "random"]
    assert table.notna().all(axis=None)
    assert table.loc["random", "norm_ratio"] == pytest.approx(1)
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert table.equals(measure_groups(net, (x, y), groups, n_random=3))
    with pytest.raises(ValueError, match="floating-point"):
        measure_groups(nn.Embedding(4, 3), (torch.zeros(60, dtype=torch.int64), y), groups)


def test_injection():
    x, y = images()
    changed, mask = inject(x, y, (0, 2), 10)
    assert int(mask.sum()) == 10
    assert [int((mask & (y == k)).sum()) for k in range(3)] == [5, 0, 5]
    assert torch.equal(changed[~mask], x[~mask])
    rest = changed[mask] - 0.3 * x[mask]
    assert torch.allclose(rest, rest[..., :1, :1].expand_as(rest), atol=1e-5), "one colour"
    for arguments, match in (((0, 1), 9), "even"), (((0, 1), 60), "at least 30"):
        with pytest.raises(ValueError, match=match):
            inject(x, y, *arguments)


def test_sign_split_steps():
    p = nn.Parameter(torch.zeros(4))
    optimizer = SignSplitSGD([p], lr=0.5, sign_lr=0.01, momentum=0.0, dampening=0.0, threshold=1.0)
    p.grad = torch.tensor([0.2, -0.4, 3.0, -7.0])
    optimizer.step()
    assert torch.allclose(p, torch.tensor([-0.1, 0.2, -0.01, 0.01]))
    twin = nn.Parameter(p.detach().clone())
    other = SignSplitSGD([twin])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for q, o in ((p, optimizer), (twin, other)):
        q.grad = torch.ones(4)
        o.step()
    assert torch.equal(p, twin)
    automatic = SignSplitSGD([nn.Parameter(torch.zeros(10))], quantile=0.1)
    automatic.param_groups[0]["params"][0].grad = torch.arange(10.0)
    automatic.step()
    assert automatic.param_groups[0]["threshold"] == 8.0
    with pytest.raises(ValueError, match="momentum"):
        SignSplitSGD([p], momentum=float("nan"))


def test_what_does_not_fit_is_told():
    x, y = torch.randn(40, 6), torch.arange(40) % 2
    net = nn.Linear(6, 2)
    groups = find_groups(torch.rand(4, 40))
    with pytest.raises(ValueError, match="40 examples that the groups count, got 20"):
        measure_groups(net, (x[:20], y[:20]), groups)
    table = measure_groups(net.double(), (x, y), groups)  # inputs go in the precision of the weights
    assert table.loc["opposing", "input_mean_1"] == pytest.approx(float(x[groups.positive].mean() - x.mean()), abs=1e-6)
    with pytest.raises(ValueError, match="finite"):
        measure_groups(net, (x * torch.nan, y), groups)
    with pytest.raises(ValueError, match="reduction='none'"):
        trace(nn.Linear(6, 2), (x, y), lr=0.1, steps=2, loss=F.cross_entropy)
    with pytest.raises(ValueError, match="step 0; the data"):
        trace(nn.Linear(6, 2), (x * torch.nan, y), lr=0.1, steps=2)
    with pytest.raises(ValueError, match="twice"):
        inject(x, y, (1, 1), 4)
    with pytest.raises(TypeError, match="floating point"):
        inject(x.long(), y, (0, 1), 4)
    with pytest.raises(ValueError, match="finite"):
        inject(x * torch.nan, y, (0, 1), 4)
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((3,), torch.nan)
    with pytest.raises(ValueError, match="first gradients"):
        SignSplitSGD([weight]).step()
