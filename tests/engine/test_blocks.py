"""Networks cut into layers and blocks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio import models
from torchfolio.engine import blocks, layers

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def compose(parts, x):
    for part in parts:
        x = part(x)
    return x


def check(model, x, parts):
    """The parts give what the model gives and train its weights, each in one of them."""
    modules = [part if isinstance(part, nn.Module) else part[1] for part in parts]
    model.eval()
    for module in modules:
        module.eval()
    with torch.no_grad():
        torch.testing.assert_close(compose(modules, x), model(x))
    owned = [id(p) for module in modules for p in module.parameters()]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride), nn.BatchNorm2d(out)) if stride > 1 else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """The forward pass that image libraries give their residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Skipping(nn.Module):
    """A network whose middle may not be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.d(torch.tanh(self.c(h + self.b(h))))


class Late(Skipping):
    def forward(self, x):
        h = self.a(x)
        return self.d(self.c(self.b(h)) + h)


class Choosing(nn.Module):
    """A forward pass that depends on the data, with children in order."""

    def __init__(self, twist: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)
        self.twist = twist

    def forward(self, x):
        h = self.a(x)
        if float(h.sum()) > 1e9 or self.twist:
            h = h + 1
        return self.b(h)


def test_plain_sequential():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(6, 5),
    )  # fmt: skip
    parts = layers(model, IMAGES)
    assert [name for name, _ in parts] == ["0", "3", "9"]
    assert [[type(m).__name__ for m in part.children()] for _, part in parts] == [
        ["Conv2d", "BatchNorm2d", "ReLU"],
        ["Conv2d", "ReLU", "MaxPool2d"],
        ["AdaptiveAvgPool2d", "Flatten", "Dropout", "Linear"],
    ]
    check(model, IMAGES, parts)


def test_nested_and_leading_modules():
    features = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.GELU()))
    model = nn.Sequential(features, nn.Sequential(nn.Dropout(), nn.Linear(8, 5)))
    parts = layers(model)
    assert [name for name, _ in parts] == ["0.1", "0.3", "1"]
    check(model, IMAGES, parts)


def test_a_module_used_twice_in_a_sequential_stays():
    shared = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 2))
    parts = layers(model)
    assert len(parts) == 3
    check(model, torch.randn(3, 4), parts)
    assert [len(part) for part in blocks(model, 3) if isinstance(part, nn.Sequential)] == [2, 2]


@pytest.mark.parametrize(
    ("name", "arguments", "count"),
    [("resnet20", {}, 11), ("vgg11", {}, 9), ("convnet", {}, 4), ("vit", {"image_size": 16}, None)],
)
def test_reference_networks(name, arguments, count):
    model = models.build(name, **arguments)
    parts = layers(model, IMAGES)
    assert [n for n, _ in parts] == [n for n, _ in model.named_children()]
    if count is not None:
        assert len(parts) == count
    check(model, IMAGES, parts)


def test_a_residual_network_of_an_image_library():
    model = ResNet()
    parts = layers(model, IMAGES)
    assert [name for name, _ in parts] == ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "fc"]
    check(model, IMAGES, parts)
    check(model, IMAGES, blocks(model, 4, example=IMAGES))
    named = blocks(model, names=["layer1", "layer2", "avgpool"], example=IMAGES)
    assert named[1] is model.layer1
    assert named[2] is model.layer2
    check(model, IMAGES, named)
    inside = blocks(model, names=["layer1.1", "layer2.0"])
    check(model, IMAGES, inside)
    for part in (*named, *inside):
        pickle.loads(pickle.dumps(part))


def test_training_the_blocks_trains_the_model():
    model = ResNet()
    before = copy.deepcopy(model)
    parts = blocks(model, 3, example=IMAGES)
    compose(parts, IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    torch.optim.SGD(nn.ModuleList(parts).parameters(), lr=0.1).step()
    assert not torch.equal(model.fc.weight, before.fc.weight)


def test_groups_are_nearly_equal():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(7)))
    sizes = [len(part) if isinstance(part, nn.Sequential) else 1 for part in blocks(model, 3)]
    assert sizes == [3, 2, 2]
    assert len(blocks(model, 7)) == 7
    assert len(blocks(model, 1)) == 1


def test_splitting_leaves_modes_statistics_and_generators_alone():
    model = ResNet().train()
    model.bn1.eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    layers(model, IMAGES)
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_what_cannot_be_cut_says_so_and_how_to_name_it():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"relu is used again after b.*blocks\(model, names=\['a', 'b', 'c'\]\)"):
        layers(Skipping(), x)
    model = Skipping()
    parts = blocks(model, names=["b", "d"], example=x)
    assert len(parts) == 3
    check(model, x, parts)
    check(model, x, blocks(model, names=["b", "c"], example=x))
    with pytest.raises(ValueError, match="a is used again after the start of c"):
        blocks(Late(), names=["c"], example=x)


def test_forward_passes_that_cannot_be_traced_are_judged_by_an_example():
    x = torch.randn(3, 4)
    model = Choosing()
    with pytest.raises(ValueError, match="cannot be traced"):
        layers(model)
    check(model, x, layers(model, x))
    with pytest.raises(ValueError, match="do not give what it gives"):
        layers(Choosing(twist=True), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either n"),
        ({"n": 2, "names": ["0"]}, "either n"),
        ({"n": 0}, "between 1 and 2"),
        ({"n": 3}, "between 1 and 2"),
        ({"names": ["9"]}, "no module '9'"),
        ({"names": ["1", "0"]}, "running order"),
        ({"names": ["1", "1"]}, "running order"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), **arguments)


def test_other_ways_not_to_run_in_order():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    class Repeating(Two):
        def forward(self, x):
            return self.b(self.a(self.a(x)))

    class Pair(Two):
        def forward(self, x):
            return self.a(x), 1

    for model, message in (
        (Two(), "takes 2 inputs"),
        (Repeating(), "a runs more than once"),
        (Pair(), "one tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            layers(model)


class Functional(nn.Module):
    """Dropout as a function, a branch by mode, and an argument that is seldom given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None, *, scale=2.0):
        x = F.dropout(torch.relu(self.a(x)), 0.5, self.training) * scale
        if mask is not None:
            x = x * mask
        x = torch.tanh(self.b(x))
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        return self.c(x)


