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
