"""MixtureGrowth: zero growth is the sum of the members, members apart, orthogonal coefficients, halves found."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.efficiency import (
    GrowableModel,
    TemplateBank,
    TemplateLayer,
    grow_by_tiling,
    net2net_widen,
    param_groups,
    recalibrate_bn,
    templatize,
)
from torchfolio.models import MLP, ConvNet, Logits, ResNetCIFAR

INITS = ("orthogonal", "zero", "copy", "random", "none")


class ChannelsLast(nn.Module):
    """Flattens with the channels inside, so that the halves of the classifier's inputs interleave."""

    def __init__(self, groups=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(groups, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.head = nn.Linear(8 * 4, 3)

    def forward(self, x):
        return self.head(self.depthwise(self.norm(self.conv(x)).tanh()).permute(0, 2, 3, 1).flatten(1))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 12), nn.LayerNorm(12)
        self.conv, self.drop, self.head = nn.Conv1d(12, 12, 3, groups=2), nn.Dropout(0.1), nn.Linear(12, 1)

    def forward(self, ids):
        return self.head(self.drop(self.conv(self.norm(self.embed(ids)).transpose(1, 2))).mean(2))


def images(n=6, channels=3, side=8, seed=0):
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


CASES = {
    "resnet": (lambda: ResNetCIFAR(8, (8, 16, 16)), images()),
    "projected": (lambda: ResNetCIFAR(8, (8, 16, 16), shortcut="B"), images()),
    "convnet": (lambda: ConvNet(3, 3, (8, 12)), images()),
    "mlp": (lambda: MLP(10, 1, (16, 8), norm="layer"), torch.randn(6, 10, generator=torch.Generator().manual_seed(0))),
    "channels_last": (ChannelsLast, images(channels=1, side=4)),
    "tokens": (Tokens, torch.randint(11, (6, 7), generator=torch.Generator().manual_seed(0))),
}


def grown_apart(name, templates=4, dtype=torch.float32):
    """A growable model whose members have seen different data and taken a few steps."""
    torch.manual_seed(0)
    make, x = CASES[name]
    x = x.to(dtype) if x.is_floating_point() else x
    model = templatize(make().to(dtype), x, templates)
    for i in range(2):
        member = model.train_member(i)
        optimizer = torch.optim.SGD(param_groups(member, 1e-3), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            member(x.flip(i)).square().mean().backward()
            optimizer.step()
    return model, x


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_growth_is_the_sum_of_the_members_and_export_is_the_grown_network(name, dtype):
    model, x = grown_apart(name, dtype=dtype)
    model.eval()
    with torch.no_grad():
        members = model.member(0)(x) + model.member(1)(x)
        assert torch.equal(model(x), members), "before growth the model is that sum"
        assert torch.allclose(model.export(1).eval()(x), model.member(1)(x), atol=1e-6)
        model.grow("zero")
        assert (model(x) - members).abs().max() <= 1e-4
        assert (model(x) - members).abs().max() <= (1e-12 if dtype == torch.float64 else 1e-5)
        plain = model.export().eval()
        assert (plain(x) - model(x)).abs().max() <= 1e-6
    assert not any(isinstance(m, TemplateLayer) for m in plain.modules())
    # The exported network is the user's: the same names and shapes of weights.
    assert {n: p.shape for n, p in plain.named_parameters()} == {
        n: p.shape for n, p in CASES[name][0]().named_parameters()
    }


@pytest.mark.parametrize("init", INITS)
def test_every_growth_survives_copies_pickles_and_state_dicts_and_trains(init):
    model, x = grown_apart("resnet")
    model.grow(init, seed=3)
    fresh = templatize(CASES["resnet"][0](), x, 4)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert isinstance(other, GrowableModel)
        assert other.grown
        assert torch.equal(other.eval()(x), model.eval()(x))
    assert "4 blocks" in repr(model)
    model.train()
    model(x).sum().backward()
    trained = {id(p) for group in param_groups(model, 1.0) for p in group["params"]}
    assert trained == {id(p) for p in model.net.parameters() if p.requires_grad}
    assert all(p.grad is not None for p in model.net.parameters() if id(p) in trained)


def test_the_average_halves_the_sum_and_recalibration_changes_statistics_alone():
    model, x = grown_apart("resnet")
    model.eval()
    members = model(x)
    model.grow("zero", average=True)
    assert torch.allclose(model(x), members / 2, atol=1e-6)
    weights = [p.clone() for p in model.parameters()]
    recalibrate_bn(model, [x, x])
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    norm = model.net.stem[1]
    assert torch.allclose(norm.running_mean, model.net.stem[0](x).mean((0, 2, 3)), atol=1e-6)
    with pytest.raises(ValueError, match="batch norms"):
        recalibrate_bn(nn.Linear(2, 2), [x])
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_bn(model, [])


def test_one_member_trains_alone_and_gradients_stay_in_their_sets():
    model, x = grown_apart("resnet")
    first = {k: v.clone() for k, v in model.members[0].state_dict().items()}
    member = model.train_member(1)
    groups = param_groups(model, 0.5)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in member.parameters()}
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(2):
        member(x).sum().backward()
        optimizer.step()
    assert all(torch.equal(first[k], v) for k, v in model.members[0].state_dict().items())
    layer = TemplateLayer(nn.Linear(6, 8), halves(6, 8), 4)
    w0, w1, w2, w3 = layer.mixtures()
    for blocks, own, other in (
        ((w0, w2), layer.templates0, layer.templates1),
        ((w1, w3), layer.templates1, layer.templates0),
    ):
        total = sum(block.sum() for block in blocks)
        here, there = torch.autograd.grad(total, (own, other), allow_unused=True, retain_graph=True)
        assert here.abs().sum() > 0
        assert there is None or not there.any()
    full = layer.weight_for()
    assert torch.equal(full, torch.cat([torch.cat([w0, w2], 1), torch.cat([w3, w1], 1)]))
    assert torch.allclose(w2, torch.einsum("t,toi->oi", layer.alpha2, layer.templates0), atol=1e-6)


def halves(inputs, outputs):
    net = nn.Sequential(nn.Linear(3, inputs), nn.Linear(inputs, outputs), nn.Linear(outputs, 1))
    from torchfolio.efficiency.halves import find_halves

    return find_halves(net, (torch.zeros(1, 3),))["1"]


def test_coefficients_are_not_decayed_and_all_else_is():
    model, _ = grown_apart("convnet")
    model.grow("orthogonal")
    decayed, free = param_groups(model, 1e-3)
    assert decayed["weight_decay"] == 1e-3
    assert free["weight_decay"] == 0
    names = {id(p): n for n, p in model.named_parameters()}
    assert all("alpha" in names[id(p)] for p in free["params"])
    assert not any("alpha" in names[id(p)] for p in decayed["params"])
    assert sum(len(g["params"]) for g in (decayed, free)) == sum(p.requires_grad for p in model.parameters())
    before = [p.detach().clone() for p in free["params"]]
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    torch.optim.SGD([decayed, free], lr=0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, free["params"], strict=True)), "exactly no decay"