class Open(Functional):
    """A network that takes whatever else it is given, as those of `transformers` do."""

    def forward(self, x, *others, scale=2.0, **more):
        return super().forward(x, *others, scale=scale, **more)


@pytest.mark.parametrize("kind", [Functional, Open])
@pytest.mark.parametrize("example", [None, torch.randn(5, 6)])
@pytest.mark.parametrize("arguments", [{"n": 3}, {"n": 2}, {"names": ["b", "c"]}, {"names": ["c"]}])
@pytest.mark.parametrize("start", [True, False])
def test_both_modes_stay_what_they_are(arguments, start, example, kind):
    net = kind().train(start)
    parts = nn.ModuleList(blocks(net, example=example, **arguments))
    assert net.training is start
    assert all(part.training is start for part in parts)
    x = torch.randn(5, 6)
    for training in (True, False, True):
        net.train(training)
        parts.train(training)
        torch.manual_seed(1)
        expected = net(x)
        torch.manual_seed(1)
        torch.testing.assert_close(compose(parts, x), expected)
    assert sorted(map(id, parts.parameters())) == sorted(map(id, net.parameters()))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(parts))).eval()
    torch.testing.assert_close(compose(copied, x), net.eval()(x))


def test_modules_keep_modes_of_their_own():
    net = ResNet().train()
    net.layer1.eval()
    modes = {m: m.training for m in net.modules()}
    blocks(net, 3)
    assert {m: m.training for m in net.modules()} == modes


def test_local_rules_train_with_dropout_as_a_function():
    from torchfolio.engine import fit
    from torchfolio.local import AugLocal

    net = Functional()
    data = torch.randn(40, 6), torch.randint(3, (40,))
    rule = AugLocal(0, blocks=["b", "c"])
    fit(net, data, rule=rule, epochs=2, batch_size=20, progress=False)
    torch.testing.assert_close(rule.model.eval()(data[0]), net.eval()(data[0]))
    torch.manual_seed(0)
    trained = rule.model.train()(data[0])
    assert not torch.allclose(trained, rule.model(data[0])), "dropout is active in training"


def test_dropout_that_the_children_do_not_call_is_told():
    class ByValue(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = self.a(x)
            if h.sum() > 1e9:  # cannot be traced
                h = -h
            return self.b(F.dropout(h, 0.5, self.training))

    with pytest.raises(ValueError, match="dropout"):
        blocks(ByValue(), 2, example=torch.randn(5, 6))
