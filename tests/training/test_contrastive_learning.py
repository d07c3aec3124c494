"""Contrastive learning rules: the contract, their losses by hand, and one pass for both views."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data.views import Compose
from torchfolio.engine import fit
from torchfolio.training.contrastive import nt_xent, simsiam
from torchfolio.training.contrastive_learning import BYOL, SimCLR, SimSiam

RULES = [SimSiam, SimCLR, BYOL]


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), nn.BatchNorm1d(12), nn.ReLU())


def data(n: int = 24):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("rule", RULES)
def test_training_lowers_the_loss_and_repeats(rule):
    def train():
        net = encoder()
        before = torch.get_rng_state()
        result = fit(net, data(), rule=rule(hidden=16, out_dim=8), optimizer=partial(torch.optim.Adam, lr=3e-3), max_steps=40,
                     batch_size=12, drop_last=True, progress=False)  # fmt: skip
        assert torch.equal(before, torch.get_rng_state())
        return net, result

    (net, result), (again, _) = train(), train()
    losses = result.history.to_frame()["loss"].dropna().tolist()
    assert losses[-1] < losses[0]
    for a, b in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(list(net.parameters())) == 4  # nothing is left on the user's network


@pytest.mark.parametrize("rule", RULES)
def test_the_encoder_runs_once_for_both_views(rule):
    net, seen = encoder(), []
    made = rule(Compose([]), hidden=16, out_dim=8)
    parts = made.prepare(net, data(2))
    net.register_forward_hook(lambda m, args, out: seen.append(len(args[0])))
    parts.train()
    loss = made.step(data(6), lambda loss: loss.backward())["loss"]
    assert seen == [12]
    assert all(p.grad is not None for p in parts["encoder"].parameters())
    views = torch.cat([data(6)[0]] * 2)
    if rule is SimCLR:
        torch.testing.assert_close(loss, nt_xent(*made.project(views).chunk(2), 0.2).detach())
    if rule is SimSiam:
        z = made.project(views)
        torch.testing.assert_close(loss, simsiam(parts["predictor"](z).chunk(2), z.chunk(2)).detach())  # pyright: ignore


def test_byol_averages_its_copy():
    made = BYOL(Compose([]), momentum=0.75, hidden=16, out_dim=8)
    parts = made.prepare(encoder(), data(2))
    slow, fast = parts["slow_encoder"][1].weight, parts["encoder"][1].weight
    with torch.no_grad():
        fast.add_(1)
    wanted = 0.75 * slow.clone() + 0.25 * fast.detach()
    made.step(data(6), lambda loss: loss.backward())
    torch.testing.assert_close(slow, wanted)
    assert slow.grad is None


def test_losses_by_hand():
    z = F.normalize(torch.randn(6, 4), dim=1)
    p = z.clone().requires_grad_(True)
    target = z.clone().requires_grad_(True)
    loss = simsiam((p, p), (target, target))
    assert loss.item() == pytest.approx(-1, abs=1e-6)
    loss.backward()
    assert p.grad is not None
    assert target.grad is None  # nothing reaches the other branch
    pairs, tau = torch.eye(5, dtype=torch.float64), 0.3
    expected = math.log(1 + (2 * 5 - 2) * math.exp(-1 / tau))
    assert nt_xent(pairs, pairs, tau).item() == pytest.approx(expected, rel=1e-12)


def test_bad_input_is_refused():
    for call, message in (
        (lambda: SimCLR(temperature=0.0), "temperature"),
        (lambda: BYOL(momentum=math.nan), "momentum"),
        (lambda: SimSiam(out_dim=0), "out_dim"),
        (lambda: SimSiam().prepare(nn.Conv2d(3, 4, 3), data(2)), "encoder"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match="prepare"):
        SimSiam().step(data(4), lambda loss: None)
    assert copy.deepcopy(SimSiam()).out_dim == 128
