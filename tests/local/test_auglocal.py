"""AugLocal against its formulas, and the isolation that makes it a local rule."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.engine import Backprop, fit
from torchfolio.local.auglocal import AugLocal, auxiliary_depths, halvings, select_layers
from torchfolio.local.heads import LocalHeads
from torchfolio.measure import saved_bytes
from torchfolio.models import MLP, VGG, ResNetCIFAR


def resnet(depth: int = 20) -> ResNetCIFAR:
    torch.manual_seed(0)
    return ResNetCIFAR(depth, widths=(4, 8, 16))


def batch(n: int = 8, shape: tuple[int, ...] = (3, 16, 16), classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("n_layers", "aux_depth", "tau", "depths", "selected"),
    [
        (10, 3, 0.5, [3, 3, 3, 2, 2, 2], {0: [3, 6, 9], 1: [4, 6, 9], 3: [6, 9], 5: [7, 9]}),
        (16, 2, 0.5, [2] * 13, {0: [8, 15], 6: [10, 15], 12: [14, 15]}),
        (16, 6, 0.0, [6] * 9, {0: [2, 5, 8, 10, 12, 15], 4: [6, 8, 10, 11, 13, 15], 8: [9, 10, 12, 13, 14, 15]}),
        (55, 3, 0.5, [3] * 25 + [2] * 26, {0: [18, 36, 54], 25: [40, 54], 50: [52, 54]}),
    ],
)
def test_plan_reproduces_the_worked_tables(n_layers, aux_depth, tau, depths, selected):
    assert auxiliary_depths(n_layers, aux_depth, tau) == depths
    for layer, indices in selected.items():
        assert select_layers(layer, depths[layer], n_layers) == indices


def test_plan_of_two_modules_and_of_no_depth():
    assert auxiliary_depths(5, 3) == [3]
    assert auxiliary_depths(4, 0) == [0, 0, 0]
    assert auxiliary_depths(4, 3) == []


def test_other_selections():
    assert select_layers(2, 3, 10, "sequential") == [3, 4, 5]
    assert select_layers(8, 3, 10, "sequential") == [9]
    assert select_layers(2, 3, 10, "repetitive") == [9, 9, 9]


@pytest.mark.parametrize(
    ("target", "halved"),
    [((64, 8, 8), 2), ((16, 16, 16), 1), ((24, 16, 16), 1), ((32, 32, 32), 0), ((32, 64, 64), 0), ((9,), 0),
     ((32, 29, 29), math.log2(32 / 29))],
)  # fmt: skip
def test_halvings_follow_the_traced_resolution(target, halved):
    assert halvings((16, 32, 32), target) == halved


@pytest.mark.parametrize(("side", "pooled"), [(7, 4), (7, 3), (5, 3), (3, 1), (3, 2)])
def test_a_pooling_of_an_odd_side_is_one_halving(side, pooled):
    assert halvings((16, side, side), (16, pooled, pooled)) == 1


def test_pools_stand_where_the_network_has_them():
    widths, layers = [16, 16, 32, 32, 64, 64, 64, 64], []
    for k, (a, b) in enumerate(zip([3, *widths[:-1]], widths, strict=True)):
        pool = [nn.MaxPool2d(2)] if k in (2, 4) else []  # after the second and the fourth convolution
        layers.append(nn.Sequential(*pool, nn.Conv2d(a, b, 3, padding=1), nn.ReLU()))
    net = nn.Sequential(*layers, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)))
    rule = AugLocal(aux_depth=6, selection="sequential")
    rule.prepare(net, batch(shape=(3, 16, 16)))
    assert rule.auxiliary_plan()["shapes"][0][-1] == (64, 4, 4)


def test_strides_and_widths_of_the_first_auxiliary_network():
    rule = AugLocal(aux_depth=2)
    torch.manual_seed(0)
    rule.prepare(ResNetCIFAR(32), batch(shape=(3, 32, 32)))
    plan = rule.auxiliary_plan()
    assert plan["selected"][0] == (8, 15)
    assert plan["shapes"][0] == ((32, 16, 16), (64, 8, 8))
    assert len(plan) == 13


def test_jump_over_two_stages_halves_once_and_then_again():
    rule = AugLocal(aux_depth=1, tau=0.0)
    rule.prepare(resnet(), batch())
    assert rule.auxiliary_plan()["shapes"][0] == ((16, 8, 8),)  # one layer: the second halving is dropped


@pytest.mark.parametrize("layer", [0, 4])
def test_gradient_of_a_layer_is_that_of_the_isolated_pair(layer):
    model = resnet()
    rule = AugLocal(aux_depth=3)
    x, y = batch()
    local = rule.prepare(model, (x, y))
    local.eval()  # statistics that do not move keep the two computations comparable
    rule.step((x, y), torch.Tensor.backward)
    with torch.no_grad():
        h = x
        for block in local.blocks[:layer]:
            h = block(h)
    pair = copy.deepcopy(nn.Sequential(local.blocks[layer], local.heads[layer].net))
    pair.zero_grad()
    F.cross_entropy(pair(h), y).backward()
    for got, expected in zip(gradients(local.blocks[layer]), gradients(pair[0]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_gradient_of_a_layer_ignores_every_later_layer():
    def gradient(perturb: bool) -> list[torch.Tensor]:
        rule = AugLocal(aux_depth=2)
        model = resnet()
        local = rule.prepare(model, batch())
        torch.manual_seed(3)
        for head in local.heads:
            for p in head.parameters():
                nn.init.normal_(p, std=0.1)
        if perturb:
            with torch.no_grad():
                for later in (*local.blocks[3:], *local.heads[3:]):
                    for p in later.parameters():
                        p.add_(torch.randn_like(p))
        rule.step(batch(), torch.Tensor.backward)
        return gradients(local.blocks[2])

    for a, b in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(a, b)


def test_full_depth_is_backprop():
    model = resnet()
    x, y = batch()
    rule = AugLocal(aux_depth=9)
    with pytest.warns(UserWarning, match="plain backprop"):
        rule.prepare(model, (x, y))
    rule.step((x, y), torch.Tensor.backward)
    reference = resnet()
    F.cross_entropy(reference(x), y).backward()
    for got, expected in zip(gradients(model), gradients(reference), strict=True):
        torch.testing.assert_close(got, expected)


def test_groups_are_disjoint_and_cover_everything():
    local = AugLocal(aux_depth=2).prepare(resnet(), batch())
    groups = local.groups()
    members = [id(p) for group in groups for p in group]
    assert len(members) == len(set(members))
    assert set(members) == {id(p) for p in local.parameters()}
    assert len(groups) == 8


def test_heads_that_never_see_the_layer_leave_it_untouched():
    class Blind(nn.Module):
        def forward(self, x):
            return x.detach()

    model = resnet()
    rule = AugLocal(aux_depth=2)
    local = rule.prepare(model, batch())
    for head in local.heads:
        head.net = nn.Sequential(Blind(), head.net)
    before = copy.deepcopy(local.state_dict())
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1)
    rule.step(batch(), torch.Tensor.backward)
    optimizer.step()
    weights = dict(local.blocks[:-1].named_parameters())
    assert all(torch.equal(before[f"blocks.{name}"], p) for name, p in weights.items())
    assert not torch.equal(before["blocks.7.0.conv1.weight"], local.blocks[-1][0].conv1.weight)


def test_saves_less_memory_than_backprop():
    x, y = batch(16, (3, 32, 32))
    rule, backprop = AugLocal(aux_depth=2), Backprop()
    rule.prepare(ResNetCIFAR(56), (x, y))
    backprop.prepare(ResNetCIFAR(56), (x, y))
    local = saved_bytes(lambda: rule.step((x, y), torch.Tensor.backward)).peak
    whole = saved_bytes(lambda: backprop.step((x, y), torch.Tensor.backward)).peak
    assert local < 0.25 * whole


def test_pyramid_saves_auxiliary_operations():
    def plan(tau):
        rule = AugLocal(aux_depth=5, tau=tau)
        rule.prepare(ResNetCIFAR(56, widths=(4, 8, 16)), batch())
        return rule.auxiliary_plan()

    flat, pyramid = plan(0.0), plan(0.5)
    assert pyramid["flops"].sum() <= 0.9 * flat["flops"].sum()
    assert pyramid["depth"].is_monotonic_decreasing
    assert pyramid["depth"][0] == 5
    assert pyramid["depth"].min() >= 1


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: VGG("vgg11", num_classes=4), (3, 32, 32)),
        (lambda: MLP(12, 4, hidden=(16, 16, 16, 16)), (12,)),
        (
            lambda: nn.Sequential(
                *[nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(4)], nn.Flatten(), nn.Linear(48, 4)
            ),
            (6, 8),
        ),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
                nn.Conv2d(6, 9, 5, padding=2), nn.BatchNorm2d(9), nn.GELU(),
                nn.Conv2d(9, 7, 3, stride=2), nn.ReLU(inplace=True),
                nn.Flatten(), nn.Linear(28, 4),
            ),
            (1, 15, 15),
        ),
    ],
)  # fmt: skip
def test_other_networks_train(model, shape):
    torch.manual_seed(0)
    net = model()
    x, y = batch(32, shape, 4)
    result = fit(net, (x, y), rule=AugLocal(aux_depth=2), epochs=2, batch_size=16, device="cpu")
    assert result.model is net
    assert len(result.history.to_frame()) > 0


def test_dtype_follows_the_network():
    x, y = batch()
    local = AugLocal(aux_depth=2).prepare(resnet().double(), (x.double(), y))
    assert {p.dtype for p in local.parameters()} == {torch.float64}
    local.local_step(x.double(), y)


def test_prepare_leaves_statistics_and_modes_alone():
    model = resnet().eval()
    before = copy.deepcopy(model.state_dict())
    AugLocal(aux_depth=2).prepare(model, batch())
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_copies_and_pickles():
    rule = AugLocal(aux_depth=2)
    local = rule.prepare(resnet(), batch())
    again = pickle.loads(pickle.dumps(copy.deepcopy(local)))
    again.load_state_dict(local.state_dict())
    x, _ = batch()
    torch.testing.assert_close(again.eval()(x), local.eval()(x))


def test_custom_factory():
    def factory(index, layer, in_shape, out_shape):
        return nn.Sequential(nn.Conv2d(in_shape[0], out_shape[0], 1), nn.ReLU())

    rule = AugLocal(aux_depth=2, aux_factory=factory)
    local = rule.prepare(resnet(), batch())
    assert isinstance(local.heads[0].net[0][0], nn.Conv2d)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux_depth": -1}, "aux_depth"),
        ({"aux_depth": 1.5}, "aux_depth"),
        ({"tau": 1.5}, "tau"),
        ({"selection": "random"}, "selection"),
        ({"widen": 0}, "widen"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        AugLocal(**settings)


def test_too_deep_says_that_it_becomes_backprop():
    with pytest.raises(ValueError, match="plain backprop"):
        AugLocal(aux_depth=12).prepare(resnet(), batch())


def test_shared_parameters_are_refused():
    layer = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    model = nn.Sequential(layer, layer, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="share"):
        AugLocal(aux_depth=1).prepare(model, batch(4, (6,), 3))


def test_step_before_prepare():
    with pytest.raises(RuntimeError, match="prepare"):
        AugLocal().step(batch(), torch.Tensor.backward)


@pytest.mark.parametrize("host", ["linear", "dgl", "predsim"])
@pytest.mark.parametrize("model", [resnet, lambda: MLP(768, 10, hidden=(16, 16, 16))])
def test_earlier_local_rules_train(host, model):
    net = model()
    x, y = batch(16) if isinstance(net, ResNetCIFAR) else batch(16, (768,))
    rule = LocalHeads(host)
    local = rule.prepare(net, (x, y))
    scalars = rule.step((x, y), torch.Tensor.backward)
    assert all(torch.isfinite(torch.as_tensor(v)) for v in scalars.values())
    assert all(p.grad is not None for p in net.parameters())
    assert len(local.heads) == len(local.blocks) - 1


def test_head_that_writes_in_place_is_refused():
    model = resnet()
    rule = AugLocal(aux_depth=1)
    local = rule.prepare(model, batch())
    local.heads[0].net = nn.Sequential(nn.ReLU(inplace=True), local.heads[0].net)
    with pytest.raises(RuntimeError, match="in place"):
        rule.step(batch(), torch.Tensor.backward)