@pytest.mark.parametrize("templates", [2, 4, 5])
def test_orthogonal_growth(templates):
    model, _ = grown_apart("resnet", templates)
    model.grow("orthogonal")
    for layer in (m for m in model.net.modules() if isinstance(m, TemplateLayer) and m.blocks == 4):
        assert abs(layer.alpha2 @ layer.alpha0) <= 1e-6
        assert abs(layer.alpha3 @ layer.alpha1) <= 1e-6
        assert abs(layer.alpha2.norm() - 1) <= 1e-6
        assert abs(layer.alpha3.norm() - 1) <= 1e-6
        if templates >= 4:
            assert abs(layer.alpha3 @ layer.alpha2) <= 1e-6
            assert abs(layer.alpha2 @ layer.alpha1) <= 1e-6


def test_one_template_with_coefficient_one_is_plain_tiling_and_net2net_keeps_the_function():
    torch.manual_seed(0)
    wide, x = MLP(10, 3, (16, 8), norm="batch"), CASES["mlp"][1]
    a, b = MLP(10, 3, (8, 4), norm="batch").eval(), MLP(10, 3, (8, 4), norm="batch").eval()
    tiled = grow_by_tiling(wide, x, a, b).eval()
    assert torch.allclose(tiled(x), a(x) + b(x), atol=1e-6)
    assert torch.equal(tiled.layer2[0].weight, torch.block_diag(a.layer2[0].weight, b.layer2[0].weight))
    fresh = grow_by_tiling(wide, x, a, b, "random", seed=1)
    assert torch.equal(fresh.layer2[0].weight[:4, :8], a.layer2[0].weight)
    assert float(fresh.layer2[0].weight[:4, 8:].detach().std()) == pytest.approx((2 / 16) ** 0.5, rel=0.5), (
        "Kaiming of full width"
    )
    assert torch.allclose(net2net_widen(wide, x, a).eval()(x), a(x), atol=1e-6)
    noisy = net2net_widen(wide, x, a, 0.1)
    assert not torch.equal(noisy.layer2[0].weight[:4], noisy.layer2[0].weight[4:]), "twins are set apart"
    with pytest.raises(ValueError, match=r"half of the wide one, got \(16, 10\)"):
        grow_by_tiling(wide, x, wide, b)


def test_a_bank_shares_templates_between_layers_of_one_shape():
    torch.manual_seed(0)
    model = templatize(ResNetCIFAR(20, (8, 16, 16)), images(), TemplateBank(3))
    layers = [m for m in model.net.modules() if isinstance(m, TemplateLayer)]
    inner = [m for m in layers if m.blocks == 4]
    shapes = {m.templates0.shape for m in inner}
    assert len({id(m.templates0) for m in inner}) == len(shapes) < len(inner)
    edges = [m for m in layers if m.blocks == 2]
    assert all(len(m.templates0) == 1 and float(m.alpha0) == 1 for m in edges)
    free = {id(p) for g in param_groups(model.train_member(0), 0.1) for p in g["params"]}
    assert not any(id(m.alpha0) in free for m in edges), "coefficients of the edges are fixed"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.grow("orthogonal")
    assert sum("never run in training mode" in str(w.message) for w in caught) == 2
    assert not any(id(p) == id(m.alpha0) for m in edges for g in param_groups(model, 0.1) for p in g["params"])


