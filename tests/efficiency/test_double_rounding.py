"""Double Rounding: the integers, their gradients, switching, the two rules, the search, and what is stored."""

from __future__ import annotations

import copy
import itertools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.efficiency.compression import compress
from torchfolio.efficiency.double_rounding import (
    BitSwitching,
    DoubleRounding,
    MixedPrecision,
    MultiPrecision,
    SwitchableNorm,
    calibrate,
    convert,
    double_round,
    eta,
    export,
    load_export,
    search_bits,
    set_bits,
    store,
    use_bits,
    weight_traces,
    widths_now,
)
from torchfolio.efficiency.mixed_precision import _solve
from torchfolio.efficiency.quantized_layers import quantized_layers
from torchfolio.efficiency.rounding import span
from torchfolio.efficiency.straight_through import round_ste
from torchfolio.engine import evaluate, fit
from torchfolio.engine.recipes import adam, cosine
from torchfolio.models import MLP, ConvNet, Logits, ResNetCIFAR

BITS = (8, 6, 4, 2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Dropout(0.1), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_stored_integers_give_the_forward_pass_bit_for_bit(dtype):
    quantizer = DoubleRounding(range(2, 9)).to(dtype)
    w = torch.randn(50, 40).to(dtype)
    quantizer.start(w)
    q = quantizer.integers(w)
    assert q.dtype == torch.int8
    for bit in range(2, 9):
        with torch.no_grad():
            assert torch.equal(quantizer.from_integers(q, bit), quantizer(w, bit))
        assert len(quantizer(w, bit).unique()) <= 2**bit


def test_ties_are_rounded_to_even_and_the_top_is_clipped():
    quantizer = DoubleRounding((8, 2))
    quantizer.start(torch.tensor([127.0]))  # s = 1
    integers = torch.tensor([-128, -96, -32, 31, 32, 96, 127], dtype=torch.int8)
    assert quantizer.from_integers(integers, 2).tolist() == [-128, -128, 0, 0, 0, 64, 64]


@pytest.mark.parametrize("bit", [8, 6, 5, 4, 3, 2])
def test_gradients_are_the_closed_forms(bit):
    w = torch.linspace(-2, 2, 401, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)  # both clips are reached
    step, (low, high), (least, most) = 2 ** (8 - bit), span(8), span(bit)

    def chain(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        first = round_ste(v / scale).clamp(low, high)
        return round_ste(first / step).clamp(least, most) * step * scale

    ours, theirs = double_round(w, s, bit, 8), chain(w, s)
    assert torch.equal(ours, theirs)
    first = (w / s).round()
    second = (first.clamp(low, high) / step).round()
    inside = (first >= low) & (first <= high) & (second >= least) & (second <= most)
    closed = torch.where(inside, step * second - w / s, step * second.clamp(least, most))
    assert closed[0] == -128
    assert closed[-1] == step * most
    for k in range(0, 401, 7):  # element by element
        for output in (ours, theirs):
            to_w, to_s = torch.autograd.grad(output[k], (w, s), retain_graph=True)
            assert to_s.item() == pytest.approx(closed[k].item(), abs=1e-5)
            assert to_w[k].item() == float(inside[k])


def test_scale_of_every_width_and_weight_of_its_gradient():
    x = torch.randn(10, 30).relu()
    quantizer = DoubleRounding(BITS, scale="separate", signed=False)
    with pytest.raises(RuntimeError, match="calibrate"):
        quantizer(x, 4)
    quantizer.start(x, 4)
    assert quantizer.log_scales["4"].exp().item() == pytest.approx(2 * x.mean().item() / 15**0.5)
    quantizer(x, 4, len(x)).sum().backward()
    scale = quantizer.log_scales["4"].detach().exp().requires_grad_()
    double_round(x, scale, 4, 4, signed=False).sum().backward()
    assert scale.grad is not None
    expected = scale.grad * scale.detach() / (30 * 15) ** 0.5
    assert torch.allclose(quantizer.log_scales["4"].grad, expected)
    with pytest.raises(ValueError, match="real weights"):
        quantizer.integers(x)


def test_conversion_leaves_the_network_and_finds_producing_layers():
    net = ResNetCIFAR(8, (4, 8, 8), 3, in_channels=1, shortcut="B")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.randn(6, 1, 8, 8)
    quantized = convert(net, BITS, example=x)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    norms = {n: m for n, m in quantized.named_modules() if isinstance(m, SwitchableNorm)}
    assert norms["block2.bn2"].source == "block2.conv2"
    assert norms["block2.shortcut.1"].source == "block2.shortcut.0"
    set_bits(quantized, {"block2.conv2": 2})
    assert (norms["block2.bn2"].bit, norms["block2.bn1"].bit) == (2, 8)
    set_bits(quantized, 4)
    assert [b for n, b in widths_now(quantized).items() if n in ("stem.0", "head.2")] == [8, 8]
    with use_bits(quantized, 2):
        assert widths_now(quantized)["block1.conv1"] == 2
    assert widths_now(quantized)["block1.conv1"] == 4
    with torch.no_grad():
        close = (convert(net, (8,), example=x).eval()(x) - net.eval()(x)).abs().max()
    assert close < 0.2 * net(x).abs().max()


def test_export_load_and_round_trips():
    net, x = small().eval(), torch.randn(5, 1, 8, 8)
    quantized = convert(net, BITS, example=x).eval()
    exported = export(quantized)
    weights = {k: v for k, v in exported.items() if k.endswith("integers")}
    assert sum(v.numel() for v in weights.values()) == sum(p.numel() for p in net.parameters() if p.dim() > 1)
    assert all(v.dtype == torch.int8 for v in weights.values())
    loaded = load_export(convert(small(), BITS), exported).eval()
    again = pickle.loads(pickle.dumps(copy.deepcopy(loaded)))
    for bit in BITS:
        for other in (loaded, again):
            with use_bits(quantized, bit), use_bits(other, bit), torch.no_grad():
                assert torch.equal(quantized(x), other(x))
    assert "stored" in repr(loaded)
    with pytest.raises(ValueError, match="integers alone"):
        MultiPrecision().prepare(loaded, (x, x))
    double = convert(small().double(), BITS, example=x.double())
    assert double(x.double()).dtype == torch.float64


def test_rules_keep_the_contract():
    net = convert(ConvNet(3, 1, (4,)), (8, 2), fixed=[], example=torch.randn(12, 1, 8, 8))
    y = torch.arange(12) % 3
    x = torch.randn(12, 1, 8, 8) + y[:, None, None, None]
    check_rule(lambda: MultiPrecision(alrs=None, update="accumulate"), net, (x, y))


@pytest.mark.parametrize("rule", [MultiPrecision, lambda: MixedPrecision(passes=2)])
def test_training_at_all_widths(rule, tmp_path):
    y = torch.arange(60) % 3
    x = torch.randn(60, 1, 8, 8) * 0.3 + y[:, None, None, None]
    net = convert(small(), BITS, example=x)
    how = {"optimizer": adam(3e-3), "scheduler": cosine(), "batch_size": 25, "device": "cpu"}
    whole, before = copy.deepcopy(net), evaluate(net, (x, y))["loss"]
    result = fit(whole, (x, y), rule=rule(), epochs=4, **how)
    assert {"loss", "loss_8", "loss_2"} <= set(result.history.to_frame().columns)
    assert widths_now(whole) == widths_now(net)
    for bit in BITS:
        with use_bits(whole, bit):
            assert evaluate(whole, (x, y))["loss"] < before
    how["scheduler"] = None
    for epochs in (2, 4):
        resumed = copy.deepcopy(net)
        fit(resumed, (x, y), rule=rule(), epochs=epochs, checkpoint=tmp_path / "a", **how)
    straight = copy.deepcopy(net)
    fit(straight, (x, y), rule=rule(), epochs=4, **how)
    assert all(torch.equal(v, straight.state_dict()[k]) for k, v in resumed.state_dict().items())
    with pytest.raises(ValueError, match="accumulate=1"):
        fit(copy.deepcopy(net), (x, y), rule=rule(), epochs=1, accumulate=2, **how)


def test_rates_of_scales():
    assert [eta(b) for b in range(8, 1, -1)] == pytest.approx([1, 0.5, 0.1, 0.05, 0.01, 0.005, 0.001])
    net = convert(small(), BITS, example=torch.randn(8, 1, 8, 8)).train()
    batch = torch.randn(8, 1, 8, 8), torch.arange(8) % 3
    for alrs in ("full", "ratio", None):
        rule = MultiPrecision(alrs=alrs)
        model = rule.prepare(copy.deepcopy(net), batch)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)
        rule.configure(optimizer, None)
        assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0, 0]
        rule.step(batch, torch.Tensor.backward)  # leaves the last width, 2 bits, to the caller
        rate = optimizer.param_groups[1]["lr"]
        with use_bits(model, 2):
            strength = rule._strengths()[2]
        assert 0 < strength <= 1
        expected = {"full": 0.001 * max(0.1 - strength, 0.01), "ratio": 0.001 * 0.1, None: 0.1}[alrs]
        assert rate == pytest.approx(expected)
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_mixtures_follow_the_roulette():
    rule = MixedPrecision(traces={"3": 2.0, "7": 0.1, "0": 0.1, "10": 0.1})
    rule.prepare(convert(small(), BITS), ())
    assert torch.allclose(rule.table, torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.25] * 4], dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    draws = [rule.draw(generator) for _ in range(10_000)]
    for row, name in zip(rule.table, ("3", "7"), strict=True):
        for p, bit in zip(row.tolist(), BITS, strict=True):
            assert abs(sum(d[name] == bit for d in draws) / 1e4 - p) < 3.5 * (p * (1 - p) / 1e4) ** 0.5
    with pytest.raises(ValueError, match="7 has none"):
        MixedPrecision(traces={"3": 1.0}).prepare(convert(small(), BITS), ())


