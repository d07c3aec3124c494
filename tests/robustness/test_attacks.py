"""Attacks on linear models, where the answer is known, and what holds on any model."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from torchfolio.robustness.attacks import LOSSES, deepfool, fgsm, hop_skip_jump, margin, nes, pgd


def linear(dtype=torch.float64):
    """Two classes, z_1 - z_0 = w x + b."""
    torch.manual_seed(0)
    net = nn.Linear(6, 2, dtype=dtype)
    w = (net.weight[1] - net.weight[0]).detach()
    with torch.no_grad():  # the boundary runs through the middle of the box
        net.bias[1] = net.bias[0] - 0.5 * w.sum()
    return net, w


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.5), nn.Linear(20, 4)
    )


def points(n=9, shape=(6,), dtype=torch.float64):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_losses():
    z, y = torch.tensor([[1.0, 3.0, 2.0], [5.0, 0.0, 1.0]]), torch.tensor([1, 1])
    assert margin(z, y).tolist() == [-1, 5]
    assert margin(z, y, cap=2.0).tolist() == [-1, 2]
    assert LOSSES["sum_margin"](z, y).tolist() == [-3, 6]
    two = torch.randn(5, 2)
    torch.testing.assert_close(LOSSES["sum_margin"](two, two.argmax(1)), margin(two, two.argmax(1)))


@pytest.mark.parametrize("loss", ["ce", "margin", "sum_margin"])
def test_pgd_reaches_the_corner_of_a_linear_model(loss):
    net, w = linear()
    x, y = points(), torch.arange(9) % 2
    sign = torch.where(y == 1, -1.0, 1.0)[:, None]
    found = pgd(net, x, y, eps=0.1, alpha=0.1, steps=3, loss=loss)
    torch.testing.assert_close(found.x_adv, x + 0.1 * sign * w.sign())
    found = pgd(net, x, y, eps=0.1, alpha=0.1, steps=5, loss=loss, norm=2, start="zero")
    torch.testing.assert_close(found.x_adv, x + 0.1 * sign * w / w.norm())


def test_deepfool_finds_the_distance_to_a_plane():
    net, w = linear()
    x = points()
    y = net(x).argmax(1)
    found = deepfool(net, x, steps=1, overshoot=0.0)
    distance = (found.x_adv - x).norm(dim=1)
    wanted = margin(net(x), y).abs() / w.norm()
    torch.testing.assert_close(distance, wanted, atol=1e-6, rtol=0)
    crossed = deepfool(net, x)
    assert crossed.success.all()
    assert ((crossed.x_adv - x).norm(dim=1) <= 1.03 * wanted).all()
    many = deepfool(network().double().eval(), points(shape=(12,)), classes="all")
    assert many.success.all()


@pytest.mark.parametrize("norm", ["inf", 2])
@pytest.mark.parametrize("keep", ["best", "last", "flipped"])
def test_nothing_leaves_ball_or_box(norm, keep):
    net, x = network(), points(shape=(3, 4), dtype=torch.float32)
    y = net.eval()(x).argmax(1)
    found = pgd(
        net, x, y, eps=0.3, alpha=0.1, steps=5, restarts=3, norm=norm, keep=keep, clip=(0.0, 1.0), max_batch=10,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert float(found.x_adv.min()) >= 0
    assert float(found.x_adv.max()) <= 1
    change = (found.x_adv - x).flatten(1)
    assert (change.abs().amax(1) if norm == "inf" else change.norm(dim=1)).max() <= 0.3 + 1e-6
    assert torch.equal(found.success, net(found.x_adv).argmax(1) != y)
    torch.testing.assert_close(found.loss, margin(net(found.x_adv), y))


def test_more_restarts_and_best_points_are_no_worse():
    net, x = network().eval(), points(40, shape=(3, 4), dtype=torch.float32)
    y = net(x).argmax(1)

    def attack(**settings):
        return pgd(net, x, y, eps=0.5, alpha=0.2, steps=4, generator=torch.Generator().manual_seed(0), **settings).loss

    assert (attack(restarts=8) >= attack(restarts=1) - 1e-6).all()
    assert (attack(keep="best") >= attack(keep="last") - 1e-6).all()
    torch.testing.assert_close(
        attack(restarts=8, max_batch=13).sort().values.mean(), attack(restarts=8).mean(), atol=0.2, rtol=0
    )


def test_flipped_keeps_a_random_point_until_one_flips():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.zero_()
        net.bias.copy_(torch.tensor([1.0, 0.0]))  # nothing flips
    x, y = points(5, (3,), torch.float32), torch.zeros(5, dtype=torch.long)
    found = pgd(net, x, y, eps=0.1, alpha=0.05, steps=3, keep="flipped", generator=torch.Generator().manual_seed(0))
    noise = pgd(net, x, y, eps=0.1, alpha=0.05, steps=0, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.x_adv, noise.x_adv)
    assert not torch.equal(found.x_adv, x)


def test_targeted_attacks_reach_their_class():
    net, x = network().eval(), points(shape=(3, 4), dtype=torch.float32)
    target = (net(x).argmax(1) + 1) % 4
    found = pgd(net, x, target, eps=3.0, alpha=0.3, steps=40, targeted=True, loss="ce")
    assert found.success.double().mean() > 0.8
    assert torch.equal(found.success, net(found.x_adv).argmax(1) == target)


def test_the_same_generator_gives_the_same_points():
    net, x = network().eval(), points(shape=(3, 4), dtype=torch.float32)
    y = net(x).argmax(1)
    for attack in (
        lambda g: pgd(net, x, y, eps=0.2, alpha=0.05, steps=3, restarts=2, generator=g),
        lambda g: nes(net, x, y, eps=0.2, step=0.05, steps=3, generator=g),
        lambda g: hop_skip_jump(net, x, y, max_queries=400, generator=g),
    ):
        first, second = (attack(torch.Generator().manual_seed(7)) for _ in range(2))
        assert torch.equal(first.x_adv, second.x_adv)


def test_the_model_is_left_as_it_was():
    net, x = network(), points(shape=(3, 4), dtype=torch.float32)
    net[1].weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    y = torch.zeros(9, dtype=torch.long)
    for attack in (
        lambda: pgd(net, x, y, eps=0.1, alpha=0.1, steps=2),
        lambda: fgsm(net, x, y, eps=0.1),
        lambda: deepfool(net, x, y),
        lambda: nes(net, x, y, eps=0.1, step=0.05, steps=2),
        lambda: hop_skip_jump(net, x, y, max_queries=200),
    ):
        attack()
        assert net.training
        assert [p.requires_grad for p in net.parameters()][:2] == [False, True]
        assert all(p.grad is None for p in net.parameters())
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_fgsm_is_one_whole_step():
    net, w = linear()
    x, y = points(), torch.ones(9, dtype=torch.long)
    torch.testing.assert_close(fgsm(net, x, y, eps=0.2).x_adv, x - 0.2 * w.sign())


def test_nes_finds_the_corner_without_gradients():
    net, _ = linear()
    x = points()
    y = net(x).argmax(1)
    found = nes(net, x, y, eps=0.05, step=0.05, steps=4, samples=2000, stop=1e9)
    torch.testing.assert_close(found.x_adv, pgd(net, x, y, eps=0.05, alpha=0.05, steps=1, start="zero").x_adv)
    assert found.queries == 4 * 4000
    solved = nes(net, x, 1 - y, eps=0.05, step=0.05, steps=30, stop=0.0)
    assert solved.queries == 0


@pytest.mark.parametrize("norm", ["inf", 2])
def test_decisions_alone_lead_near_the_boundary(norm):
    net, w = linear()
    x = 0.2 + 0.6 * points()
    y = net(x).argmax(1)
    found = hop_skip_jump(net, x, y, max_queries=3000, norm=norm, generator=torch.Generator().manual_seed(0))
    reachable = found.success
    assert reachable.any()
    gap = margin(net(x), y).abs()
    wanted = gap / (w.norm() if norm == 2 else w.abs().sum())
    change = found.x_adv - x
    distance = change.norm(dim=1) if norm == 2 else change.abs().amax(1)
    inside = reachable & (wanted < 0.15)
    assert inside.any()
    assert (distance[inside] < (1.3 if norm == 2 else 2.5) * wanted[inside] + 0.02).all()
    assert found.queries <= 3000


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ((points(), torch.zeros(3, dtype=torch.long)), {}, r"labels \[9\]"),
        ((points() * torch.nan, torch.zeros(9, dtype=torch.long)), {}, "NaN"),
        ((points(), torch.zeros(9, dtype=torch.long)), {"clip": (0.5, 1.0)}, "inputs in"),
        ((points(), torch.zeros(9, dtype=torch.long)), {"loss": "hinge"}, "hinge"),
        ((points(), torch.zeros(9, dtype=torch.long)), {"norm": 1}, "norm"),
        ((points(), torch.zeros(9, dtype=torch.long)), {"keep": "all"}, "all"),
        ((points(0), torch.zeros(0, dtype=torch.long)), {}, "at least one"),
    ],
)
def test_bad_input_is_refused(arguments, settings, message):
    with pytest.raises(ValueError, match=message):
        pgd(linear()[0], *arguments, **{"eps": 0.1, "alpha": 0.1, "steps": 1, **settings})


ATTACKS = {
    "fgsm": partial(fgsm, eps=0.1),
    "pgd": partial(pgd, eps=0.1, alpha=0.1, steps=2),
    "pgd by cross-entropy": partial(pgd, eps=0.1, alpha=0.1, steps=2, loss="ce", restarts=2, targeted=True),
    "deepfool": deepfool,
    "nes": partial(nes, eps=0.1, step=0.1, steps=2),
    "hop_skip_jump": partial(hop_skip_jump, max_queries=200),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_what_no_attack_can_judge_is_refused(attack):
    """Labels out of range once gave errors of torch, or a success on all; a network of NaN seemed robust."""
    net, x = network().eval(), points(shape=(12,), dtype=torch.float32).clamp(0, 1)
    y = net(x).argmax(1)
    assert attack(net, x, y.int()).success.shape == y.shape
    for label in (-1, -100, net(x).shape[1]):
        wrong = y.clone()
        wrong[-1] = label
        with pytest.raises(ValueError, match="labels from 0"):
            attack(net, x, wrong)
    with pytest.raises(ValueError, match="float input"):
        attack(net, x.long(), y)
    broken = network().eval()
    next(broken.parameters()).data.flatten()[0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        attack(broken, x, y)
    if attack is not deepfool:
        with pytest.raises(ValueError, match="answers with NaN"):
            attack(lambda x: net(x) * torch.nan, x, y)