def test_skipped_modules_are_shared_and_frozen_and_halves_can_be_told():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Unflatten(1, (8, 36)), nn.Flatten(), nn.Linear(288, 2)
    )
    x = images()
    net(x)
    tell = {nn.Unflatten: lambda module, member: nn.Unflatten(1, (4, 36))}
    model = templatize(net, x, skip=["0"], halve=tell)
    before = net[0].running_mean.clone()
    model.train()(x)
    assert model.members[0][0] is model.members[1][0] is model.net[0]
    assert torch.equal(model.net[0].module.running_mean, before)
    model.grow("zero")
    assert type(model.export()[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match="half the width cannot run"):
        templatize(net, x, skip=["0"])
    with pytest.raises(ValueError, match="'0' works on the raw input"):
        templatize(net, x, halve=tell)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(4, 2)

    def forward(self, x):
        value, gate = self.a(x).chunk(2, 1)
        return self.b(value * gate)


class Counting(nn.Sequential):
    def forward(self, x):
        hidden = self[0](x)
        return self[1](hidden / hidden.shape[1])


@pytest.mark.parametrize(
    ("net", "x", "error", "match"),
    [
        (Counting(nn.Linear(4, 8), nn.Linear(8, 2)), torch.ones(2, 4), ValueError, "not their sum"),
        (MLP(4, 2, (7,)), torch.zeros(2, 4), ValueError, "'layer1.1' has 7 outputs"),
        (Gated(), torch.zeros(2, 4), ValueError, "'b' reads channels that mix both halves"),
        (nn.Sequential(nn.LSTM(4, 4)), torch.zeros(2, 3, 4), TypeError, "LSTM '0' has parameters"),
        (nn.Linear(4, 2), torch.zeros(2, 4), ValueError, "no half"),
        (nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), torch.zeros(2, 4), ValueError, "gives the output"),
        (ChannelsLast(groups=1), images(channels=1, side=4), ValueError, "'norm' normalizes all channels"),
        (nn.ReLU(), torch.zeros(2, 4), ValueError, "layers that have weights"),
        (MLP(4, 2), torch.zeros(0, 4), ValueError, "at least one example"),
    ],
)
def test_networks_without_halves_are_refused_by_the_layers_name(net, x, error, match):
    with pytest.raises(error, match=match):
        templatize(net, x)


def test_what_is_out_of_order_is_refused():
    model, x = grown_apart("mlp", 1)
    with pytest.raises(RuntimeError, match="not grown yet"):
        model.export()
    with pytest.raises(ValueError, match="at least 2 templates"):
        model.grow("orthogonal")
    with pytest.raises(ValueError, match="init"):
        model.grow("ortogonal")
    with pytest.raises(ValueError, match="member"):
        model.member(2)
    model.grow("copy")
    with pytest.raises(RuntimeError, match="grown already"):
        model.grow("zero")
    with pytest.raises(RuntimeError, match="no longer trained"):
        model.train_member(0)
    with pytest.raises(ValueError, match="weight_decay"):
        param_groups(model, float("nan"))
    with pytest.raises(ValueError, match="templates"):
        templatize(MLP(10, 1), x, 0)
    assert model.flops(x, member=0) < model.flops(x)


def test_the_user_keeps_the_network_and_the_model_compiles():
    net = ConvNet(3, 3, (8, 8))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = templatize(net.train(), images())
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net._forward_hooks
    assert all(not m._forward_hooks for m in net.modules())
    half = model.member(0).eval()
    compiled = torch.compile(half, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(images()), half(images()))
    low = copy.deepcopy(half).bfloat16()
    assert low(images().bfloat16()).dtype == torch.bfloat16
    assert F.mse_loss(low(images().bfloat16()).float(), half(images())) < 0.1


def test_networks_that_work_in_place_are_halved_and_a_transformers_resnet_is_grown():
    x = torch.rand(3, 1, 8, 8)
    plain = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 2),
    )
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    for net in (plain, Logits(transformers.ResNetForImageClassification(config))):
        wide = templatize(net, x).eval()
        apart = wide(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the members are not trained
            wide.grow("zero")
        assert torch.allclose(wide(x), apart, atol=1e-5)


def test_recalibration_that_fails_leaves_the_network_as_it_was():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        recalibrate_bn(net, [torch.randn(5, 3), torch.randn(5, 2)])
    assert not any(m.training for m in net.modules())
    assert net[1].momentum == 0.1  # pyright: ignore[reportAttributeAccessIssue]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    recalibrate_bn(net, torch.randn(9, 3))  # one tensor is one batch
    assert int(net[1].num_batches_tracked) == 1  # pyright: ignore


def test_an_example_or_names_that_cannot_be_meant_are_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="example to be finite"):
        templatize(net, torch.full((2, 3), float("nan")))
    with pytest.raises(TypeError, match="names of modules"):
        templatize(net, torch.rand(2, 3), skip="2")
