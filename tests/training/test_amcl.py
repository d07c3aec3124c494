"""Adaptive heads against naive loops, NT-Xent and the likelihood they come from."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.data.views import Compose, Flip
from torchfolio.training import AMCL, AMCLBarlow, AMCLMoCo, AMCLSimSiam
from torchfolio.training.amcl import (
    AMCLBarlowLoss,
    AMCLLoss,
    AMCLSimSiamLoss,
    ConcatTemperature,
    FixedTemperature,
    MultiHeadProjector,
    PairTemperature,
    temperature_penalty,
)
from torchfolio.training.contrastive import nt_xent

D = torch.float64


def views(heads=3, n=5, d=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(heads, n, d, generator=generator, dtype=D).requires_grad_() for _ in "ab"]


def temperature(dim=7, kind=PairTemperature, **bounds):
    torch.manual_seed(0)
    return kind(dim, hidden=6, **bounds).double()


@pytest.mark.parametrize("tau", [FixedTemperature(0.3), temperature(low=0.3, high=0.3 + 1e-12)])
def test_fixed_temperature_is_nt_xent(tau):
    a, b = views(1)
    ours, theirs = AMCLLoss(tau, beta=0)(a, b), nt_xent(a[0], b[0], 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for x, y in zip(torch.autograd.grad(ours, (a, b)), torch.autograd.grad(theirs, (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)
    same = AMCLLoss(tau, beta=0)(a.expand(4, -1, -1), b.expand(4, -1, -1))
    torch.testing.assert_close(same, 4 * theirs, rtol=1e-9, atol=1e-9)


def test_penalty_is_the_likelihood():
    a, b = (F.normalize(z[0].detach(), dim=1) for z in views(1))
    sim, tau = (a * b).sum(1), torch.linspace(0.1, 2, 5, dtype=D)
    normal = [torch.distributions.Normal(m, t.sqrt()).log_prob(x).sum() for m, t, x in zip(a, tau, b, strict=True)]
    ours = -sim / tau + temperature_penalty(tau, 7) + 7 / 2 * math.log(2 * math.pi)
    torch.testing.assert_close(ours, -torch.stack(normal), rtol=1e-10, atol=1e-10)
    best = (2 * (1 - sim) / 7).requires_grad_()
    (slope,) = torch.autograd.grad((-sim / best + temperature_penalty(best, 7)).sum(), best)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-8)
    torch.testing.assert_close(best.detach(), (a - b).square().sum(1) / 7)


def test_without_a_lower_bound_small_penalties_have_no_minimum():
    sim, tau = 0.5, torch.logspace(-6, -1, 40, dtype=D).requires_grad_()
    for beta, towards in ((1e-3, 1), (0.4, 1), (1.0, -1)):
        (slope,) = torch.autograd.grad((-sim / tau + beta * temperature_penalty(tau, 2)).sum(), tau)
        assert (slope.sign()[:20] == towards).all(), (
            "descent goes to the lower bound where beta is below the similarity"
        )


def test_temperatures():
    for kind in (PairTemperature, ConcatTemperature):
        tau = temperature(kind=kind)
        z = F.normalize(views()[0].detach(), dim=-1)
        t = tau(z, z)
        assert t.shape == (3, 5, 5)
        assert ((t > 0.05) & (t < 0.5)).all()
        torch.testing.assert_close(t.diagonal(dim1=1, dim2=2), tau.paired(z, z))
        torch.testing.assert_close(t[1, 2, 3], tau.paired(z[1, 2], z[1, 3]))
        assert torch.allclose(t, t.mT) == (kind is PairTemperature)
    for low, high in ((0, 1), (-1, 1), (1, 1), (2, 1), (float("nan"), 1), (0.1, float("inf"))):
        with pytest.raises(ValueError, match=r"low|high"):
            PairTemperature(3, low=low, high=high)


def naive(a, b, tau, beta, negatives, k):
    z, total = F.normalize(torch.cat([a, b], 1), dim=2), 0.0
    n, dim = a.shape[1:]
    for head in z:
        for i in range(2 * n):
            j = (i + n) % (2 * n)
            others = [m for m in range(2 * n) if m not in (i, j)]
            s = lambda m, i=i, head=head: head[i] @ head[m]  # noqa: E731
            t = lambda m, i=i, head=head: tau.paired(head[i], head[m])  # noqa: E731
            omega = lambda m, t=t: temperature_penalty(t(m), dim)  # noqa: E731
            loss = -s(j) / t(j) + beta * omega(j)
            if negatives == "logsumexp":
                loss = loss + torch.stack([s(m) / t(m) for m in [j, *others]]).logsumexp(0)
                loss = loss - beta * sum(map(omega, others)) / len(others)
            else:
                hard = sorted(others, key=lambda m, s=s: -s(m).item())[:k]
                loss = loss + sum(s(m) / t(m) - beta * omega(m) for m in hard) / k
            total = total + loss / (2 * n)
    return total


@pytest.mark.parametrize(("negatives", "k"), [("logsumexp", 1), ("max", 1), ("topk", 3)])
@pytest.mark.parametrize("kind", [PairTemperature, ConcatTemperature])
def test_simclr_form_is_the_double_loop(negatives, k, kind):
    (a, b), tau = views(), temperature(kind=kind)
    loss = AMCLLoss(tau, 0.1, negatives, k)
    ours, theirs = loss(a, b), naive(a, b, tau, 0.1, negatives, k)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weights = (a, b, *tau.parameters())
    both = (torch.autograd.grad(x, weights) for x in (ours, theirs))
    for x, y in zip(*both, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)
    z = F.normalize(torch.cat([a, b], 1), dim=2)
    torch.testing.assert_close(loss.stats["positive_temperature"], tau.paired(z, z.roll(5, 1)).mean().detach())
    low = AMCLLoss(copy.deepcopy(tau).float(), 0.1, negatives, k)(a.bfloat16(), b.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, ours.float(), rtol=0.05, atol=0.1)


def test_moco_form_is_the_double_loop():
    (q, key), (queue, _) = views(), views(n=6, seed=1)
    queue, tau, beta = F.normalize(queue.detach(), dim=2), temperature(), 0.1
    total = 0.0
    for head in range(3):
        for i in range(5):
            x, y = F.normalize(q[head, i], dim=0), F.normalize(key[head, i], dim=0)
            pairs = [(x @ m, tau.paired(x, m)) for m in (y, *queue[head])]
            total = total - pairs[0][0] / pairs[0][1] + torch.stack([s / t for s, t in pairs]).logsumexp(0)
            penalties = [temperature_penalty(t, 7) for _, t in pairs]
            total = total + beta * (penalties[0] - sum(penalties[1:]) / 6)
    torch.testing.assert_close(AMCLLoss(tau, beta)(q, key, queue), total / 5)


def test_simsiam_and_barlow_forms_are_the_double_loop():
    (p1, p2), (z1, z2), tau = views(), views(seed=1), temperature()
    expected = 0.0
    for p, z in ((p1, z2), (p2, z1)):
        p, z = F.normalize(p, dim=2), F.normalize(z, dim=2)
        for head in range(3):
            for i in range(5):
                t = tau.paired(p[head, i], z[head, i])
                expected = expected + (-(p[head, i] @ z[head, i]) / (2 * t) + 0.1 * temperature_penalty(t, 7)) / 5
    loss = AMCLSimSiamLoss(tau, 0.1)((p1, p2), (z1, z2))
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, z1, allow_unused=True) == (None,)
    tau, expected = temperature(5, low=0.5, high=1.5), 0.0
    for head in range(3):
        x, y = (F.batch_norm(z[head], None, None, training=True) for z in (p1, p2))
        for i in range(7):
            for j in range(7):
                c, t = x[:, i] @ y[:, j] / 5, tau.paired(x[:, i] / 5**0.5, y[:, j] / 5**0.5)
                omega = temperature_penalty(t, 7)
                expected = expected + ((1 - c / t) ** 2 + 0.1 * omega if i == j else 5e-3 * c**2 / t - 0.1 * omega)
    torch.testing.assert_close(AMCLBarlowLoss(tau, 0.1)(p1, p2), expected)


def test_projector_is_a_perceptron_for_each_head():
    torch.manual_seed(0)
    heads, h = MultiHeadProjector(6, 5, 4, heads=3), torch.randn(8, 6)
    for c, z in enumerate(heads(h)):
        hidden = F.linear(h, heads.weight1[c].T, heads.bias1[c, 0]).relu()
        torch.testing.assert_close(z, F.linear(hidden, heads.weight2[c].T, heads.bias2[c, 0]))
    again = pickle.loads(pickle.dumps(heads))
    torch.testing.assert_close(again(h.expand(3, -1, -1)), heads(h))
    assert repr(heads) == "MultiHeadProjector(6, 5, 4, heads=3)"
    with pytest.raises(ValueError, match="heads"):
        MultiHeadProjector(6, 5, 4, heads=0)


def test_detached_temperatures_still_learn():
    (a, b), tau = views(), temperature()
    ours = torch.autograd.grad(AMCLLoss(tau, 0.1, detach_temperature=True)(a, b), (a, *tau.parameters()))
    full = torch.autograd.grad(AMCLLoss(tau, 0.1)(a, b), (a, *tau.parameters()))
    assert not torch.allclose(ours[0], full[0])
    torch.testing.assert_close(ours[1:], full[1:])


def test_refusals():
    (a, b), tau = views(), temperature()
    for x, y, match in ((a[:, :1], b[:, :1], "two examples"), (a, b[:, :3], "equal shape"), (a / 0, b, "finite")):
        with pytest.raises(ValueError, match=match):
            AMCLLoss(tau)(x, y)
    with pytest.raises(ValueError, match="at most 8"):
        AMCLLoss(tau, negatives="topk", top_k=9)(a, b)
    for settings in ({"negatives": "hard"}, {"beta": -1}, {"top_k": 0}, {"beta": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            AMCLLoss(tau, **settings)
    for queue in (torch.ones(3, 0, 7), torch.ones(2, 4, 7), torch.ones(3, 4, 6)):
        with pytest.raises(ValueError, match=r"queue \[3, Q, 7\]"):
            AMCLLoss(tau)(a, b, queue)
    with pytest.raises(ValueError, match="queue to be finite"):
        AMCLLoss(tau)(a, b, torch.full((3, 4, 7), torch.nan))
    with pytest.raises(TypeError, match="module such as"):
        AMCLLoss(0.3)
    for kind in (PairTemperature, ConcatTemperature):
        with pytest.raises(ValueError, match="of width 6"):
            AMCLLoss(kind(6))(a, b)
    with pytest.raises(ValueError, match="got tuple"):
        AMCL().prepare(nn.LSTM(3, 2), (torch.randn(2, 3), None))
    with pytest.raises(ValueError, match=r"features \[N, D\]"):
        AMCL().prepare(nn.Conv2d(3, 2, 1), (torch.randn(2, 3, 8, 8), None))


X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
VIEW = Compose([Flip(), lambda x, generator=None: x + 0.1 * torch.randn_like(x)])


@pytest.mark.parametrize("rule", [AMCL, AMCLMoCo, AMCLSimSiam, AMCLBarlow])
def test_rules(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 3))
    own = {AMCLMoCo: {"queue": 16}, AMCLBarlow: {"batch_size": 12}}.get(rule, {})
    check_rule(lambda: rule(view=VIEW, out_dim=8, **own), net, (X, Y), batch_size=12 if rule is AMCLBarlow else 5)


@pytest.mark.parametrize("rule", [AMCL, AMCLMoCo, AMCLSimSiam, lambda **own: AMCLBarlow(6, **own)])
def test_double_precision(rule):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()
    made = rule(view=VIEW, out_dim=8)
    made.prepare(net, (X.double(), Y))
    made.step((X[:6].double(), Y[:6]), torch.Tensor.backward)
    assert net[1].weight.grad.abs().sum() > 0


def test_default_views_take_normalised_images():
    first, second = AMCL().views(torch.randn(4, 3, 8, 8) - 3)
    assert not torch.equal(first, second)
    assert first.mean() < -2


def test_moco_moves_its_copy_slowly():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    rule = AMCLMoCo(VIEW, momentum=0.75, queue=20, out_dim=8)
    parts = rule.prepare(net, (X, Y))
    before, old = parts["slow_encoder"][1].weight.clone(), parts["loss"].queue.clone()
    net[1].weight.data += 1
    rule.step((X[:6], Y[:6]), torch.Tensor.backward)
    torch.testing.assert_close(parts["slow_encoder"][1].weight, before + 0.25)
    assert parts["slow_encoder"][1].weight.grad is None
    torch.testing.assert_close(parts["loss"].queue[:, 12:], old[:, :8])
    torch.testing.assert_close(parts["loss"].queue.norm(dim=-1), torch.ones(3, 20))


@pytest.mark.parametrize("low", [0.02, 0.05])
@pytest.mark.parametrize("detach", [False, True])
def test_all_at_once_is_the_general_form(low, detach):
    class Own(PairTemperature):
        pass

    (a, b), tau = views(), temperature(low=low)
    own = temperature(kind=Own, low=low)
    results = []
    for module in (tau, own):
        loss = AMCLLoss(module, 0.1, detach_temperature=detach)
        value = loss(a, b)
        results.append([value, *loss.stats.values(), *torch.autograd.grad(3 * value, (a, b, *module.parameters()))])
        results[-1].append(loss(a.detach().requires_grad_(False), b.detach()))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [PairTemperature, ConcatTemperature])
def test_second_derivatives_are_refused(kind):
    (a, b), tau = views(), temperature(kind=kind)
    (slope,) = torch.autograd.grad(AMCLLoss(tau)(a, b), a, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        slope.square().sum().backward()
