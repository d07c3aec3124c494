"""Lateral rows find principal subspaces, old answers stay, and the rule goes on any other."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.engine import Backprop, evaluate, fit
from torchfolio.engine.modes import random_state
from torchfolio.engine.recipes import adamw, sgd
from torchfolio.local import AugLocal
from torchfolio.spiking import (
    DSR,
    HLOP,
    LIF,
    OTTT,
    SLTT,
    FeedbackAlignment,
    HebbianSubspace,
    Sigmoid,
    SignSymmetric,
    continual_metrics,
)
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.credit import rows_of
from torchfolio.spiking.dsr import weighted_rate
from torchfolio.spiking.nets import SpikingConvNet

STEP = torch.Tensor.backward


def table(n=24, width=10, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=dtype), torch.arange(n) % 3


def images(n=12, seed=0):
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)), torch.arange(n) % 3


def mlp(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12, bias), nn.ReLU(), nn.Linear(12, 3, bias)).to(dtype)


def conv_net():
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(24, 3))


def blocks():
    torch.manual_seed(0)

    def block(c, d):
        return nn.Sequential(nn.Conv2d(c, d, 3, padding=1), nn.BatchNorm2d(d), nn.ReLU())

    return nn.Sequential(block(1, 8), block(8, 8), block(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def spiking(tau=2.0, **options):
    torch.manual_seed(0)
    neuron = partial(LIF, tau, surrogate=Sigmoid(), **options)
    layers = [nn.Linear(10, 14, bias=False), neuron(), nn.Linear(14, 9, bias=False), neuron()]
    return nn.Sequential(*layers, nn.Linear(9, 3, bias=False))


def spread(rows=50):
    """Axes, eigenvalues 10 * 0.8^i, and draws of such Gaussian data."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0]
    values = 10 * 0.8 ** torch.arange(float(rows))
    return axes, values, lambda n: torch.randn(n, rows, generator=generator) * values.sqrt() @ axes.mT


# The subspace


def test_rows_find_the_principal_subspace_and_grow():
    axes, values, draw = spread()
    lateral, generator = HebbianSubspace(50), torch.Generator().manual_seed(1)
    for rows, share in ((10, 0.98), (5, 0.97)):
        lateral.merge()
        lateral.grow(rows, generator)
        old = lateral.fixed.clone()
        for _ in range(400):
            lateral.update(draw(64))
        basis = torch.linalg.qr(lateral.basis.mT)[0]
        caught = (values.sqrt()[:, None] * (axes.mT @ basis)).square().sum() / values[: len(lateral.basis)].sum()
        assert caught >= share
        assert lateral.orthonormality_error() <= 0.1
        assert torch.equal(lateral.fixed, old)


def test_principal_axes_are_a_fixed_point():
    axes, values, _ = spread()
    lateral = HebbianSubspace(50).double()
    lateral.fixed, lateral.new = axes[:, :4].mT.double(), axes[:, 4:9].mT.double()
    lateral.fixed, lateral.velocity = torch.linalg.qr(lateral.fixed.mT)[0].mT, torch.zeros(5, 50).double()
    before = lateral.new.clone()
    lateral.update(torch.diag(values.sqrt() * 50**0.5).double() @ axes.mT.double())  # their covariance to the digit
    assert (lateral.new - before).abs().max() < 1e-6


@pytest.mark.parametrize("spiking_levels", [None, 40])
def test_updates_are_those_of_the_paper(spiking_levels):
    lateral, x = HebbianSubspace(8, lr=0.05, spiking=spiking_levels, clip=0.5), table(20, 8)[0]
    generator = torch.Generator().manual_seed(0)
    lateral.grow(2, generator)
    lateral.merge()
    lateral.grow(3, generator)
    rows, velocity = lateral.basis, torch.zeros(5, 8)
    for _ in range(5):
        y = x @ rows.mT
        if spiking_levels:
            y = (y.clamp(-20, 20) / 20 * spiking_levels).round() / spiking_levels * 20
        change = (y.mT @ (x - y @ rows) / len(x)).clamp(-0.5, 0.5)
        change[:2] = 0
        velocity = 0.9 * velocity + 0.1 * change
        rows = rows + 0.05 * velocity
    lateral.update(x)
    torch.testing.assert_close(lateral.basis, rows)