def test_search_equals_brute_force():
    random = np.random.default_rng(0)
    for _ in range(20):
        losses = np.sort(random.exponential(size=(5, 4)), 1)
        costs = random.integers(1, 1000, (5, 1)) * np.array(BITS)
        budget = random.uniform(costs.min(1).sum(), costs.max(1).sum())
        everything = [p for p in itertools.product(range(4), repeat=5) if costs[range(5), p].sum() <= budget]
        best = min(losses[range(5), p].sum() for p in everything)
        picks = _solve(losses, costs, budget)
        assert costs[range(5), picks].sum() <= budget
        assert losses[range(5), picks].sum() == pytest.approx(best)


def test_search_within_budgets_from_traces():
    net, x, y = small().eval(), torch.randn(16, 1, 8, 8), torch.arange(16) % 3
    traces = weight_traces(net, F.cross_entropy, (x, y), samples=8)
    assert list(traces) == ["0", "3", "7", "10"]
    quantized = convert(net, BITS, example=x)
    weights = {n: m.quantized_weight().numel() for n, m in quantized_layers(quantized).items()}
    for cost, most in (("size", 8 * sum(weights.values())), ("bitops", 1e9)):
        picks = search_bits(quantized, traces, most, cost, x[:1])
        assert picks == {"3": 8, "7": 8}
    low = 8 * (weights["0"] + weights["10"]) + 2 * (weights["3"] + weights["7"])
    assert search_bits(quantized, traces, low) == {"3": 2, "7": 2}
    with pytest.raises(ValueError, match=f"at least {low}"):
        search_bits(quantized, traces, low - 1)
    with pytest.raises(ValueError, match="give an example"):
        search_bits(quantized, traces, 1e9, "bitops")


