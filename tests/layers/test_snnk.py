"""Scalable neural network kernels: unbiased features, exact merging and solutions, layers in a user's network."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn
from torch.nn import functional as F

from torchfolio.layers import (
    SNNK,
    URF,
    ArcCosineFeatures,
    BundledClassifier,
    BundledRegressor,
    FourierMeasure,
    SNNKAdapter,
    add_adapters,
    best_damping,
    bundle,
    kernel_error,
    merge_linear,
    replace_ffl,
    ridge_solution,
)

TAU = 2 * math.pi


def vectors(n, d, norm=1.0, seed=0, dtype=torch.float64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return norm * F.normalize(x, dim=1)


# Features


@pytest.mark.parametrize("M", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("split", ["balanced", "input", "weight"])
def test_one_pair_is_unbiased_and_its_second_moment_is_the_formula(M, split):
    d, norm = 6, 0.7
    x, w = vectors(1, d, norm), vectors(1, d, norm, 1)
    xi = torch.tensor([0.15], dtype=torch.float64)
    samples = 400_000 if split != "balanced" else 2_000_000
    one = URF(d, samples, FourierMeasure.series(xi, torch.tensor([1.0 + 0j])), M, split, seed=0).double()
    phi, psi = one(x)[0], one.psi(w)[0]
    a, b = torch.complex(*phi.chunk(2)), torch.complex(*psi.chunk(2)).conj()
    products = a * b * samples
    exact = torch.exp(1j * TAU * xi * (x @ w.mT))[0, 0]
    assert abs(products.mean() - exact) <= 0.01 * abs(exact)
    root = torch.sqrt(1j * TAU * xi[0])
    rho, eta = {"balanced": (root, root), "input": (root**2, 1 + 0j), "weight": (1 + 0j, root**2)}[split]
    s = float((rho * x + eta * w).real.square().sum())
    outside = math.exp(-float(((rho * x) ** 2 + (eta * w) ** 2).sum().real))
    moment = ((1 + 4 * M) ** 2 / (1 + 8 * M)) ** (d / 2) * math.exp(2 * (1 + 4 * M) * s / (1 + 8 * M)) * outside
    assert float(products.abs().square().mean()) == pytest.approx(moment, rel=0.03)


def test_best_damping_minimises_the_second_moment():
    M = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for s, d in ((0.0, 6), (1.4, 6), (4.0, 32)):
        log_moment = d / 2 * ((1 + 4 * M) ** 2 / (1 + 8 * M)).log() + 2 * (1 + 4 * M) * s / (1 + 8 * M)
        assert float(best_damping(s, d)) == pytest.approx(float(M[log_moment.argmin()]), abs=1e-4)


@pytest.mark.parametrize(
    ("measure", "tolerance"),
    [(FourierMeasure.sin(), 0.02), (FourierMeasure.cos(), 0.02), (FourierMeasure.gaussian(), 0.03),
     (FourierMeasure.sinc(2.0), 0.05), (FourierMeasure.from_function(F.softplus), 0.15),
     (FourierMeasure.from_function(torch.tanh, 1.0), 0.15)],
)  # fmt: skip
def test_any_measure_with_biases(measure, tolerance):
    x, w, b = vectors(20, 8, 0.5), vectors(10, 8, 0.5, 1), torch.linspace(-0.4, 0.4, 10, dtype=torch.float64)
    one = URF(8, 20_000, measure, seed=0).double()
    assert (one.kernel(x, w, b) - measure(x @ w.mT + b)).abs().max() <= tolerance
    assert torch.allclose(one(x) @ one.psi(w, b).mT, one.kernel(x, w, b), atol=1e-10)


def test_series_is_the_function_within_its_radius():
    z = torch.linspace(-2, 2, 401, dtype=torch.float64)
    for f, tolerance in ((F.softplus, 0.01), (lambda z: (-z * z / 2).exp(), 0.001)):
        assert (FourierMeasure.from_function(f, 2.0)(z) - f(z)).abs().max() <= tolerance


def test_negative_frequencies_come_with_the_real_part():
    """The wave at -xi with the same Gaussian vector is the conjugate, so antithetic pairs add nothing."""
    plus, minus = (
        URF(5, 7, FourierMeasure.series(torch.tensor([xi]), torch.tensor([a])), 0.1, seed=3).double()
        for xi, a in ((0.2, 1 + 2j), (-0.2, 1 - 2j))
    )
    x, w, b = vectors(4, 5), vectors(3, 5, 1.0, 1), torch.ones(3).double()
    assert torch.allclose(plus.kernel(x, w, b), minus.kernel(x, w, b))


def test_log_space_keeps_what_would_overflow():
    one = URF(16, 64, FourierMeasure.cos(), 0.0, seed=0)
    x, w = vectors(3, 16, 80.0, dtype=torch.float32), vectors(2, 16, 1.0, 1, torch.float32)
    features, log_scale = one.scaled(x)
    assert features.isfinite().all()
    assert features.abs().amax(1).min() > 0.4
    assert log_scale.max() > 88
    assert one.kernel(x, w).isnan().sum() == 0


def test_calibration_warns_beyond_the_unit_ball_and_fits_the_damping():
    one = URF(8, 16, FourierMeasure.cos(), seed=0)
    before = one.damping.clone()
    one.calibrate(vectors(9, 8, 0.5), vectors(4, 8, 0.5, 1))
    assert (one.damping < before).all()
    assert one.damping.min() > 0
    with pytest.warns(UserWarning, match="exponential variance beyond the unit ball"):
        one.calibrate(vectors(9, 8, 3.0), vectors(4, 8, 3.0, 1))
    fixed = URF(8, 16, FourierMeasure.cos(), 0.3, seed=0).calibrate(vectors(9, 8), vectors(4, 8))
    assert torch.equal(fixed.damping, torch.full((16,), 0.3))


@pytest.mark.parametrize("orthogonal", [False, True])
def test_arc_cosine_kernel_and_its_rate(orthogonal):
    x, w = vectors(30, 32), vectors(20, 32, 1.0, 1)
    make = partial(ArcCosineFeatures, 32, orthogonal=orthogonal)
    assert kernel_error(make(65_536, seed=0).double(), x, w)[65_536] <= 0.02
    errors = kernel_error([make(m, seed=k).double() for m in (64, 256, 1024, 4096) for k in range(4)], x, w)
    slope = np.polyfit(np.log(list(errors)), np.log(list(errors.values())), 1)[0]
    assert -0.6 <= slope <= -0.4
    big = ArcCosineFeatures(4, 100_000, bias=True, seed=0).double()
    x, w, b = vectors(3, 4), vectors(3, 4, 1.0, 1), torch.tensor([-1.0, 0.0, 2.0]).double()
    exact = ArcCosineFeatures.exact(torch.cat([x, torch.ones(3, 1)], 1), torch.cat([w, b[:, None]], 1))
    assert torch.allclose(big.kernel(x, w, b), exact, atol=0.03)


def test_orthogonal_rows():
    G = URF(4, 8, FourierMeasure.sin(), orthogonal=True, seed=0).projection
    for block in G.split(4):
        gram = block @ block.mT
        assert (gram - gram.diag().diag()).abs().max() < 1e-5


# Layers


KINDS = pytest.mark.parametrize(
    "features", ["relu", "sin", FourierMeasure.gaussian(), partial(ArcCosineFeatures, floor=0.1)]
)


@KINDS
def test_a_layer_is_a_good_module(features):
    layer, x = SNNK(5, 3, 4, features, seed=1), 0.3 * torch.randn(2, 7, 5)
    assert torch.allclose(layer(x).flatten(0, 1), layer(x.flatten(0, 1)), atol=1e-6), "rank of the inputs"
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    fresh = SNNK(5, 3, 4, features, seed=2)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert layer.weight.requires_grad
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x), atol=1e-6)
    double = copy.deepcopy(layer).double()
    inputs = x[0, :2].double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, A: torch.func.functional_call(double, {"weight": A}, x), (inputs, double.weight)
    )
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert SNNK(5, 3, 4, features, device="meta")(x.to("meta")).shape == (2, 7, 3)
    assert "m=4" in repr(layer)
    state = torch.get_rng_state()
    again = SNNK(5, 3, 4, features, nn.Linear(5, 3), seed=1)
    assert torch.equal(again.features.projection, layer.features.projection)
    assert not torch.equal(torch.get_rng_state(), state), "nn.Linear drew"
    torch.set_rng_state(state)
    linear = nn.Linear(5, 3)
    state = torch.get_rng_state()
    SNNK(5, 3, 4, features, linear, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fourier_layer_is_the_layer_it_comes_from():
    linear, x = nn.Linear(6, 5), vectors(30, 6, 0.4, dtype=torch.float32)
    with torch.no_grad():
        linear.weight.copy_(vectors(5, 6, 0.5, 1))
    layer = SNNK(6, 5, 20_000, "sin", linear, calibration=x, seed=0)
    assert (layer(x) - linear(x).sin()).abs().max() < 0.03


def test_radius_and_errors():
    layer = SNNK(5, 3, 4, radius=2.0, seed=0)
    x = torch.randn(6, 5)
    assert torch.allclose(layer(x), layer(7 * x), atol=1e-6)
    for bad in (lambda: layer(torch.randn(2, 4)), lambda: SNNK(5, 3, 0), lambda: SNNK(5, 3, 4, "tanh"),
                lambda: SNNK(4, 3, 4, from_layer=nn.Linear(5, 3)), lambda: SNNK(4, 3, 4, from_layer=nn.ReLU()),
                lambda: SNNK(4, 3, 4, radius=float("nan")), lambda: URF(4, 4, FourierMeasure.sin(), -1.0),
                lambda: URF(4, 4, FourierMeasure.sin(), 0.0, "even"), lambda: FourierMeasure.gaussian(0.0),
                lambda: FourierMeasure.from_function(lambda z: z * float("nan")), lambda: kernel_error([], x, x),
                lambda: layer.features.psi(torch.randn(3, 5, 1)), lambda: FourierMeasure.from_function(torch.zeros_like),
                lambda: SNNKAdapter(4, 2, bottleneck=0), lambda: merge_linear(layer, nn.Linear(4, 2))):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()
    with pytest.raises(TypeError, match="expected a FourierMeasure"):
        URF(4, 4, torch.sin)


def test_merging_is_exact():
    x = 0.3 * torch.randn(9, 6)
    for features in ("relu", "cos"):
        layer, one, two = SNNK(6, 5, 7, features), nn.Linear(5, 4), nn.Linear(4, 2, bias=False)
        merged = merge_linear(merge_linear(layer, one), two)
        assert (merged(x) - two(one(layer(x)))).abs().max() <= 1e-5
        assert merged.weight.shape[0] == 2


def test_bundling():
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(6, 20), nn.Tanh(), nn.Dropout(), nn.Linear(20, 10), nn.Tanh(), nn.Linear(10, 2)
    )
    with torch.no_grad():
        for layer in (net[1], net[4]):
            layer.weight.mul_(0.5 / layer.weight.norm(dim=1, keepdim=True))
    x = vectors(50, 6, 0.4, dtype=torch.float32)
    state = copy.deepcopy(net.state_dict())
    small = bundle(net.eval(), 9, seed=1)
    assert [type(layer).__name__ for layer in small] == ["Flatten", "ArcCosineFeatures", "ArcCosineFeatures", "Linear"]
    assert sum(p.numel() for p in small.parameters()) == 9 * 2 + 2
    assert small(x).shape == (50, 2)
    assert torch.equal(small(x), bundle(net, 9, seed=1)(x))
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    # One layer: the bundled network estimates the network itself; two of them are the formula of two.
    one = nn.Sequential(net[1], nn.Softplus(), nn.Linear(20, 2))
    wide = bundle(one, 50_000, FourierMeasure.from_function(F.softplus, 1.0), seed=0)
    assert (wide(x) - one(x)).abs().max() < 0.2
    first, second = small[1], small[2]
    A = second.psi(net[4].weight @ first.psi(net[1].weight, net[1].bias), net[4].bias)
    assert torch.allclose(net[6](second(first(x)) @ A.mT), small(x), atol=1e-5)
    layer, last = SNNK(6, 5, 7), nn.Linear(5, 2)
    assert torch.allclose(bundle(nn.Sequential(layer, last), 4)(x), last(layer(x)), atol=1e-5)
    for bad in (nn.Sequential(layer, layer), nn.Sequential(nn.ReLU()), nn.Sequential(nn.Conv1d(2, 2, 1))):
        with pytest.raises(ValueError, match="expected"):
            bundle(bad, 4)


def test_adapters_begin_as_the_identity():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    before = net(x)
    add_adapters(net, lambda name, layer: isinstance(layer, nn.Linear) and name == "0", 5, train=lambda n, m: n == "2")
    assert torch.equal(net(x), before)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["0.adapter.scale", "0.adapter.kernel.weight", "2.weight", "2.bias"]  # fmt: skip
    assert net[0].out_features == 8
    assert sum(p.numel() for p in net[0].adapter.parameters()) == 8 * 5 + 8
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), before)
    narrow = SNNKAdapter(8, 5, bottleneck=3)
    assert sum(p.numel() for p in narrow.parameters()) == 3 * 5 + 3 * 8
    for bad in (lambda: add_adapters(net, lambda n, m: False, 3), lambda: add_adapters(net, lambda n, m: n == "1", 3),
                lambda: add_adapters(net, lambda n, m: n == "2", 3, train=lambda n, m: False)):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected|no module"):
            bad()
    assert net[2].weight.requires_grad, "an error leaves what is trained as it was"


def test_replacing_in_networks_of_torch():
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    x = torch.randn(2, 5, 8)
    replace_ffl(net, lambda name, layer: name.endswith("linear1"), 4)
    kinds = [(type(block.linear1), type(block.activation)) for block in net.layers]
    assert kinds == [(SNNK, nn.Identity)] * 2
    assert not torch.equal(net.layers[0].linear1.features.projection, net.layers[1].linear1.features.projection)
    with torch.no_grad():
        fast = net(x)
    assert torch.allclose(net(x), fast, atol=1e-5)
    plain = replace_ffl(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), lambda name, layer: name == "0", 3)
    assert isinstance(plain[1], nn.Identity)
    with pytest.raises(ValueError, match="expected one activation after 2"):
        replace_ffl(plain, lambda name, layer: name == "2", 3)
    assert isinstance(replace_ffl(plain, lambda name, layer: name == "2", 3, activation=None)[2], SNNK)
    with pytest.raises(ValueError, match="1 cannot be replaced: expected a linear layer, got Identity"):
        replace_ffl(plain, lambda name, layer: name == "1", 3)


@pytest.mark.parametrize("kind", ["bert", "vit", "gpt2"])
def test_replacing_and_adapting_in_transformers(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "bert":
        net = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
        inputs, ffl, ends = {"input_ids": torch.arange(12).view(2, 6)}, "intermediate.dense", "output.dense"
    elif kind == "vit":
        net = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **sizes))
        inputs, ffl, ends = {"pixel_values": torch.randn(2, 1, 8, 8)}, "fc1", "fc2"
    else:
        net = transformers.GPT2Model(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2))
        inputs, ffl, ends = {"input_ids": torch.arange(12).view(2, 6)}, "mlp.c_fc", "c_proj"
    net.eval()
    before = net(**inputs).last_hidden_state
    adapted = add_adapters(copy.deepcopy(net), lambda name, layer: name.endswith(ends), 4)
    assert torch.equal(adapted(**inputs).last_hidden_state, before)
    adapted(**inputs).last_hidden_state.sum().backward()
    assert all((p.grad is not None) == p.requires_grad == (".adapter." in n) for n, p in adapted.named_parameters())
    count = sum(p.numel() for p in net.parameters())
    replace_ffl(net, lambda name, layer: name.endswith(ffl), 4)
    assert sum(isinstance(m, SNNK) for m in net.modules()) == 2
    assert sum(p.numel() for p in net.parameters()) < count
    assert net(**inputs).last_hidden_state.isfinite().all()


# Closed form


@parametrize_with_checks(
    [BundledClassifier((32,), random_state=0), BundledRegressor((32,), random_state=0), BundledClassifier((64, 16), alpha=1e-3, random_state=0)]
)  # fmt: skip
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize(("rows", "columns"), [(60, 20), (20, 60)])
@pytest.mark.parametrize("alpha", [1e-5, 1.0])
def test_the_gradient_at_the_solution_is_zero(rows, columns, alpha):
    Z, Y = vectors(rows, columns), vectors(rows, 3, seed=1)
    A, a = (t.requires_grad_() for t in ridge_solution(Z, Y, alpha))
    loss = (Z @ A.mT + a - Y).square().sum() + alpha * A.square().sum()
    for grad in torch.autograd.grad(loss, (A, a)):
        assert grad.norm() <= 1e-8 * (Z.mT @ Y).norm()
    least = ridge_solution(Z, Y)[0]
    assert torch.allclose(least, ridge_solution(Z, Y, 1e-12)[0], atol=1e-6)
    with pytest.raises(ValueError, match="expected"):
        ridge_solution(Z, Y[1:])


def test_digits_without_backpropagation():
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, random_state=0)
    for hidden, least in (((512,), 0.96), ((512, 512), 0.95)):
        model = BundledClassifier(hidden, random_state=0).fit(X, y)
        assert model.score(X_test, y_test) >= least
    module = model.to_module(torch.float64)
    assert (module(torch.from_numpy(X_test)).argmax(1).numpy() == model.predict(X_test)).all()
    assert (BundledClassifier((64,), random_state=0).fit(10 * X, y).predict(10 * X) == BundledClassifier((64,), random_state=0).fit(X, y).predict(X)).mean() > 0.999  # fmt: skip


def test_regression_with_one_input_and_several_targets():
    x = np.linspace(-1, 1, 80)[:, None]
    model = BundledRegressor((100,), FourierMeasure.gaussian(0.3), random_state=0).fit(x, np.sin(5 * x[:, 0]))
    assert model.score(x, np.sin(5 * x[:, 0])) > 0.999
    X, y = load_diabetes(return_X_y=True)
    both = BundledRegressor((32,), alpha=1e-2, random_state=0).fit(X, np.c_[y, -y])
    assert both.predict(X).shape == (442, 2)
    assert both.coef_.shape == (2, 32)
    for bad in ({"hidden": ()}, {"hidden": (0,)}, {"alpha": -1.0}, {"features": "tanh"}):
        with pytest.raises(ValueError, match="expected"):
            BundledRegressor(**bad).fit(X, y)


def test_what_cannot_be_meant_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"FourierMeasure\.from_function"):
        SNNK(4, 3, 8, torch.tanh)
    with pytest.raises(TypeError, match="sizes such as"):
        BundledRegressor(hidden=32).fit(np.eye(4), np.arange(4.0))  # pyright: ignore[reportArgumentType]
    for net in (nn.Sequential(nn.Dropout()), nn.Sequential(nn.Flatten())):
        with pytest.raises(ValueError, match="with linear layers"):
            bundle(net, 8)
