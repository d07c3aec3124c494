"""BiPer: the square wave and its gradient to the digit, conversion, quantisation errors, packed storage, compression."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.bundle import BundleError, Manifest, build, load_bundle, save_bundle
from torchfolio.efficiency.binary import PackedConv2d, PackedLinear, pack_bits, unpack_bits
from torchfolio.efficiency.biper import (
    BiPer,
    BiPerConv2d,
    BiPerLinear,
    SignSTEConv2d,
    SignSTELinear,
    binarize,
    export_binary,
    frequency_for,
    laplace_qe,
    load_binary,
    pack,
    quantization_error,
    set_stage,
    sine_decay,
)
from torchfolio.efficiency.compression import compress, tensor_bytes
from torchfolio.efficiency.straight_through import polynomial_sign, round_ste, sign, sign_ste, square_wave
from torchfolio.models import MLP, ConvNet, ResNetCIFAR


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def layer(**settings) -> BiPerConv2d:
    return BiPerConv2d(4, 6, 3, padding=1, **{"frequency": 5.0, "stage": 2, **settings})


def tanh_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardtanh(),
        nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Hardtanh(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip


def same_sign_of_sine(weight: torch.Tensor, frequency: float) -> torch.Tensor:
    """Weights moved off the edges of the wave, where rounding decides."""
    k = torch.floor(weight * frequency / math.pi)
    phase = (weight * frequency / math.pi - k).clamp(0.1, 0.9)
    return (k + phase) * math.pi / frequency


def test_forward_of_stage_2_is_the_scaled_square_wave():
    conv = layer(bias=True)
    x = torch.randn(2, 4, 7, 7)
    wave = torch.where(torch.sin(5.0 * conv.weight) >= 0, 1.0, -1.0)
    assert torch.equal(conv.binary_weight(), wave)
    ones = torch.where(x >= 0, 1.0, -1.0)
    expected = F.conv2d(ones, wave, padding=1) * conv.alpha.view(-1, 1, 1) + conv.bias.view(-1, 1, 1)
    torch.testing.assert_close(conv(x), expected)
    assert set(conv.effective_weight().unique().tolist()) == {-1.0, 1.0}


def test_wave_is_periodic_and_flips_at_half_a_period():
    weight = same_sign_of_sine(torch.randn(500, dtype=torch.float64), 5.0)
    wave = square_wave(weight, 5.0)
    assert torch.equal(square_wave(weight + 2 * math.pi / 5, 5.0), wave)
    assert torch.equal(square_wave(weight + math.pi / 5, 5.0), -wave)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_of_weights_is_that_of_the_sine(stage):
    conv = layer(stage=stage, binary_input=False).double()
    x, upstream = torch.randn(2, 4, 7, 7).double(), torch.randn(2, 6, 7, 7).double()
    conv(x).backward(upstream)
    effective = (conv.effective_weight().detach() * conv.alpha.detach().view(-1, 1, 1, 1)).requires_grad_()
    F.conv2d(x, effective, padding=1).backward(upstream)
    of_wave = effective.grad * conv.alpha.detach().view(-1, 1, 1, 1)
    torch.testing.assert_close(conv.weight.grad, of_wave * 5.0 * torch.cos(5.0 * conv.weight), rtol=0, atol=1e-6)


def test_gradient_of_inputs_runs_through_the_normalisation():
    conv = layer().double().train()
    x = torch.randn(2, 4, 5, 5).double().requires_grad_()
    conv(x).sum().backward()
    weight = (conv.effective_weight() * conv.alpha.view(-1, 1, 1, 1)).detach()
    y = x.detach().clone().requires_grad_()
    scaled = y / (y.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    at_signs = torch.ones_like(y).requires_grad_()
    F.conv2d(at_signs, weight, padding=1).sum().backward()
    scaled.backward(at_signs.grad * (2 - 2 * scaled.detach().abs()).clamp_min(0))
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_scale_of_an_input_changes_nothing(mode):
    conv = getattr(layer(), mode)()
    x = torch.randn(3, 4, 6, 6)
    assert torch.equal(conv(x * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1, 1)), conv(x))


def test_signs_of_zero_and_of_what_is_not_finite():
    assert sign(torch.tensor([0.0, -0.0, 2.0, -1e-30])).tolist() == [1, 1, 1, -1]
    assert sign(torch.tensor([math.nan, math.inf])).isnan().all()
    assert sign(torch.tensor([-3.0, 0.0], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("function", "slopes"),
    [(sign_ste, [0, 1, 1, 0]), (polynomial_sign, [0, 1.6, 1.0, 0]), (round_ste, [1, 1, 1, 1])],
)
def test_surrogate_slopes(function, slopes):
    x = torch.tensor([-3.0, -0.2, 0.5, 1.5], requires_grad=True)
    function(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor(slopes, dtype=torch.float32))


def test_rounding_is_half_to_even():
    assert round_ste(torch.tensor([0.5, 1.5, 2.5, -0.5])).tolist() == [0, 2, 2, 0]


def test_second_derivative_is_refused():
    x = torch.randn(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(square_wave(x, 3.0).sum(), x, create_graph=True)


def test_laplace_error_and_its_limits():
    from scipy.optimize import minimize_scalar

    best = minimize_scalar(lambda u: -laplace_qe(u), bounds=(0.5, 1.5), method="bounded", options={"xatol": 1e-10})
    assert best.x == pytest.approx(0.954882, abs=1e-5)
    assert -best.fun == pytest.approx(0.102835, abs=1e-6)
    assert laplace_qe(1e-3) == pytest.approx(1e-6, rel=1e-4)
    assert laplace_qe(1e6) == pytest.approx(0.5 - 4 / math.pi**2, abs=1e-6)
    assert laplace_qe(0) == 0
    assert laplace_qe([0.5, 2.0]).shape == (2,)
    with pytest.raises(ValueError, match="at least 0"):
        laplace_qe([-0.1])


@pytest.mark.parametrize("u", [0.2, 0.5, 0.95, 3.0])
def test_laplace_error_against_samples(u):
    weight = torch.from_numpy(np.random.default_rng(0).laplace(0, u / 20, 1_000_000))
    measured = quantization_error(weight, 20.0)
    assert measured["qe"] == pytest.approx(laplace_qe(u), rel=0.01)
    assert measured["u"] == pytest.approx(u, rel=0.01)


def test_error_of_the_plain_sign():
    assert quantization_error(torch.randn(200_000))["normalized"] == pytest.approx(1 - 2 / math.pi, abs=0.005)
    net = nn.Sequential(SignSTEConv2d(3, 4, 3), nn.Flatten(), SignSTELinear(4, 2))
    assert set(quantization_error(net)) == {"0", "2"}
    assert math.isnan(quantization_error(net)["0"]["u"])


def test_frequency_gives_the_error_asked_for():
    net = ConvNet(widths=(8, 64))
    found = frequency_for(net, qe=0.04)
    assert set(found) == {"layer2.0"}
    size = float(net.layer2[0].weight.detach().abs().mean())
    assert laplace_qe(found["layer2.0"] * size) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="largest error"):
        frequency_for(net, qe=0.2)


def test_converts_all_convolutions_but_the_first_and_projections():
    net = ResNetCIFAR(8, shortcut="B")
    before = {name: m.weight.clone() for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = binarize(net, frequency=7.0, binary_input=False)
    assert made is net
    binary = {name: m for name, m in net.named_modules() if isinstance(m, BiPerConv2d)}
    assert set(binary) == {n for n in before if n != "stem.0" and "shortcut" not in n}
    assert all(torch.equal(m.weight, before[n]) and m.frequency == 7.0 for n, m in binary.items())
    assert binary["block2.conv1"].stride == (2, 2)


def test_other_layers_by_name_and_by_predicate():
    net = binarize(MLP(6, 3, hidden=(8, 8)), where=["layer2.0"])
    assert isinstance(net.layer2[0], BiPerLinear)
    assert isinstance(net.layer2[1], nn.Hardtanh)
    net = binarize(MLP(6, 3, hidden=(8, 8)), where=lambda name, m: isinstance(m, nn.Linear) and name != "head")
    assert isinstance(net.layer1[1], BiPerLinear)
    assert net(torch.randn(2, 6)).shape == (2, 3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_geometry_is_kept(groups):
    old = nn.Conv2d(4, 8, (3, 5), stride=2, padding=(2, 1), dilation=(2, 1), groups=groups, padding_mode="reflect")
    net = binarize(nn.Sequential(nn.Identity(), old), where=["1"], binary_input=False, match=True)
    x = torch.randn(2, 4, 15, 17)
    torch.testing.assert_close(net(x), old(x), rtol=1e-4, atol=1e-5)


def test_matching_starts_at_the_old_function():
    old = ResNetCIFAR(8).eval()
    net = binarize(copy.deepcopy(old), binary_input=False, match=True).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(net(x), old(x), rtol=1e-4, atol=1e-4)


def test_device_dtype_and_mode_follow_the_network():
    net = binarize(tanh_net().double().eval())
    assert not net[3].training
    assert net[3].weight.dtype == net[3].alpha.dtype == torch.float64
    assert net[3].trained.dtype == torch.bool
    meta = BiPerConv2d(2, 3, 3, device="meta")
    assert meta.alpha.is_meta
    assert meta.trained.is_meta


def test_unbatched_and_token_inputs():
    conv, linear = layer(), BiPerLinear(5, 3)
    x = torch.randn(4, 6, 6)
    torch.testing.assert_close(conv(x), conv(x[None])[0])
    assert linear(torch.randn(2, 7, 5)).shape == (2, 7, 3)
    assert linear(torch.randn(5)).shape == (3,)


def test_stages_and_their_warning():
    net = binarize(tanh_net())
    with pytest.warns(UserWarning, match="not trained in stage 1"):
        set_stage(net, 2)
    set_stage(net, 1)
    net(torch.randn(2, 1, 6, 6))
    again = binarize(tanh_net())
    again.load_state_dict(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_stage(net, 2)
        set_stage(again, 2)
    assert net[3].stage == 2
    with pytest.raises(ValueError, match="stage 1"):
        set_stage(net, 3)
    with pytest.raises(ValueError, match="binarize first"):
        set_stage(tanh_net(), 1)


def test_inputs_that_are_never_negative_warn_once():
    conv = layer()
    with pytest.warns(UserWarning, match="Hardtanh"):
        conv(torch.rand(2, 4, 5, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        conv(torch.rand(2, 4, 5, 5))
        layer(binary_input=False)(torch.rand(2, 4, 5, 5))


def test_relu_gives_way_to_hardtanh():
    net = binarize(ConvNet(widths=(4, 8)))
    assert not [m for m in net.modules() if isinstance(m, nn.ReLU)]
    assert [m for m in binarize(ConvNet(widths=(4, 8)), hardtanh=False).modules() if isinstance(m, nn.ReLU)]


def test_sine_decay_has_the_gradient_of_its_formula():
    net = binarize(tanh_net(), frequency=3.0)
    value = sine_decay(net)
    weight = net[3].weight
    expected = (0.5 - 0.5 * torch.cos(6.0 * weight)).mean()
    torch.testing.assert_close(value, expected)
    value.backward()
    torch.testing.assert_close(weight.grad, 3.0 * torch.sin(6.0 * weight).detach() / weight.numel())


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64])
def test_bits_come_back(n):
    signs = torch.where(torch.randn(n) >= 0, 1.0, -1.0)
    packed = pack_bits(signs)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-n // 8)
    assert torch.equal(unpack_bits(packed, (n,)), signs)


@pytest.mark.parametrize("kind", [BiPerConv2d, SignSTEConv2d])
def test_export_is_small_and_exact(kind, tmp_path):
    from safetensors.torch import load_file, save_file

    net = tanh_net()
    net[3] = kind(4, 6, 3, padding=1)
    if kind is BiPerConv2d:
        net[3].stage = 2
    net.eval()
    exported = export_binary(net)
    save_file(exported, tmp_path / "binary.safetensors")
    assert exported["3.bits"].numel() <= 4 * net[3].weight.numel() / 30
    x = torch.randn(5, 1, 8, 8)
    expected = net(x)
    loaded = load_binary(copy.deepcopy(net), load_file(tmp_path / "binary.safetensors"))
    assert torch.equal(loaded(x), expected)
    assert torch.equal(pack(net)(x), expected)
    assert isinstance(net[3], PackedConv2d)


def test_packed_linear_and_real_inputs():
    net = binarize(MLP(6, 3, hidden=(8, 8)), where=["layer2.0"], binary_input=False, stage=2).eval()
    x = torch.randn(4, 6)
    expected = net(x)
    assert torch.equal(pack(net)(x), expected)
    assert isinstance(net.layer2[0], PackedLinear)


def test_export_that_does_not_fit():
    exported = export_binary(binarize(tanh_net()))
    with pytest.raises(ValueError, match=r"differ: 3"):
        load_binary(tanh_net(), exported)
    exported["3.shape"] = torch.tensor([1, 2, 3, 3])
    with pytest.raises(ValueError, match=r"expected weights of shape \(6, 4, 3, 3\)"):
        load_binary(binarize(tanh_net()), exported)
    with pytest.raises(ValueError, match="no binary layer"):
        export_binary(tanh_net())


def test_copies_and_pickles():
    net = binarize(tanh_net()).eval()
    x = torch.randn(2, 1, 6, 6)
    again = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert torch.equal(again(x), net(x))
    packed = pickle.loads(pickle.dumps(pack(copy.deepcopy(net))))
    assert set(packed.state_dict()) >= {"3.bits", "3.alpha"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BiPerConv2d(2, 2, 3, frequency=0.0), ValueError, "frequency to be positive and finite, got 0"),
        (lambda: BiPerConv2d(2, 2, 3, frequency=math.nan), ValueError, "frequency"),
        (lambda: BiPerLinear(2, 2, stage=3), ValueError, "stage 1"),
        (lambda: binarize(nn.Sequential(nn.Linear(2, 2))), ValueError, "found none among Linear"),
        (lambda: binarize(tanh_net(), where=["nosuch"]), ValueError, "no module 'nosuch'"),
        (lambda: binarize(tanh_net(), where=["1"]), TypeError, "got BatchNorm2d"),
        (lambda: binarize(nn.ConvTranspose2d(2, 2, 3), where=lambda n, m: True), TypeError, "ConvTranspose2d"),
        (lambda: BiPer(sine_decay=-1), ValueError, "sine_decay"),
        (lambda: pack(tanh_net()), ValueError, "no module"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def stripes(n: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of horizontal, vertical or no stripes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) % 3
    wave = torch.tensor([1.0, -1.0]).repeat(4)
    x = torch.stack([wave[:, None].expand(8, 8), wave.expand(8, 8), torch.zeros(8, 8)])[y][:, None]
    return x + 0.3 * torch.randn(n, 1, 8, 8, generator=generator), y


def test_compress_learns_reproducibly_and_leaves_the_network_alone():
    x, y = stripes()
    net = ConvNet(3, 1, widths=(8, 8))
    before = copy.deepcopy(net.state_dict())

    def small():
        made = compress(net, BiPer(), (x, y), example=x[:2], epochs=9, lr=0.05, batch_size=16, device="cpu")
        return made.model, made.epochs

    model, epochs = small()
    assert epochs == {"sine": 6, "square wave": 3}
    assert (model(x).argmax(1) == y).float().mean() > 0.9
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert isinstance(model.layer2[0], PackedConv2d)
    assert tensor_bytes(model) < tensor_bytes(net)
    again, _ = small()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = math.nan
    with pytest.raises(ValueError, match="the network holds NaN"):
        small()
    counted = BiPer().operations(model, x[:1])
    assert counted["sign_operations"] == 2 * 8 * 8 * 9 * 16


def test_bundle_of_a_converted_network(tmp_path):
    method = BiPer(layers=["layer2.0"], binary_input=True)
    recipe = method.recipe({"build": "torchfolio.models:ConvNet", "arguments": {"widths": [4, 6], "in_channels": 1}})
    net = build(**{"path": recipe["build"], "arguments": recipe["arguments"]}).eval()
    save_bundle(net, tmp_path / "small", Manifest(**recipe))
    again = load_bundle(tmp_path / "small").model
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(again(x), net(x))


@pytest.mark.parametrize(
    "path",
    ["torchfolio.efficiency.compression:compress", "torchfolio.efficiency.compression:copy",
     "torchfolio.efficiency.biper:quantization_error", "torchfolio.bundle:build"],
)  # fmt: skip
def test_bundles_call_no_other_function(path):
    with pytest.raises(BundleError, match="not a network"):
        build(path, {})


def test_network_inside_a_bundle_must_be_allowed_too():
    recipe = BiPer().recipe({"build": "os:system", "arguments": {"command": "true"}})
    with pytest.raises(BundleError, match="allow it by name"):
        build(recipe["build"], recipe["arguments"])


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(), nn.Linear(4, 4))


def test_the_stage_is_in_the_state():
    trained = binarize(small(), where=["2"], stage=2)
    net = binarize(small(), where=["2"])
    net.load_state_dict(trained.state_dict())
    assert net[2].stage == 2
    x = torch.randn(5, 4)
    torch.testing.assert_close(net.eval()(x), trained.eval()(x))
    assert copy.deepcopy(net)[2].stage == 2


@pytest.mark.parametrize("match", [False, True])
def test_shared_frozen_and_double_weights_stay_so(match):
    net = small().double()
    net[2].weight = net[0].weight
    net[0].weight.requires_grad_(False)
    x, before = torch.randn(5, 4, dtype=torch.double), net[0].weight.clone()
    y = net(x)
    binarize(net, where=["0", "2"], match=match, binary_input=False)
    assert net[0].weight is net[2].weight
    assert not net[2].weight.requires_grad
    assert net[0].bias.requires_grad
    assert net[0].weight.dtype == net[0].alpha.dtype == torch.double
    if match:
        torch.testing.assert_close(net(x), y)
    else:
        assert torch.equal(net[0].weight, before)


def test_what_would_stay_real_or_lose_its_weight_is_refused():
    with pytest.raises(ValueError, match=r"'attention\.out_proj' belongs to an nn.MultiheadAttention"):
        binarize(nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), where=lambda n, m: True)
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        with pytest.raises(ValueError, match="a weight that is computed"):
            binarize(nn.Sequential(nn.Linear(3, 4), norm(nn.Linear(4, 4))), where=["1"])
    net = small()
    net[2].weight = net[0].weight
    with pytest.raises(ValueError, match="'2' shares a weight with '0'"):
        binarize(net, where=["2"], match=True)


def test_a_transformer_s_perceptrons_become_binary_and_stay_so_when_packed():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    torch.manual_seed(0)
    bert, ids = transformers.BertForSequenceClassification(config).eval(), torch.arange(10).view(2, 5)
    before = bert(ids).logits
    binarize(bert, where=lambda name, layer: "intermediate" in name, binary_input=False, match=True)
    assert torch.allclose(bert(ids).logits, before, atol=1e-5), "stage 1 starts at the old function"
    with pytest.warns(UserWarning, match="not trained in stage 1"):
        set_stage(bert, 2)
    assert torch.allclose(pack(copy.deepcopy(bert))(ids).logits, bert(ids).logits, atol=1e-5)


def test_what_cannot_be_meant_is_refused():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(TypeError, match="names of layers"):
        binarize(net, where="0")
    with pytest.raises(TypeError, match="a frequency"):
        binarize(net, where=["0"], frequency="20")  # pyright: ignore[reportArgumentType]
    for call in (lambda: laplace_qe(math.nan), lambda: quantization_error(torch.tensor([math.nan]), 20.0),
                 lambda: quantization_error(torch.zeros(0), 20.0)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("named", ["1", "3"])
def test_a_layer_under_two_names_becomes_one_binary_layer(named):
    shared = nn.Conv2d(4, 4, 3, padding=1)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), shared, nn.Hardtanh(), shared)
    x = torch.randn(2, 1, 8, 8)
    before = net(x)
    binarize(net, where=[named], match=True, binary_input=False)
    assert isinstance(net[1], BiPerConv2d)
    assert net[3] is net[1]
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-5)
