"""FTWT: the masks, who trains whom, gates found in networks, operations, and the compact form."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.efficiency.compression import compress
from torchfolio.efficiency.ftwt import (
    FTWT,
    DynamicPruning,
    GatedConv,
    MaskPredictor,
    attach_gates,
    choose_r,
    compact,
    estimate_flops,
    gated_layers,
    gates_open,
    mass_mask,
    measure_flops,
    uniform_mask,
)
from torchfolio.engine import fit
from torchfolio.engine.recipes import sgd
from torchfolio.measure import count_flops
from torchfolio.models import VGG, ResNetCIFAR


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


class Mobile(nn.Module):
    """Pointwise, depthwise (two filters a channel), linear pointwise with a shortcut, functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.depth, self.norm2 = nn.Conv2d(8, 16, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(16)
        self.project, self.norm3 = nn.Conv2d(16, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        out = F.relu6(self.norm1(self.expand(x)))
        out = F.relu(self.norm2(self.depth(out)))
        return self.head((x + self.norm3(self.project(out))).mean((2, 3)))


def vgg() -> VGG:
    return VGG(((6, 8), (8,)), 3, 1)


def trained_norms(net: nn.Module, x: torch.Tensor) -> nn.Module:
    for _ in range(3):
        net.train()(x)
    return net.eval()


def test_mask_of_the_poster():
    shares = torch.tensor([[0.3, 0.2, 0.1, 0.3, 0.03, 0.1, 0.01]])  # in another order
    kept = mass_mask(shares, 0.95)[0]
    assert kept.sum() == 4
    assert bool(kept[[0, 1, 3]].all())
    assert bool(kept[2]) != bool(kept[5])  # one of the two equal ones, which cross the share together


def test_masks_equal_a_loop_and_grow_with_r():
    heat = torch.rand(40, 30) * (torch.rand(40, 30) > 0.3)
    heat[0], heat[1, 1:] = 0, 0
    before = None
    for r in (1e-6, 0.1, 0.5, 0.9, 0.97, 0.9999, 1.0):
        mask = mass_mask(heat, r)
        for row, kept in zip(heat.tolist(), mask.tolist(), strict=True):
            total, wanted = sum(row), [False] * 30
            ranked = sorted(range(30), key=lambda c: -row[c])
            running = 0.0
            for c in ranked:
                share = row[c] / total if total else 0.0
                running += share
                wanted[c] = share > 1e-5 and running <= r + 1e-5
            wanted[ranked[0]] = True
            assert kept == wanted
        assert before is None or bool((mask.sum(1) >= before.sum(1)).all())
        before = mask
    shares = heat / heat.sum(1, keepdim=True).clamp_min(1e-30)
    assert torch.equal(mass_mask(heat, 1.0)[1:], shares[1:] > 1e-5)
    assert uniform_mask(torch.rand(5, 10) + 0.1, 0.3).sum(1).tolist() == [7] * 5


@pytest.mark.parametrize("mode", ["decoupled", "joint"])
def test_who_trains_whom(mode):
    net = attach_gates(vgg(), 0.8).train()
    layers = gated_layers(net)
    for layer in layers.values():
        layer.learning, layer.joint = True, mode == "joint"
    gates = {n for n, _ in net.named_parameters() if "predictor" in n}
    task = F.cross_entropy(net(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3)
    masks = torch.stack([layer.mask_loss() for layer in layers.values()]).mean()
    named = dict(net.named_parameters())
    by_task = dict(
        zip(named, torch.autograd.grad(task, list(named.values()), retain_graph=True, allow_unused=True), strict=True)
    )
    by_masks = dict(zip(named, torch.autograd.grad(masks, list(named.values()), allow_unused=True), strict=True))
    assert all(by_task[n] is None for n in gates)
    assert all(by_task[n] is not None for n in named if n not in gates)
    assert all(by_masks[n] is not None for n in gates)
    reached = [n for n in named if n not in gates and by_masks[n] is not None]
    assert reached == [] if mode == "decoupled" else "layer1.0.conv.weight" in reached


def test_mask_loss_is_summed_over_filters():
    layer = GatedConv(nn.Conv2d(2, 5, 3), None, nn.ReLU(), MaskPredictor(2, 5, "avg", softmax=False), 0.5)
    layer.learning = True
    x = torch.randn(4, 2, 6, 6)
    out = layer(x)
    logits = layer.predictor.linear(x.mean((2, 3)))
    dense = layer.conv(x).relu()
    target = mass_mask(dense.amax((2, 3)), 0.5)
    each = F.binary_cross_entropy_with_logits(logits, target.float(), reduction="none")
    assert torch.allclose(layer.mask_loss(), each.sum(1).mean())
    mask = (logits > 0) | (logits == logits.amax(1, keepdim=True))
    assert torch.equal(out, dense * mask[:, :, None, None])


def test_layers_found_in_residual_and_mobile_networks():
    net = ResNetCIFAR(8, (4, 8, 8), 3, in_channels=1, shortcut="B")
    gated = attach_gates(net, 0.9)
    found = gated_layers(gated)
    assert list(found) == ["stem.0", *(f"block{k}.conv{j}" for k in (1, 2, 3) for j in (1, 2))]
    assert isinstance(gated.block2.shortcut[0], nn.Conv2d)
    assert found["block1.conv1"].activation is not None
    assert found["block1.conv2"].activation is None
    assert not any(isinstance(m, GatedConv) for m in net.modules())
    assert next(iter(gated_layers(attach_gates(net, 0.9, skip=["stem.0"])))) == "block1.conv1"
    mobile = attach_gates(Mobile(), 0.9)
    assert list(gated_layers(mobile)) == ["expand", "depth", "project"]


@pytest.mark.parametrize("make", [vgg, lambda: ResNetCIFAR(8, (4, 8, 8), 3, in_channels=1, shortcut="B"), Mobile])
@pytest.mark.parametrize("r", [0.6, 1.0])
def test_compact_equals_the_masked_network_and_its_count(make, r):
    channels = 4 if make is Mobile else 1
    x = torch.randn(12, channels, 9, 9)
    net = trained_norms(make(), x)
    dense = count_flops(net, x[:1])
    model = attach_gates(net, r, softmax=False).double()
    for layer in gated_layers(model).values():  # gates that differ from input to input
        nn.init.normal_(layer.predictor.linear.weight)
    small, x = compact(model), x.double()
    with torch.no_grad():
        masked = model.eval()(x)
        assert torch.allclose(small(x), masked, atol=1e-9)
        assert torch.allclose(torch.cat([small(one) for one in x.split(1)]), masked, atol=1e-9)
    flops = measure_flops(model, x, batch_size=5)
    assert flops.dense == dense
    counted = [count_flops(small, one) for one in x.split(1)]
    assert counted == [int(n) for n in flops.per_sample + flops.gates]
    assert flops.reductions.std() > 0
    assert flops.reduction_with_gates == pytest.approx(1 - sum(counted) / 12 / dense)
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))
    assert torch.equal(again(x[:1]), small(x[:1]))
    opened = gates_open(model, x)
    assert opened.keys() == gated_layers(model).keys()


def test_estimates_are_monotone_and_invert():
    x = torch.randn(50, 1, 8, 8)
    net = trained_norms(vgg(), x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    saved = [estimate_flops(net, x, r).reduction for r in (0.3, 0.6, 0.8, 0.95, 1.0)]
    assert saved == sorted(saved, reverse=True)
    r = choose_r(net, x, 0.4, tolerance=0.02)
    assert estimate_flops(net, x, r).reduction == pytest.approx(0.4, abs=0.02)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(ValueError, match="reduction between"):
        choose_r(net, x, 0.9999)


def test_contract_of_the_rule():
    y = torch.arange(12) % 3
    x = torch.randn(12, 1, 8, 8) + y[:, None, None, None]
    check_rule(lambda: FTWT(cooldown=1, gate_lr=0.01), attach_gates(VGG(((4,),), 3, 1), 0.9), (x, y))


def test_gates_stand_still_after_the_cooldown():
    y = torch.arange(40) % 3
    x = torch.randn(40, 1, 8, 8) + y[:, None, None, None]
    net = attach_gates(vgg(), 0.8)
    seen = []

    def look(state) -> None:
        if not state.epoch_end:
            weights = [m.predictor.linear.weight.detach().flatten() for m in gated_layers(state.model).values()]
            seen.append((torch.cat(weights), [g["lr"] for g in state.optimizer.param_groups]))

    result = fit(net, (x, y), rule=FTWT(), optimizer=sgd(0.01), epochs=4, batch_size=20, callbacks=[look], device="cpu")
    moved = [not torch.equal(a, b) for (a, _), (b, _) in zip(seen, seen[1:], strict=False)]
    assert moved == [True] * 3 + [False] * 4
    assert all(rates == [0.01, 0.1] for _, rates in seen)
    assert all(layer.last is None for layer in gated_layers(net).values())
    table = result.history.to_frame()
    assert table["mask_loss"].isna().tolist() == [False, False, True, True]


def test_compression_writes_a_bundle(tmp_path):
    y = torch.arange(40) % 3
    x = torch.randn(40, 1, 8, 8) + y[:, None, None, None]
    method = DynamicPruning(r=0.7, skip=["layer1.0"])
    made = compress(vgg(), method, (x, y), example=x[:2], epochs=2, batch_size=20, device="cpu").model
    network = {
        "build": "torchfolio.models:VGG",
        "arguments": {"plan": [[6, 8], [8]], "num_classes": 3, "in_channels": 1},
    }
    save_bundle(
        made, tmp_path / "net", Manifest(input_shape=(1, 8, 8), classes=("a", "b", "c"), **method.recipe(network))
    )
    read = load_bundle(tmp_path / "net").model
    with torch.no_grad():
        assert torch.equal(read(x[:1]), made(x[:1]))
        assert torch.equal(read(x), made(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attach_gates(vgg(), 0.0), r"\(0, 1\]"),
        (lambda: attach_gates(vgg(), float("nan")), "r"),
        (lambda: attach_gates(attach_gates(vgg(), 0.9), 0.9), "gates already"),
        (lambda: attach_gates(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 0.9), "found none"),
        (lambda: attach_gates(vgg(), 0.9, skip=["nope"]), "no convolution 'nope'"),
        (lambda: measure_flops(vgg(), torch.randn(2, 1, 8, 8)), "no gates"),
        (lambda: compact(vgg()), "no gates"),
        (lambda: FTWT(cooldown=0), "cooldown"),
        (lambda: FTWT(mode="both"), "decoupled"),  # pyright: ignore[reportArgumentType]
        (lambda: MaskPredictor(3, 3, pool="sum"), "max"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_inputs_and_settings_that_say_nothing_are_refused():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    x = torch.rand(6, 1, 4, 4)
    for call, words in (
        (lambda: estimate_flops(net, x * float("nan"), 0.9), "inputs to be finite"),
        (lambda: choose_r(net, x, 0.1, tolerance=-1), "tolerance"),
        (lambda: attach_gates(net, 0.9, skip=["3"]), "no convolution '3'"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="names of convolutions"):
        attach_gates(net, 0.9, skip="0")
    assert compact(attach_gates(net, 0.9))(x[:0]).shape == (0, 2)


def test_a_gate_that_shuts_what_carries_the_heat_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
                        nn.Linear(8, 3))  # fmt: skip
    x, y = torch.rand(64, 1, 6, 6), torch.arange(64) % 3
    shut = attach_gates(net, 0.9)
    for layer in gated_layers(shut).values():
        nn.init.constant_(next(p for n, p in layer.predictor.named_parameters() if n.endswith("bias")), -50.0)
    with pytest.warns(UserWarning, match="opens 12% of the filters where .* carry the heat"):
        fit(shut, (x, y), rule=FTWT(), epochs=2, batch_size=32, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(attach_gates(net, 0.9, softmax=False), (x, y), rule=FTWT(), optimizer=sgd(0.01), epochs=20, batch_size=32,
            progress=False)  # fmt: skip