def test_subspaces_are_kept_and_refuse():
    lateral = HebbianSubspace(6)
    lateral.grow(2)
    lateral.update(table(9, 6)[0])
    for again in (copy.deepcopy(lateral), pickle.loads(pickle.dumps(lateral)), HebbianSubspace(6)):
        again.load_state_dict(lateral.state_dict())
        assert torch.equal(again.basis, lateral.basis)
    assert not list(lateral.parameters())
    assert torch.equal(lateral.project(torch.ones(2, 6)), torch.ones(2, 6))  # nothing is fixed yet
    lateral.merge(orthonormalize=True)
    assert lateral.orthonormality_error() < 1e-6
    assert lateral.project(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="at most 6 rows"):
        lateral.grow(5)
    with pytest.warns(UserWarning, match="nearly nothing to learn in"):
        lateral.grow(4)
    with pytest.raises(ValueError, match="width 6"):
        lateral.update(torch.ones(3, 5))
    with pytest.raises(ValueError, match="smaller lr"):
        lateral.update(torch.full((3, 6), float("nan")))
    with pytest.raises(ValueError, match="momentum"):
        HebbianSubspace(6, momentum=1.0)


# The projection


@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adamw(0.01, weight_decay=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "convnet"])
def test_old_answers_stay(make, optimizer):
    net, data = make(), (table() if make is mlp else images())
    hlop = HLOP(sizes=0.3, growth=0.1, project_update=True)
    settings = {"rule": hlop, "optimizer": optimizer, "batch_size": 5, "device": "cpu", "progress": False}
    fit(net, data, **settings)
    hlop.end_task(orthonormalize=True)
    before = copy.deepcopy(net.state_dict())
    fit(net, (data[0].flip(-1), data[1]), epochs=3, **settings)
    for name, layer in hlop._layers.items():
        change = (layer.weight - before[f"{name}.weight"]).flatten(1).detach()
        assert change.norm() > 1e-3
        assert (change @ hlop._subspace(name).fixed.mT).abs().max() <= 1e-5 * change.norm()
    odd = [n for n, value in net.state_dict().items() if value.dim() < 2 and not torch.equal(value, before[n])]
    assert not odd, f"biases, norms or statistics moved: {odd}"
    assert all(p.requires_grad for p in net.parameters())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("make", [mlp, conv_net], ids=["linear", "convolution"])
def test_both_forms_give_the_same_gradient(make):
    batch, gradients = table() if make is mlp else images(), []
    for form in ("weight", "input"):
        net, hlop = make(), HLOP(sizes=6, growth=1, form=form)
        hlop.prepare(net, batch)
        hlop.step(batch, STEP)
        hlop.end_task()
        net.zero_grad()
        hlop.step(batch, STEP)
        once = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        hlop.step(batch, STEP)  # gradients add up, projected once
        torch.testing.assert_close([p.grad for p in net.parameters() if p.grad is not None], [2 * g for g in once])
        gradients.append(once)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    x = torch.randn(2, 4, 5, 5)
    layer = nn.Conv2d(4, 3, 3, 2, 1, bias=False)
    torch.testing.assert_close(rows_of(layer, x) @ layer.weight.flatten(1).mT, layer(x).movedim(1, 3).flatten(0, 2))


@pytest.mark.parametrize("padding", [{"padding": "same"}, {"padding": 1, "padding_mode": "reflect"}])
def test_any_padding(padding):
    batch, gradients = images(), []
    for rule in (Backprop(), FeedbackAlignment()):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, **padding), nn.ReLU(), nn.Conv2d(4, 4, 3, **padding), nn.Flatten(),
                            nn.Linear(256, 3))  # fmt: skip
        rule.prepare(net, batch)
        if isinstance(rule, FeedbackAlignment):
            rule.sent = {name: layer.weight.detach() for name, layer in rule.layers.items()}
        rule.step(batch, STEP)
        gradients.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    layer, x = net[2], torch.randn(2, 4, 5, 5)
    got = rows_of(layer, x) @ layer.weight.flatten(1).mT + layer.bias
    torch.testing.assert_close(got, layer(x).movedim(1, 3).flatten(0, 2))