def test_compression_writes_a_bundle_that_switches(tmp_path):
    y = torch.arange(40) % 3
    x = torch.randn(40, 1, 8, 8) * 0.3 + y[:, None, None, None]
    method = BitSwitching(bits=(8, 4), bit=4)
    made = compress(
        ConvNet(3, 1, (4, 6, 8)), method, (x, y), example=x[:2], epochs=1, batch_size=20, device="cpu"
    ).model
    counted = method.operations(made, x[:1])
    assert counted["flops"] == 0
    network = {
        "build": "torchfolio.models:ConvNet",
        "arguments": {"num_classes": 3, "in_channels": 1, "widths": [4, 6, 8]},
    }
    save_bundle(
        made, tmp_path / "net", Manifest(input_shape=(1, 8, 8), classes=("a", "b", "c"), **method.recipe(network))
    )
    read = load_bundle(tmp_path / "net").model
    assert widths_now(read)["layer2.0"] == 4
    for bit in (4, 8):
        with use_bits(made, bit), use_bits(read, bit), torch.no_grad():
            assert torch.equal(made(x), read(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: convert(net, ()), "at least one"),
        (lambda net: convert(net, (4, 4)), "different bit widths"),
        (lambda net: convert(net, (9, 4)), "from 2 to 8"),
        (lambda net: convert(net, (4, 1)), "from 2 to 8"),
        (lambda net: convert(nn.ReLU()), "has none"),
        (lambda net: convert(net, fixed=["nope"]), "no layer 'nope'"),
        (lambda net: set_bits(convert(net), 5), "got 5"),
        (lambda net: set_bits(convert(net), {"0": 4}), "width of 0"),
        (lambda net: set_bits(net, 4), "convert it first"),
        (lambda net: store(convert(net, scale="separate")), "can be stored"),
        (lambda net: MultiPrecision(update="accumulate"), "alrs=None"),
        (lambda net: MixedPrecision(traces={"0": float("nan")}), "finite"),
        (lambda net: BitSwitching(bits=(8, 4), bit=2), "got 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(small())


def test_evaluation_without_calibration_is_refused():
    net = convert(MLP(4, 2, (5, 5))).eval()
    with pytest.raises(RuntimeError, match="calibrate"):
        net(torch.randn(3, 4))
    calibrate(net, torch.randn(30, 4))
    assert net(torch.randn(3, 4)).shape == (3, 2)
    assert not net.training


def test_a_transformer_is_converted_trained_and_stored_and_what_stays_real_is_named():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    torch.manual_seed(0)
    bert = Logits(transformers.BertForSequenceClassification(config).eval())
    ids, labels = torch.arange(60).view(10, 6) % 20, torch.arange(10) % 3
    with pytest.warns(UserWarning, match=r"keep real weights at all widths: .*word_embeddings \(Embedding\)"):
        net = convert(bert, (8, 4), example=ids)
    fit(net, (ids, labels), rule=MultiPrecision(), epochs=1, optimizer=adam(1e-3), progress=False)
    stored = store(copy.deepcopy(net)).eval()
    for bit in (8, 4):
        with use_bits(net.eval(), bit), use_bits(stored, bit):
            assert torch.equal(net(ids), stored(ids))


def test_settings_that_cannot_be_meant_are_refused_in_one_sentence():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for bad in ({"bits": 8}, {"bits": "84"}, {"fixed": "0"}):
        with pytest.raises(TypeError, match="expected"):
            convert(net, **bad)
    with pytest.raises(ValueError, match="the example to be finite"):
        convert(net, example=torch.full((2, 3), float("nan")))


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    (gradient,) = torch.autograd.grad(double_round(x, torch.tensor(0.1), 4, 8).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad((gradient + x).sum(), x)
