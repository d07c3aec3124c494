"""Dual-head distillation against its equations, and against what it must leave alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.objectives import check_objective
from tests.contracts.rules import check_rule
from torchfolio.engine import fit
from torchfolio.measure import outputs
from torchfolio.training import DHKD, AuxiliaryDistillation, DualHead, binary_kl, binary_kl_norm
from torchfolio.training.dhkd import align_gradients, etf_deviation, head_conflict, kd_loss


def logits(n=6, k=5, seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, k, generator=generator, dtype=dtype)


def conv_net(channels=1, classes=3, seed=0):
    torch.manual_seed(seed)
    layer = lambda c, d: nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU())  # noqa: E731
    return nn.Sequential(
        layer(channels, 4), layer(4, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(6, classes)
    )


X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
TEACHER = conv_net(seed=1).eval()


# Losses


@pytest.mark.parametrize("tau", [0.5, 2.0, 30.0])
def test_norm_is_log_cosh_with_its_gradient(tau):
    z, v = logits().requires_grad_(), logits(seed=1)
    delta = (z - v).detach()
    loss = binary_kl_norm(z, v, tau)
    torch.testing.assert_close(loss.detach(), tau**2 * (delta / (2 * tau)).cosh().log().sum() / 6, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, tau / 12 * (delta / (2 * tau)).tanh(), rtol=1e-12, atol=1e-12)
    half, q = torch.tensor(0.5, dtype=z.dtype), (delta / tau).sigmoid()
    bernoulli = 0.5 * (half / q).log() + 0.5 * (half / (1 - q)).log()
    torch.testing.assert_close(binary_kl_norm(z, v, tau, "none").detach(), tau**2 * bernoulli, rtol=1e-9, atol=1e-10)


def test_norm_in_the_limits():
    z, v = logits(), logits(seed=1)
    torch.testing.assert_close(binary_kl_norm(z, v, 1e4), (z - v).square().sum() / 48, rtol=1e-6, atol=0)
    same = v.clone().requires_grad_()
    loss = binary_kl_norm(same, v)
    loss.backward()
    assert loss.item() == 0
    assert not same.grad.any()
    wide = torch.tensor([[-1e4, -90.0, 0.0, 50.0, 1e4]], requires_grad=True)
    for loss in (binary_kl_norm(wide, torch.zeros(1, 5)), binary_kl(wide, -wide.detach()), kd_loss(wide, -wide)):
        assert loss.isfinite()
    (gradient,) = torch.autograd.grad(binary_kl_norm(wide, torch.zeros(1, 5)), wide)
    torch.testing.assert_close(gradient, (wide / 4).tanh().detach())


def test_binary_kl_is_the_divergence():
    z, v = logits(), logits(seed=1)
    p, q = (v / 2).sigmoid(), (z / 2).sigmoid()
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    torch.testing.assert_close(binary_kl(z, v, 2.0, "none"), expected)
    torch.testing.assert_close(kd_loss(z, v, 4.0), 16 * F.kl_div((z / 4).log_softmax(1), (v / 4).softmax(1), reduction="batchmean"))  # fmt: skip


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm, kd_loss])
def test_losses(loss):
    z, v = logits().requires_grad_(), logits(seed=1)
    assert torch.autograd.gradcheck(lambda z: loss(z, v), z)
    torch.testing.assert_close(loss(z, v, reduction="sum"), 6 * loss(z, v))
    torch.testing.assert_close(loss(z, v, reduction="none").sum(), 6 * loss(z, v))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(loss(z[order], v[order]), loss(z, v))
    assert loss(z.bfloat16(), v.bfloat16()).dtype == torch.float32
    assert loss(v, v).abs() < 1e-12
    for tau in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="tau"):
            loss(z, v, tau)
    with pytest.raises(ValueError, match="logits"):
        loss(z, v[:, :3])
    with pytest.raises(ValueError, match="reduction"):
        loss(z, v, reduction="mean")


# Two heads


@pytest.mark.parametrize("aux", ["linear", "mlp"])
def test_each_head_hears_its_own_loss(aux):
    dual = DualHead(conv_net(), aux=aux).train()
    for loss, deaf in ((lambda a, b: F.cross_entropy(a, Y), dual.aux), (lambda a, b: b.sum(), dual.classifier)):
        dual.zero_grad()
        loss(*dual(X)).backward()
        assert all(p.grad is None for p in deaf.parameters())
        assert dual.model[0][0].weight.grad.any()


def test_the_student_comes_back_as_it_came():
    net = conv_net()
    keys, copied = list(net.state_dict()), copy.deepcopy(net)
    dual = DualHead(net, "5", "linear").eval()
    torch.testing.assert_close(dual(X), copied.eval()(X), rtol=0, atol=0)
    assert dual.student() is net
    assert list(net.state_dict()) == keys
    dual.train()(X)[1].sum().backward()
    assert not net[5]._forward_pre_hooks
    again = pickle.loads(pickle.dumps(dual)).eval()
    torch.testing.assert_close(again(X), dual.eval()(X), rtol=0, atol=0)
    copy.deepcopy(dual).load_state_dict(dual.state_dict())
    assert "(aux)" in repr(dual)
    compiled = torch.compile(dual.train(), backend="eager")
    assert [t.shape for t in compiled(X)] == [(12, 3), (12, 3)]


def test_other_classifiers():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    assert DualHead(net, aux=nn.Linear(9, 4).double())(torch.randn(3, 7).double())[1].dtype == torch.float64
    assert DualHead(net.bfloat16())(torch.randn(3, 7).bfloat16())[1].dtype == torch.bfloat16
    own = nn.Linear(9, 4)
    with pytest.raises(ValueError, match=r"it has 0, 2"):
        DualHead(net, "1")
    with pytest.raises(ValueError, match="it has none"):
        DualHead(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="aux"):
        DualHead(net, aux="deep")
    with pytest.raises(ValueError, match="once"):
        DualHead(nn.Sequential(own, nn.Linear(4, 9), own), "0")(torch.randn(2, 9))


# Gradients


def test_alignment_takes_the_conflict_out():
    a, b = [logits(seed=0), logits(2, seed=1)], [logits(seed=2), logits(2, seed=3)]
    dot = lambda x, y: sum((p * q).sum() for p, q in zip(x, y, strict=True))  # noqa: E731
    for sign in (1, -1):
        signed = [sign * g for g in b]
        new = align_gradients(a, signed)
        assert dot(new, a) >= -1e-6 * dot(b, b).sqrt() * dot(a, a).sqrt()
        if dot(signed, a) >= 0:
            assert all(torch.equal(p, q) for p, q in zip(new, signed, strict=True))
        else:
            share = dot(signed, a) / dot(a, a)
            torch.testing.assert_close(new, [q - share * p for p, q in zip(a, signed, strict=True)])
    torch.testing.assert_close(align_gradients([torch.zeros(2)], [torch.ones(2)])[0], torch.ones(2))
    with pytest.raises(ValueError, match="shapes"):
        align_gradients(a, b[:1])


@pytest.mark.parametrize("scope", ["shared", "all"])
def test_a_step_with_alignment_is_the_written_one(scope):
    teacher = nn.Sequential(copy.deepcopy(TEACHER), nn.Linear(3, 3))
    teacher[1].weight.data = -9 * torch.eye(3)  # a teacher of the opposite opinion
    net = conv_net().eval()
    net.requires_grad_(True)
    rule = DHKD(teacher, gamma=0.7, alpha=0.5, aux="linear", gradient_alignment=True, scope=scope)
    dual = rule.prepare(net, (X, Y))
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    rule.step((X, Y), lambda loss: (2 * loss).backward())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    with dual.features() as seen:
        z = net(X)
    names, weights = zip(*dual.named_parameters(), strict=True)
    losses = 0.7 * F.cross_entropy(z, Y), 0.5 * binary_kl_norm(dual.aux(seen[0]), outputs(teacher, X))
    c, b = (torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True) for loss in losses)
    part = [k for k, n in enumerate(names) if scope == "all" or not n.startswith(("aux", "model.5"))]
    product, square = sum((c[k] * b[k]).sum() for k in part), sum(c[k].square().sum() for k in part)
    assert product < 0
    for k, p in enumerate(weights):
        added = b[k] - product / square * c[k] if k in part else b[k]
        torch.testing.assert_close(p.grad, 2 * (c[k] + added), rtol=1e-4, atol=1e-6)


# Training


@pytest.mark.parametrize("settings", [{}, {"aux": "linear", "gradient_alignment": True}])
def test_rule(settings):
    check_rule(lambda: DHKD(TEACHER, **settings), conv_net(), (X, Y))


def test_objective():
    check_objective(lambda net: AuxiliaryDistillation(TEACHER, aux="linear"), conv_net(), (X, Y))


def test_stored_logits_are_the_teacher():
    nets = []
    for teacher, data in ((TEACHER, (X, Y)), (None, (X, outputs(TEACHER, X), Y))):
        nets.append(conv_net())
        fit(nets[-1], data, rule=DHKD(teacher), epochs=2, batch_size=6, val=(X, Y), progress=False, device="cpu")
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_has_a_precision_of_its_own(dtype):
    net, teacher = conv_net(), copy.deepcopy(TEACHER).to(dtype)
    rule = DHKD(teacher)
    rule.prepare(net, (X, Y))
    rule.step((X, Y), torch.Tensor.backward)
    assert net[5].weight.grad.dtype == torch.float32
    assert next(teacher.parameters()).dtype == dtype


def test_refusals():
    net = conv_net()
    for rule, error, data in (
        (DHKD(conv_net(classes=4)), r"logits \[N, 3\]", (X, Y)),
        (DHKD(net), "share weights", (X, Y)),
        (DHKD(None), "expected a teacher", (X, Y)),
        (DHKD(TEACHER), "class labels", (X, F.one_hot(Y).float())),
        (DHKD(TEACHER), "labels from 0 to 2", (X, Y + 1)),
    ):
        with pytest.raises(ValueError, match=error):
            fit(net, data, rule=rule, progress=False)
    for settings in ({"tau": 0}, {"alpha": -1}, {"gamma": float("nan")}, {"scope": "some"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DHKD(TEACHER, **settings)
    with pytest.raises(ValueError, match="a head of its own"):
        DHKD(TEACHER, aux=net[5]).prepare(net, (X, Y))
    with pytest.raises(TypeError, match="a network, got str"):
        DualHead("net")
    with pytest.raises(ValueError, match="finite"):
        head_conflict(net, (X * float("nan"), Y), TEACHER)
    with pytest.raises(TypeError, match="stored"):
        DHKD(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="two examples of the last batch"):
        fit(net, (X[:5], Y[:5]), rule=DHKD(TEACHER), batch_size=4, progress=False)


def test_conflict_of_opposite_opinions():
    net = conv_net()
    net[5].weight.data *= 0.01  # probabilities of 1/3: then both losses want the same
    net[5].bias.data.zero_()
    before = copy.deepcopy(net.state_dict())
    opinion = 200.0 * (F.one_hot(Y, 3) - 1 / 3)
    for sign in (1, -1):
        found = head_conflict(net.train(), (X, sign * opinion, Y), tau=1e4, batch_size=6)
        assert found.batches == 2
        assert sign * found.head > 0.99
        assert sign * found.backbone > 0.99
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_simplex():
    simplex = torch.eye(4) + 3
    assert etf_deviation(simplex) == pytest.approx({"equinorm": 0, "equiangularity": 0}, abs=1e-9)
    assert etf_deviation(torch.randn(4, 9, generator=torch.Generator().manual_seed(0)))["equiangularity"] > 0.05
    with pytest.raises(ValueError, match="two classes"):
        etf_deviation(torch.zeros(1, 3))