class Tied(nn.Module):
    """Two layers with one weight, and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.mark.parametrize("form", ["weight", "input"])
def test_layers_with_one_weight_share_rows(form):
    net, (x, y) = Tied(), table()
    hlop = HLOP(sizes=3, growth=2, form=form)
    settings = {"rule": hlop, "optimizer": sgd(0.1, momentum=0), "batch_size": 6, "device": "cpu", "progress": False}
    fit(net, (x, y), **settings)
    hlop.end_task(orthonormalize=True)
    assert set(hlop.subspaces) == {"a", "head"}
    before = net.a.weight.detach().clone()
    fit(net, (x.flip(-1), y), **settings)
    change = (net.a.weight - before).detach()
    assert change.norm() > 1e-3
    assert (change @ hlop.subspaces["a"].fixed.mT).abs().max() <= 1e-5 * change.norm()
    assert not any(m._forward_hooks for m in net.modules())


def test_what_is_not_guarded_is_said():
    sequences = (torch.randn(8, 5, 8), torch.arange(8) % 3)
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(40, 3))
    hlop = HLOP(sizes=2, growth=1)
    with pytest.warns(UserWarning, match="0.self_attn.in_proj_weight are no weights of linear"):
        hlop.prepare(attention, sequences)
    with pytest.warns(UserWarning, match="0.self_attn.out_proj was not called"):
        hlop.step(sequences, STEP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hlop.step(sequences, STEP)
        hlop.prepare(attention, sequences)
    with pytest.raises(ValueError, match="lr of its own"):
        HLOP(sizes=2, growth=1, lr={"7": 0.1}).prepare(mlp(), table())
    with pytest.raises(ValueError, match="activity to learn from"):
        HebbianSubspace(5).update(torch.ones(0, 5))


# Hosts


HOSTS = {
    "backprop": (Backprop, conv_net),
    "auglocal": (partial(AugLocal, 1), blocks),
    "sltt": (partial(SLTT, timesteps=3), partial(SpikingConvNet, (1, 8, 8), 3, (6, 8))),
    "ottt": (partial(OTTT, timesteps=3), partial(SpikingConvNet, (1, 8, 8), 3, (6, 8))),
    "dsr": (partial(DSR, timesteps=4), partial(SpikingConvNet, (1, 8, 8), 3, (6, 8))),
    "alignment": (lambda: FeedbackAlignment(BPTT(timesteps=3)), partial(SpikingConvNet, (1, 8, 8), 3, (6, 8))),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTS)
def test_contract_of_rules(name):
    host, make = HOSTS[name]
    torch.manual_seed(0)
    check_rule(lambda: HLOP(host(), sizes=2, growth=1, rows="all", max_rows=50), make(), images())


@pytest.mark.parametrize("name", HOSTS)
def test_two_tasks_on_every_host(name):
    host, make = HOSTS[name]
    torch.manual_seed(0)
    net, hlop, before = (
        make(),
        HLOP(host(), sizes=3, growth=2, form="input" if name == "ottt" else "weight"),
        random_state(),
    )
    for task in range(2):
        fit(
            net,
            images(seed=task),
            rule=hlop,
            optimizer=sgd(0.1, momentum=0),
            batch_size=5,
            device="cpu",
            progress=False,
        )
        hlop.end_task()
    assert hlop.task == 2
    assert {(len(s.fixed), len(s.new)) for s in hlop.subspaces.values()} == {(5, 2)}
    assert evaluate(net, images(), rule=hlop)["loss"] > 0
    assert str(random_state()) == str(before)
    again = HLOP(host(), sizes=3, growth=2)
    again.prepare(net, images())
    again.load_state_dict(hlop.state_dict())
    assert again.task == 2
    for layer, lateral in hlop.subspaces.items():
        assert torch.equal(again.subspaces[layer].basis, lateral.basis)


def test_traces_in_the_gradient_of_the_weights():
    (x, y), gradients = table(6), {}
    rules = {"ottt": OTTT, "no_trace": partial(OTTT, trace_decay=0.0), "sltt": SLTT}
    for name, rule in rules.items():
        net = spiking()
        made = rule(F.cross_entropy, timesteps=4)
        made.prepare(net, (x, y))
        made.step((x, y), STEP)
        gradients[name] = [p.grad for p in net.parameters()]
    torch.testing.assert_close(gradients["no_trace"], gradients["sltt"])
    net, traces = spiking(detach_state=True), [torch.zeros(6, 14), torch.zeros(6, 9)]
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(4):
        first = net[0](x)
        second = net[2](hidden := net[1](first))
        output = net[4](last := net[3](second))
        loss = F.cross_entropy(output, y) / 4
        errors = torch.autograd.grad(loss, (first, second, output))
        traces = [0.5 * trace + spikes.detach() for trace, spikes in zip(traces, (hidden, last), strict=True)]
        expected = [e + g.mT @ a for e, g, a in zip(expected, errors, (x, *traces), strict=True)]
    torch.testing.assert_close(gradients["ottt"], expected)
    assert not any(m._forward_hooks for m in net.modules())


def test_rates_give_the_gradient_of_the_network_of_rates():
    x, y = table(6, dtype=torch.float64)
    net = spiking(tau=5.0, v_threshold=0.5).double()
    rule = DSR(F.cross_entropy, timesteps=8)
    rule.prepare(net, (x, y))
    rule.step((x, y), STEP)
    sequence, rates, currents = x.expand(8, -1, -1), [x], []
    for k in (0, 2):
        current = net[k](sequence)
        currents.append(weighted_rate(current, 0.8))
        sequence = torch.stack([net[k + 1].forward(step) for step in current]).detach()
        net[k + 1].reset()
        rates.append(weighted_rate(sequence, 0.8))
    output = net[4](rates[2]).detach().requires_grad_()
    torch.testing.assert_close(rule.predictor(net)(x), output)
    (error,) = torch.autograd.grad(F.cross_entropy(output, y), output)
    for k in (2, 1, 0):
        torch.testing.assert_close(net[2 * k].weight.grad, error.mT @ rates[k])
        if k:
            inside = (currents[k - 1] > 0) & (currents[k - 1] < 0.5)
            error = (error @ net[2 * k].weight) * inside / 0.5
    with pytest.raises(ValueError, match="soft reset"):
        rule.prepare(spiking(v_reset=0.0), (x, y))


@pytest.mark.parametrize("make", [mlp, conv_net], ids=["mlp", "convnet"])
def test_errors_go_down_by_other_weights(make):
    batch = table() if make is mlp else images()
    nets = [make() for _ in range(3)]
    own, random, signs = Backprop(), FeedbackAlignment(), SignSymmetric()
    for net, rule in zip(nets, (own, random, signs), strict=True):
        rule.prepare(net, batch)
        rule.step(batch, STEP)
    gradients = [[p.grad for p in net.parameters()] for net in nets]
    for other in gradients[1:]:
        torch.testing.assert_close(other[-2:], gradients[0][-2:])  # the last layer hears of the error itself
        assert (other[0] - gradients[0][0]).abs().max() > 1e-3
    random.sent = {name: layer.weight.detach() for name, layer in random.layers.items()}
    nets[1].zero_grad()
    random.step(batch, STEP)
    torch.testing.assert_close([p.grad for p in nets[1].parameters()], gradients[0], rtol=1e-4, atol=1e-6)
    layer = signs.layers["2" if make is mlp else "1.0"]
    scale = 12**-0.5 if make is mlp else (2 / (9 * 6)) ** 0.5
    torch.testing.assert_close(signs.weights("", layer), layer.weight.sign() * scale)


# The rest


def test_scores_of_continual_learning():
    nan = float("nan")
    scores = continual_metrics([[90, nan, nan], [92, 80, nan], [85, 78, 88]])
    assert scores == pytest.approx({"acc": 251 / 3, "bwt": -3.5, "forgetting": 4.5})
    assert continual_metrics([[0.5]]) == {"acc": 0.5, "bwt": 0.0, "forgetting": 0.0}
    with pytest.raises(ValueError, match=r"\[K, K\]"):
        continual_metrics([[1, 2]])
    with pytest.raises(ValueError, match="to be finite"):
        continual_metrics([[nan]])


def test_refusals_and_warnings():
    batch = table()
    with pytest.raises(RuntimeError, match="before step"):
        HLOP(sizes=2, growth=1).step(batch, STEP)
    with pytest.raises(RuntimeError, match="before end_task"):
        HLOP(sizes=2, growth=1).end_task()
    with pytest.raises(ValueError, match="bias of 0 moves old outputs"):
        HLOP(sizes=2, growth=1, freeze_1d=False).prepare(mlp(), batch)
    HLOP(sizes=2, growth=1, freeze_1d=False).prepare(mlp(bias=False), batch)
    with pytest.raises(ValueError, match="of 0, 2; got"):
        HLOP(sizes=2, growth=1, layers=["1"]).prepare(mlp(), batch)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Flatten())
    with pytest.raises(ValueError, match="without groups, of none"):
        HLOP(sizes=2, growth=1).prepare(grouped, batch)
    with pytest.raises(ValueError, match="2 is missing"):
        HLOP(sizes={"0": 2}, growth=1).prepare(mlp(), batch)
    with pytest.raises(ValueError, match="at most 10 rows"):
        HLOP(sizes=11, growth=1).prepare(mlp(), batch)
    with pytest.raises(ValueError, match="growth as a fraction"):
        HLOP(sizes=2, growth=1.5)
    hlop = HLOP(sizes={"0": 2}, growth=0.1, layers=lambda name, layer: name == "0")
    fit(mlp(), batch, rule=hlop, optimizer=sgd(0.1), device="cpu", progress=False)
    hlop.end_task()
    net = mlp()
    with pytest.warns(UserWarning, match="weight decay"):
        fit(net, batch, rule=hlop, optimizer=sgd(0.1, weight_decay=0.1), device="cpu", progress=False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.dim() > 1], 0.1, 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(net, batch, rule=hlop, optimizer=optimizer, device="cpu", progress=False)
    with pytest.warns(UserWarning, match="of another task"):
        fit(net, batch, rule=hlop, optimizer=optimizer, device="cpu", progress=False)
    with pytest.raises(ValueError, match="network of the tasks before"):
        hlop.prepare(nn.Sequential(nn.Linear(9, 3)), batch)
