"""Quadratic layers: the neuron's equation, conversion that changes nothing, what ReLinear moves, what is reachable."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from torchfolio.layers import (
    QuadraticConv1d,
    QuadraticConv2d,
    QuadraticLinear,
    ReLinearShrink,
    functional_dimension,
    quadratic_strength,
    relinear_param_groups,
    to_quadratic,
)
from torchfolio.measure import saved_bytes

LAYERS = [
    (lambda **k: QuadraticLinear(3, 4, **k), (2, 5, 3), F.linear),
    (lambda **k: QuadraticConv1d(3, 4, 3, stride=2, padding=1, **k), (2, 3, 7), lambda x, w: F.conv1d(x, w, None, 2, 1)),
    (lambda **k: QuadraticConv2d(2, 3, 3, padding=1, dilation=2, **k), (2, 2, 6, 6),
     lambda x, w: F.conv2d(x, w, None, 1, 1, 2)),
]  # fmt: skip
CASES = pytest.mark.parametrize(("make", "shape", "operation"), LAYERS, ids=["linear", "conv1d", "conv2d"])


def randomized(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    return layer


def conv_net(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, **kwargs), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding="valid"), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


@CASES
@pytest.mark.parametrize("compact", [False, True])
def test_the_equation_and_its_gradients(make, shape, operation, compact):
    layer = randomized(make(compact=compact, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    bias = (lambda b: b) if isinstance(layer, nn.Linear) else (lambda b: b.view(-1, *[1] * (len(shape) - 2)))
    r = operation(x, layer.weight) + bias(layer.bias)
    product = r if compact else r * (operation(x, layer.weight_g) + bias(layer.bias_g))
    expected = product + operation(x**2, layer.weight_b) + bias(layer.bias_b)
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs)
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), expected)]
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(*grads, strict=True))


@CASES
def test_a_layer_is_a_good_module(make, shape, operation):
    layer, x = randomized(make()), torch.randn(shape)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    fresh = make()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert make(device="meta")(x.to("meta")).device.type == "meta"
    assert "compact=False" in repr(layer)


def test_conversion_changes_no_output():
    for model, x in (
        (conv_net(), torch.randn(5, 1, 9, 9)),
        (conv_net(padding_mode="reflect"), torch.randn(5, 1, 9, 9)),
        (nn.Sequential(nn.Conv1d(2, 3, 3, padding="same", bias=False), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 1)),
         torch.randn(4, 2, 6)),
    ):  # fmt: skip
        before = model.eval()(x)
        assert (to_quadratic(model)(x) - before).abs().max() <= 1e-5
        assert (model.train().eval()(x).detach() - before).abs().max() <= 1e-5
        assert sum(isinstance(m, QuadraticLinear | QuadraticConv1d | QuadraticConv2d) for m in model.modules()) >= 2


def test_conversion_keeps_ties_and_frozen_weights_and_says_what_it_leaves():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    model[3].requires_grad_(False)
    to_quadratic(model)
    assert model[2].weight is model[0].weight
    assert not model[3].weight.requires_grad
    mixed = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    with pytest.warns(UserWarning, match=r"0 \(expected one group, got 2\)"):
        to_quadratic(mixed)
    with pytest.raises(ValueError, match="output projection of an attention"):
        to_quadratic(nn.MultiheadAttention(4, 2), where=lambda name, m: isinstance(m, nn.Linear))
    with pytest.raises(ValueError, match="one group"):
        QuadraticConv2d(4, 4, 3, groups=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_at_factor_zero_training_is_that_of_the_ordinary_network(dtype, tolerance):
    ordinary = conv_net().to(dtype)
    quadratic = to_quadratic(copy.deepcopy(ordinary))
    groups = relinear_param_groups(quadratic, 0.05, gamma=0.0, weight_decay=1e-3)
    optimizers = [
        torch.optim.SGD(ordinary.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3),
        torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    ]
    x, y = torch.randn(8, 1, 9, 9, dtype=dtype), torch.arange(8) % 3
    for _ in range(10):
        for net, optimizer in zip((ordinary, quadratic), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    for name, p in ordinary.named_parameters():
        assert (quadratic.get_parameter(name) - p).abs().max() <= tolerance
    assert set(quadratic_strength(quadratic, x).values()) == {0.0}


def test_cubes_and_xor_are_exact():
    layer = QuadraticLinear(1, 2, dtype=torch.float64)
    last = QuadraticLinear(2, 1, dtype=torch.float64)
    k = 0.3
    values = {
        layer: {"weight": [[1.0], [1.0]], "bias": [-k, -k], "weight_g": [[0.0], [1.0]], "bias_g": [1.0, -k]},
        last: {"weight": [[1.0, 0.0]], "bias": [0.0], "weight_g": [[0.0, 1.0]], "bias_g": [0.0]},
    }
    for module, terms in values.items():
        for name, value in terms.items():
            getattr(module, name).data = torch.tensor(value, dtype=torch.float64)
    x = torch.linspace(-1, 2, 61, dtype=torch.float64)[:, None]
    assert (last(layer(x).relu()) - (x - k).clamp(min=0) ** 3).abs().max() <= 1e-10
    xor = QuadraticLinear(2, 1)
    with torch.no_grad():
        # (x1 + x2)(1 - 0) with squares: x1 + x2 - 2 x1 x2 = (x1 + x2)(1 - x1 - x2) + x1² + x2² on any input.
        (
            xor.weight.fill_(1.0),
            xor.bias.zero_(),
            xor.weight_g.fill_(-1.0),
            xor.bias_g.fill_(1.0),
            xor.weight_b.fill_(1.0),
        )
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert xor(corners).flatten().tolist() == [0.0, 1.0, 1.0, 0.0]


def test_shrinking_and_groups():
    net = to_quadratic(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), compact=False)
    randomized(net)
    deviation = net[0].bias_g.detach() - 1
    weight = net[0].weight.detach().clone()
    ReLinearShrink(net, alpha=(0.5, 0.0)).step()
    assert torch.allclose(net[0].bias_g - 1, 0.5 * deviation)
    assert net[0].weight_b.abs().max() == 0
    assert torch.equal(net[0].weight, weight)
    ReLinearShrink(net, beta=0.1).step()
    assert (net[1].bias_g - 1).abs().max() <= 0.1 + 1e-7
    groups = relinear_param_groups(net, 0.1, gamma=(0.1, 0.2), weight_decay=1e-2)
    assert sorted(len(g["params"]) for g in groups) == [2, 2, 4, 4]
    held = [id(p) for g in groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    decay_of = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert decay_of[id(net[0].bias_g)] == 0
    for bad in (lambda: relinear_param_groups(net, 0.1, gamma=-1.0), lambda: ReLinearShrink(net, alpha=1.5),
                lambda: ReLinearShrink(net, alpha=float("nan")), lambda: ReLinearShrink(nn.Linear(2, 2), alpha=0.5),
                lambda: QuadraticLinear(2, 2, init="zero")):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()


def test_dimension_needs_enough_points():
    net = nn.Linear(2, 1).double()
    params = dict(net.named_parameters())
    assert functional_dimension(lambda p, x: functional_call(net, p, x), params, torch.randn(9, 2)) == 3
    with pytest.raises(ValueError, match="at least 3 values"):
        functional_dimension(lambda p, x: functional_call(net, p, x), params, torch.randn(2, 2))


def test_a_single_layer_is_converted_and_bad_settings_are_refused_in_one_sentence():
    assert isinstance(to_quadratic(nn.Linear(3, 2)), QuadraticLinear)
    net = nn.Sequential(QuadraticLinear(3, 2))
    rates = [g["lr"] for g in relinear_param_groups(net, 1.0, gamma=[0.5, 0.25])]
    assert rates == [1, 0.5, 0.5, 0.25]
    for bad in ({"gamma": (1, 2, 3)}, {"gamma": -1}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="expected"):
            relinear_param_groups(net, 0.1, **bad)
    for x in (torch.full((2, 3), float("nan")), torch.zeros(0, 3)):
        with pytest.raises(ValueError, match="x"):
            quadratic_strength(net, x)
    with pytest.raises(ValueError, match="inputs"):
        functional_dimension(
            lambda p, x: functional_call(net, p, x), dict(net.named_parameters()), torch.full((9, 3), float("nan"))
        )


def test_a_transformer_keeps_its_outputs_and_is_measured_by_its_own_arguments():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    bert, ids = transformers.BertForSequenceClassification(config).eval(), torch.arange(21).view(3, 7)
    before = bert(ids).logits
    assert torch.allclose(to_quadratic(bert)(ids).logits, before, atol=1e-6)
    optimizer = torch.optim.SGD(relinear_param_groups(bert, 0.1), lr=0.1)
    bert(ids, labels=torch.tensor([0, 1, 1])).loss.backward()
    optimizer.step()
    strength = quadratic_strength(bert, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert len(strength) == 8
    assert all(0 < share < 0.5 for share in strength.values())


def test_squares_are_not_kept_for_backward():
    x = torch.randn(4, 8, 16, 16)
    layer = QuadraticConv2d(8, 8, 3, padding=1)
    kept = saved_bytes(lambda: layer(x).sum().backward(), exclude=layer).peak
    assert kept <= 4 * (3 * x.numel() + 2 * layer.weight.numel()), "x, the two factors, and their weights side by side"


def test_compiles():
    layer = randomized(QuadraticLinear(3, 4))
    x = torch.randn(2, 3)
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x))
