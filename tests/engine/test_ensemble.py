"""Ensembles against their members trained one by one."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from torchfolio.engine import fit, fit_many

X = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randint(2, (24,), generator=torch.Generator().manual_seed(1))


def nets(n: int = 4) -> list[nn.Module]:
    found: list[nn.Module] = []
    for seed in range(n):
        torch.manual_seed(seed)
        found.append(nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2)))
    return found


def check_alone(together, alone, train, optimizers, seeds, batch_size):
    """Every member is where `fit` takes it by itself."""
    for k, (net, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
        fit(
            net,
            train[k],
            optimizer=optimizer,
            max_steps=15,
            batch_size=batch_size,
            seed=seeds[k],
            device="cpu",
        )
        for a, b in zip(together[k].parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_members_are_trained_as_if_alone(kind, batch_size):
    together = nets()
    alone = copy.deepcopy(together)
    rates, decay = [0.01, 0.03, 0.1, 0.2], [0.0, 0.1, 0.0, 0.01]
    momentum = [0.0, 0.9, 0.5, 0.9]
    result = fit_many(
        together,
        X,
        Y,
        steps=15,
        lr=rates,
        weight_decay=decay,
        momentum=momentum,
        optimizer=kind,
        batch_size=batch_size,
    )
    classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    optimizers = [
        partial(torch.optim.SGD, lr=r, weight_decay=d, momentum=m)
        if kind == "sgd"
        else partial(classes[kind], lr=r, weight_decay=d)
        for r, d, m in zip(rates, decay, momentum, strict=True)
    ]
    check_alone(result.models, alone, [(X, Y)] * 4, optimizers, [0] * 4, batch_size or len(X))
    assert result.losses.shape == (15, 4)
    assert result.to_frame().shape == (15, 4)


def test_own_orders_and_own_data():
    together, seeds = nets(), [3, 4, 5, 6]
    alone = copy.deepcopy(together)
    sgd = [partial(torch.optim.SGD, lr=0.1)] * 4
    fit_many(together, X, Y, steps=15, lr=0.1, batch_size=7, seed=seeds)
    check_alone(together, alone, [(X, Y)] * 4, sgd, seeds, 7)

    together = nets()
    alone = copy.deepcopy(together)
    x, y = torch.stack([X + k for k in range(4)]), torch.stack([Y.roll(k) for k in range(4)])
    fit_many(together, x, y, steps=15, lr=0.1, batch_size=7, own_data=True)
    check_alone(together, alone, list(zip(x, y, strict=True)), sgd, [0] * 4, 7)

    together = nets()
    alone = copy.deepcopy(together)
    fit_many(together, x, y, steps=15, lr=0.1, batch_size=7, own_data=True, seed=seeds)
    check_alone(together, alone, list(zip(x, y, strict=True)), sgd, seeds, 7)


def chains(n: int = 3) -> list[nn.Sequential]:
    found: list[nn.Sequential] = []
    for seed in range(n):
        torch.manual_seed(seed)
        inner = nn.Sequential(nn.Linear(4, 6, bias=False), nn.PReLU(), nn.Linear(6, 5), nn.ELU())
        found.append(nn.Sequential(nn.Flatten(), inner, nn.Linear(5, 3)).double())
    return found


class Called(nn.Sequential):
    """The same chain, whose own forward keeps it from running as one."""

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("own_data", [True, False])
@pytest.mark.parametrize("loss", [None, lambda z, y: nn.functional.cross_entropy(z, y)])
def test_chains_take_the_same_steps_as_other_networks(own_data, loss):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 20, 2, 2, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (3, 20), generator=generator)
    y[:, 3] = -100  # a target that cross-entropy passes over
    x, y = (x, y) if own_data else (x[0], y[0])
    together, wrapped = chains(), [Called(*net) for net in chains()]

    def penalty(p):
        return 0.1 * p["2.weight"].square().flatten(1).sum(1)

    settings = {"steps": 10, "lr": 0.05, "optimizer": "adam", "batch_size": 7, "own_data": own_data, "seed": [1, 2, 3]}
    a = fit_many(together, x, y, loss=loss, penalty=penalty, **settings)
    b = fit_many(wrapped, x, y, loss=loss, penalty=penalty, **settings)
    torch.testing.assert_close(a.losses, b.losses, rtol=0, atol=1e-9)
    for one, other in zip(together, wrapped, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_a_penalty_acts_like_weight_decay():
    together, alone = nets(), nets()

    def penalty(p):
        return 0.05 * torch.stack([v.square().flatten(1).sum(1) for v in p.values()]).sum(0)

    fit_many(together, X, Y, steps=10, lr=0.1, penalty=penalty)
    fit_many(alone, X, Y, steps=10, lr=0.1, weight_decay=0.1)
    for one, other in zip(together, alone, strict=True):
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"penalty for each member, shape \(4,\)"):
        fit_many(nets(), X, Y, steps=1, penalty=lambda p: p["0.weight"].sum())


def test_frozen_parameters_stay():
    together = nets()
    for net in together:
        net.get_parameter("0.weight").requires_grad_(False)
    before = [net.get_parameter("0.weight").clone() for net in together]
    fit_many(together, X, Y, steps=3, lr=0.1, weight_decay=0.1)
    assert all(torch.equal(net.get_parameter("0.weight"), w) for net, w in zip(together, before, strict=True))
    with pytest.raises(ValueError, match="none that require a gradient"):
        fit_many([net.requires_grad_(False) for net in together], X, Y, steps=1)


def test_a_member_that_diverges_leaves_the_others_alone():
    together = [nn.Linear(3, 1) for _ in range(3)]
    alone = copy.deepcopy(together[0])
    target = X.sum(1, keepdim=True)
    result = fit_many(together, X, target, steps=200, lr=[0.05, 1e6, 0.05])
    assert result.diverged.tolist() == [False, True, False]
    fit(
        alone,
        (X, target),
        optimizer=partial(torch.optim.SGD, lr=0.05),
        max_steps=200,
        batch_size=24,
        device="cpu",
    )
    torch.testing.assert_close(together[0].weight, alone.weight, rtol=1e-3, atol=1e-5)
    assert result.outputs(X).shape == (3, 24, 1)


def test_record_sees_every_step_and_the_end():
    seen = []
    together = nets(2)
    fit_many(together, X, Y, steps=3, record=lambda step, p: seen.append((step, p["0.weight"].clone())))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[-1][1][0], together[0].get_parameter("0.weight"))


def test_dropout_is_seeded_and_generators_are_left_alone():
    def train():
        torch.manual_seed(0)
        together: list[nn.Module] = [nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)) for _ in range(2)]
        fit_many(together, X, Y, steps=3, seed=4)
        return torch.rand(1), together[0].get_parameter("0.weight")

    (a, first), (b, second) = train(), train()
    assert torch.equal(a, b)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("models", "arguments", "message"),
    [
        ([], {}, "at least one"),
        ([nn.Linear(3, 2), nn.Linear(3, 3)], {}, "network 1 differs"),
        ([nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))], {}, "1 is a BatchNorm1d"),
        ([nn.Linear(3, 2)] * 2, {}, "share"),
        (None, {"lr": [0.1, 0.2, 0.3]}, "lr to be one number or 4"),
        (None, {"seed": [1, 2]}, "one seed or 4"),
        (None, {"steps": 0}, "steps"),
        (None, {"optimizer": "lion"}, "'sgd', 'adam' or 'adamw'"),
        (None, {"own_data": True}, "for each of 4 members"),
        (None, {"x": X * float("nan")}, "NaN"),
    ],
)
def test_bad_input(models, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit_many(**({"models": nets() if models is None else models, "x": X, "y": Y, "steps": 2} | arguments))
