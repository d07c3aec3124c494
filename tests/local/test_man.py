"""MAN: the moving average in closed form, what it couples and what it leaves isolated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from torchfolio.engine import Backprop, fit
from torchfolio.local.heads import LocalHeads, interpolate_weights, stages
from torchfolio.local.local_model import MeanPool2d, partition
from torchfolio.local.man import MAN, MomentumAuxiliary
from torchfolio.measure import saved_bytes
from torchfolio.models import MLP, ResNetCIFAR

from .test_auglocal import batch, gradients, resnet


def test_average_has_its_closed_form():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5).double()
    auxiliary = MomentumAuxiliary(layer, 0.9, init="random")
    assert auxiliary.ema is not None
    start = [p.clone() for p in auxiliary.ema.parameters()]
    for _ in range(25):
        auxiliary.update(layer)
    decay = 0.9**25
    for gamma, first, theta in zip(auxiliary.ema.parameters(), start, layer.parameters(), strict=True):
        torch.testing.assert_close(gamma, decay * first + (1 - decay) * theta, rtol=0, atol=1e-6)


def test_momentum_zero_follows_at_once_and_one_never():
    layer = nn.Conv2d(3, 3, 3)
    at_once, never = MomentumAuxiliary(layer, 0.0, init="random"), MomentumAuxiliary(layer, 1.0, init="random")
    before = copy.deepcopy(never.ema.state_dict())
    at_once.update(layer)
    never.update(layer)
    assert torch.equal(at_once.ema.weight, layer.weight)
    assert torch.equal(never.ema.weight, before["weight"])


def test_average_gets_no_gradient_and_no_weight_decay():
    rule = MAN(momentum=1.0)
    local = rule.prepare(resnet(), batch())
    averages = [p for head in local.heads for p in head.auxiliary.ema.parameters()]
    before = [p.clone() for p in averages]
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, weight_decay=0.1)
    rule.step(batch(), torch.Tensor.backward)
    optimizer.step()
    assert all(p.grad is None for p in averages)
    assert all(torch.equal(a, b) for a, b in zip(averages, before, strict=True))
    assert all(p.grad is not None for head in local.heads for p in head.auxiliary.branch.parameters())


def test_average_is_saved_with_the_state():
    local = MAN().prepare(resnet(), batch())
    assert any(".ema." in key for key in local.state_dict())


def _first_gradient(perturb_at: str | None, steps: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(0)
    rule = MAN(momentum=0.5)
    model = resnet()
    torch.manual_seed(1)
    local = rule.prepare(model, batch())
    following = local.blocks[1]
    for step in range(steps):
        if perturb_at == "start" and step == 0:
            torch.manual_seed(2)
            with torch.no_grad():
                for p in following.parameters():
                    p.add_(0.1 * torch.randn_like(p))
        local.zero_grad()
        rule.step(batch(), torch.Tensor.backward)
    return gradients(local.blocks[0])


def test_gradient_is_isolated_until_the_average_moves():
    for a, b in zip(_first_gradient(None), _first_gradient("start"), strict=True):
        assert torch.equal(a, b)
    pairs = zip(_first_gradient(None, 2), _first_gradient("start", 2), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_change_of_the_next_layer_reaches_the_average_scaled():
    layer = nn.Linear(4, 4).double()
    auxiliary = MomentumAuxiliary(layer, 0.75)
    other = copy.deepcopy(auxiliary)
    moved = copy.deepcopy(layer)
    delta = torch.randn(4, 4, dtype=torch.float64)
    with torch.no_grad():
        moved.weight += delta
    auxiliary.update(layer)
    other.update(moved)
    torch.testing.assert_close(other.ema.weight - auxiliary.ema.weight, 0.25 * delta)


def test_without_average_and_bias_it_is_the_host():
    def run(rule):
        model = resnet()
        torch.manual_seed(5)
        rule.prepare(model, batch())
        rule.step(batch(), torch.Tensor.backward)
        return gradients(model)

    for a, b in zip(run(MAN(ema=False, bias=None)), run(LocalHeads("dgl")), strict=True):
        assert torch.equal(a, b)


def test_gradients_flow_through_the_average():
    rule = MAN(bias=None)
    model = resnet()
    rule.prepare(model, batch())
    rule.step(batch(), torch.Tensor.backward)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.stem.parameters())


def test_average_keeps_its_own_running_statistics():
    rule = MAN(momentum=1.0)
    local = rule.prepare(resnet().train(), batch())
    ema = local.heads[0].auxiliary.ema
    before = ema.bn1.running_mean.clone()
    rule.step(batch(), torch.Tensor.backward)
    assert not torch.equal(before, ema.bn1.running_mean)


def test_feature_shapes_at_a_stage_boundary():
    x, _ = batch()
    local = MAN().prepare(resnet(), batch())
    h = x
    for k, block in enumerate(local.blocks[:4]):
        h = block(h)
        assert local.heads[k].auxiliary(h).shape == ((8, 8, 8, 8) if k == 3 else (8, 4, 16, 16))


@pytest.mark.parametrize(
    ("n_layers", "blocks", "ends"),
    [(16, 8, [1, 3, 5, 7, 9, 11, 13, 15]), (16, 4, [3, 7, 11, 15]), (16, 3, [5, 10, 15]), (16, 2, [7, 15])],
)
def test_partition_reproduces_the_published_cuts(n_layers, blocks, ends):
    assert [group[-1] for group in partition(range(n_layers), blocks)] == ends


def test_memory_does_not_grow_with_depth():
    def peak(rule, depth):
        x, y = batch(8)
        rule.prepare(ResNetCIFAR(depth), (x, y))
        return saved_bytes(lambda: rule.step((x, y), torch.Tensor.backward)).peak

    assert peak(MAN(), 56) <= 1.05 * peak(MAN(), 20)
    assert peak(MAN(), 56) <= 0.25 * peak(Backprop(), 56)


@pytest.mark.parametrize("host", ["linear", "dgl", "predsim", "infopro"])
@pytest.mark.parametrize("bias", ["branch", "vector", None])
def test_hosts_and_biases_train(host, bias):
    options = {"mean": [0.5] * 3, "std": [0.2] * 3} if host == "infopro" else {}
    rule = MAN(4, host=host, bias=bias, **options)
    model = resnet()
    rule.prepare(model, batch())
    scalars = rule.step(batch(), torch.Tensor.backward)
    assert all(torch.isfinite(torch.as_tensor(v)) for v in scalars.values())
    assert all(p.grad is not None for p in model.parameters())


def test_trains_another_network():
    torch.manual_seed(0)
    net = MLP(12, 4, hidden=(16, 16, 16, 16))
    x, y = batch(32, (12,), 4)
    fit(net, (x, y), rule=MAN(momentum=0.9), epochs=2, batch_size=16, device="cpu")
    assert net(x).shape == (32, 4)


def test_source_picks_another_layer_of_the_same_shape():
    rule = MAN(3, source=lambda j, following: following - 1)
    model = resnet()
    with pytest.raises(ValueError, match="should follow"):
        rule.prepare(model, batch())
    rule = MAN(source=lambda j, following: following + 1 if following in (1, 2) else following)
    rule.prepare(model, batch())
    assert rule._pairs[0][1] is model.block2


def test_stage_ratio_goes_negative_and_is_refused():
    shapes = [(4, 16, 16)] * 4 + [(8, 8, 8)] * 3 + [(16, 4, 4)] * 3
    assert stages(shapes) == [1] * 4 + [2] * 3 + [3] * 3
    options = {"mean": [0.5] * 3, "std": [0.2] * 3, "last_weights": (0.0, 0.0), "ratio": "stage"}
    with pytest.raises(ValueError, match="allow_negative"):
        MAN(4, host="infopro", **options).prepare(resnet(), batch())
    MAN(4, host="infopro", allow_negative=True, **options).prepare(resnet(), batch())


def test_weights_are_linear():
    assert interpolate_weights((5, 0.5), (1, 0.5), [0, 0.5, 1]) == [(5, 0.5), (3, 0.5), (1, 0.5)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 1}, "2 blocks"),
        ({"momentum": 1.5}, "momentum"),
        ({"bias": "both"}, "bias"),
        ({"host": "other"}, "host"),
        ({"host": "infopro", "ratio": "depth"}, "ratio"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MAN(**settings)


def test_bad_networks():
    with pytest.raises(ValueError, match="blocks"):
        MAN(20).prepare(resnet(), batch())
    with pytest.raises(ValueError, match="mean and std"):
        MAN(host="infopro").prepare(resnet(), batch())


@pytest.mark.parametrize(("size", "output"), [((8, 8), (2, 4)), ((7, 5), (2, 2))])
def test_mean_pool_is_adaptive_pooling(size, output):
    x = torch.randn(3, 2, *size, dtype=torch.float64, requires_grad=True)
    ours, wanted = MeanPool2d(output)(x), nn.AdaptiveAvgPool2d(output)(x)
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(*(torch.autograd.grad(z, x, weight)[0] for z in (ours, wanted)))


def test_mean_pool_saves_nothing():
    x = torch.randn(3, 2, 8, 8, requires_grad=True)
    assert saved_bytes(lambda: MeanPool2d((2, 2))(x)).peak == 0


def test_averages_of_16_bit_weights_move_by_less_than_a_bit_of_them():
    torch.manual_seed(0)
    layer = nn.Linear(5, 5, dtype=torch.bfloat16)
    auxiliary = MomentumAuxiliary(layer, 0.995)
    start = layer.weight.detach().double().clone()
    with torch.no_grad():
        layer.weight.mul_(1.1)
    for _ in range(300):
        auxiliary.update(layer)
    assert auxiliary.ema is not None
    goal = layer.weight.detach().double()
    torch.testing.assert_close(
        auxiliary.ema.weight.double(),
        goal + 0.995**300 * (start - goal),
        atol=2e-3,
        rtol=1e-2,  # a bit of bfloat16
    )
    resumed = MomentumAuxiliary(layer, 0.995)
    resumed.load_state_dict(auxiliary.state_dict())
    for each in (auxiliary, resumed):
        each.update(layer)
    assert torch.equal(auxiliary.average()[0], resumed.average()[0])


def test_the_rule_trains_in_16_bits():
    net = MLP(6, 3, hidden=(16, 16, 16)).bfloat16()
    data = (torch.randn(64, 6).bfloat16(), torch.randint(3, (64,)))
    rule = MAN(momentum=0.9)
    fit(net, data, rule=rule, epochs=3, batch_size=16, device="cpu", precision="bf16-true")
    for auxiliary, layer in rule._pairs:
        assert auxiliary.average()[0].dtype == torch.float32
        assert not torch.equal(auxiliary.average()[0], next(layer.parameters()).float())
