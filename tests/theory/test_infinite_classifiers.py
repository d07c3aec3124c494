import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from torchfolio.theory.infinite_classifiers import (
    DualActivation,
    HermiteActivation,
    InfiniteNetworkClassifier,
    KoenigsTable,
    OptimalActivation,
    classify_activation,
    dual_activation,
    finite_network,
    intrinsic_dimension,
    ntk,
)
from torchfolio.theory.infinite_kernels import empirical_ntk

SECOND = HermiteActivation([0, 0, 1])


def sphere(n=60, features=3, classes=2, seed=0):
    generator = np.random.default_rng(seed)
    X = np.abs(generator.normal(size=(n, features)))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X, (X.argmax(1) + (generator.random(n) < 0.2)) % classes


# The taxonomy


@pytest.mark.parametrize("dim", range(1, 11))
def test_optimal_activations(dim):
    module = OptimalActivation(dim)
    report = classify_activation(module)
    assert report.kind == "singular kernel"
    assert report.optimal_dim == pytest.approx(dim, abs=1e-10)
    z, w = np.polynomial.hermite_e.hermegauss(30)
    assert (module(torch.from_numpy(z)) ** 2).numpy() @ w / math.sqrt(2 * math.pi) == pytest.approx(1, abs=1e-12)
    # Without its closed form the exponent is the same.
    assert classify_activation(module.forward).alpha == pytest.approx(dim, abs=1e-8)
    xi = torch.linspace(-1, 1, 9, dtype=torch.float64)
    square = 2 ** (-dim / 2)
    published = (xi + xi**7) / 2 if dim == 1 else square * (xi + xi**3) + (1 - 2 * square) * xi**2
    assert torch.allclose(module.dual(xi), published, atol=1e-14)


def test_every_kind_of_activation():
    for activation, kind, alpha in [
        ("relu", "majority vote", math.nan),
        (nn.GELU(), "majority vote", math.nan),
        (lambda z: z * z, "majority vote", math.nan),
        (lambda z: z * z - 1, "nearest neighbor", math.inf),
        (lambda z: torch.cos(z) - math.exp(-0.5), "nearest neighbor", math.inf),
        ("erf", "singular kernel", -2 * math.log(2 / 3 / math.asin(2 / 3)) / math.log(2 / 5**0.5 / math.asin(2 / 3))),
        (torch.sin, "singular kernel", -2 * math.log(1 / math.sinh(1)) / math.log(1 / math.tanh(1))),
        (lambda z: torch.sin(2.676**0.5 * z), "singular kernel", 2.0),
        (lambda z: torch.sin(6.13539**0.5 * z), "singular kernel", 4.0),
        (lambda z: torch.sin(13.8258**0.5 * z), "singular kernel", 8.0),
        (DualActivation([0, 0.9**0.5, *[0] * 9, 0.1**0.5]), "singular kernel", 0.304),
    ]:
        report = classify_activation(activation)
        assert report.kind == kind
        assert report.alpha == pytest.approx(alpha, rel=1e-3, nan_ok=True)
        assert report.optimal_dim == pytest.approx(report.alpha, nan_ok=True)
    for linear in (nn.Identity(), lambda z: 3 * z):
        with pytest.raises(ValueError, match="not linear"):
            classify_activation(linear)
    relu = classify_activation(nn.ReLU())
    assert (relu.A, relu.A_prime, relu.B_prime) == pytest.approx((math.pi**-0.5, 0.5**0.5, 1))


def test_series_equals_monte_carlo():
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(2, 1_000_000, generator=generator, dtype=torch.float64)
    for activation in (OptimalActivation(4), nn.Tanh(), nn.GELU()):
        dual = dual_activation(activation)
        for xi in (0.3, 0.8):
            v = xi * u + math.sqrt(1 - xi * xi) * w
            estimate = (dual.function(u) * dual.function(v)).mean() / dual.second_moment
            assert float(estimate) == pytest.approx(float(dual(torch.tensor(xi, dtype=torch.float64))), abs=0.03)


# Activations and finite networks


def test_activations_are_modules():
    module = OptimalActivation(3)
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, z)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(z), module(z))
    assert module(z.bfloat16()).dtype == torch.bfloat16
    assert module.state_dict() == {}
    assert "0.5946" in repr(module)
    with pytest.raises(ValueError, match="dim to be a whole number of at least 1"):
        OptimalActivation(0)
    with pytest.raises(TypeError, match="whole number"):
        OptimalActivation(2.5)


@pytest.mark.parametrize(("activation", "width", "nets"), [(nn.ReLU(), 1024, 8), ("sine", 512, 20)])
def test_finite_network_has_the_tangent_kernel(activation, width, nets):
    torch.manual_seed(0)
    x = torch.from_numpy(sphere(4, 3)[0]).float()
    finite = torch.stack([empirical_ntk(finite_network(3, width, 2, activation), x) for _ in range(nets)]).mean(0)
    exact = ntk(x.double(), None, activation, 2, normalized=True)
    assert ((finite - exact) / torch.outer(exact.diag(), exact.diag()).sqrt()).abs().max() < 0.05
    network = finite_network(3, 8, 2, nn.PReLU(), outputs=2)
    assert network(x).shape == (4, 2)
    assert network[1] is not network[3]
    with pytest.raises(ValueError, match="depth"):
        finite_network(3, 8, 0, "relu")


# The classifier


@parametrize_with_checks(
    [InfiniteNetworkClassifier(), InfiniteNetworkClassifier("erf", depth=3, ridge=1e-6)],
    expected_failed_checks=lambda _: {"check_estimators_dtypes": "has rows of zeros, which have no direction"},
)
@pytest.mark.filterwarnings("ignore:inner products")
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


@pytest.mark.parametrize("classes", [2, 3])
def test_infinite_depth_is_the_limit_of_depth(classes):
    X, y = sphere(40, 3, classes)
    X_test, _ = sphere(100, 3, classes, seed=1)
    limit = InfiniteNetworkClassifier().fit(X, y)
    # The NNGP comes near the limit geometrically, the tangent kernel as 1 / depth.
    for kernel, depth in (("nngp", 60), ("ntk", 450)):
        deep = InfiniteNetworkClassifier(depth=depth, kernel=kernel).fit(X, y)
        assert (deep.predict(X_test) == limit.predict(X_test)).mean() >= 0.98
        assert deep.kind_ == limit.kind_ == "singular kernel"
    assert limit.alpha_ == pytest.approx(2)
    # The off-diagonal tangent kernel tends to the Koenigs function as 1 / depth.
    xi = torch.tensor([0.1, 0.5, 0.7], dtype=torch.float64)
    points = torch.stack([xi, (1 - xi * xi).sqrt()], 1)
    for depth in (50, 400):
        kernel = ntk(points, torch.tensor([[1.0, 0.0]]), limit.dual_, depth, normalized=True)[:, 0]
        ratio = kernel / (depth + 1) / limit.dual_.slope ** (2 * depth)
        assert torch.allclose(ratio, limit.dual_.koenigs(xi), rtol=4 / depth)


def test_optimal_vote_is_koenigs_weighted():
    X, y = sphere()
    X_test, _ = sphere(20, seed=1)
    model = InfiniteNetworkClassifier("erf").fit(X, y)
    weight = model.dual_.koenigs(torch.from_numpy(X_test @ X.T)).numpy()
    expected = (weight @ (2 * y - 1)) / weight.sum(1)
    assert np.allclose(model.decision_function(X_test), expected, atol=1e-9)
    assert np.array_equal(model.predict(X_test), (expected > 0).astype(int))


def test_training_points_and_duplicates_return_their_label():
    X, y = sphere()
    X = np.concatenate([X, X[:2], X[:1]])
    y = np.concatenate([y, 1 - y[:2], y[:1]])
    for activation in ("optimal", SECOND):
        model = InfiniteNetworkClassifier(activation).fit(X, y)
        assert np.array_equal(model.predict(X[2:60]), y[2:60])
        assert model.predict(X[:1]) == y[0]  # two of three
        assert model.decision_function(X[1:2]) == 0
        assert model.predict(X[1:2]) == np.bincount(y).argmax()  # a tie goes to the larger class
    near = X[5:6] + np.array([[1e-9, 0, 0]])
    assert InfiniteNetworkClassifier(OptimalActivation(30)).fit(X, y).predict(near) == y[5]


def test_nearest_neighbor_and_majority():
    X, y = sphere(101, 4, 3)
    X_test, _ = sphere(200, 4, seed=1)
    assert np.array_equal(
        InfiniteNetworkClassifier(SECOND).fit(X, y).predict(X_test), KNeighborsClassifier(1).fit(X, y).predict(X_test)
    )
    majority = InfiniteNetworkClassifier("relu").fit(X, y)
    assert (majority.predict(X_test) == np.bincount(y).argmax()).all()
    with pytest.warns(UserWarning, match="tied between the classes 0, 1"):
        InfiniteNetworkClassifier("relu").fit(X[:2], [0, 1])
    with pytest.warns(UserWarning, match="inner products down to"):
        InfiniteNetworkClassifier(SECOND).fit(X, y).predict(-X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        InfiniteNetworkClassifier().fit(X, y).predict(-X)


@pytest.mark.parametrize("activation", ["erf", OptimalActivation(1), OptimalActivation(4), OptimalActivation(9)])
def test_table_of_the_koenigs_function(activation):
    dual = dual_activation(activation)
    generator = torch.Generator().manual_seed(0)
    eta = torch.rand(20_000, generator=generator, dtype=torch.float64)
    eta = torch.cat([2 * eta, 10 ** (-30 * eta), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)])
    exact, table = dual.koenigs(eta=eta), KoenigsTable(dual)(eta)
    same = torch.isinf(exact) & (exact == table)
    assert ((table - exact).abs() <= 1e-8 * exact.abs().clamp_min(1))[~same].all()
    assert torch.isinf(table[-3])


def test_many_points_by_table_and_tiles(monkeypatch):
    X, y = sphere(300)
    X_test, _ = sphere(200, seed=1)
    model = InfiniteNetworkClassifier().fit(X, y)
    exact = model.decision_function(X_test)
    monkeypatch.setattr("torchfolio.theory.infinite_classifiers.TABULATED", 1)
    monkeypatch.setattr("torchfolio.theory.infinite_classifiers.TILE", 1000)
    assert np.allclose(model.decision_function(X_test), exact, atol=1e-8)
    assert np.allclose(model.decision_function(X_test[:1]), exact[:1], atol=1e-8)


def test_dimensions_and_pickle():
    X, y = load_iris(return_X_y=True)
    model = InfiniteNetworkClassifier(intrinsic_dim="estimate").fit(X, y)
    assert model.score(X, y) == 1
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(X + 0.1), model.predict(X + 0.1))
    assert InfiniteNetworkClassifier().fit(X, y).intrinsic_dim_ == 3
    assert InfiniteNetworkClassifier(intrinsic_dim=2).fit(X, y).alpha_ == pytest.approx(2)
    assert InfiniteNetworkClassifier("tanh").fit(X, y).intrinsic_dim_ is None
    generator = np.random.default_rng(0)
    plane = generator.normal(size=(500, 2)) @ generator.normal(size=(2, 7))
    assert intrinsic_dimension(plane) == pytest.approx(2, abs=0.3)
    scaled = InfiniteNetworkClassifier().fit(1e-200 * X, y)
    assert np.array_equal(scaled.predict(1e200 * X[:5]), y[:5])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "rbf"}, "kernel to be 'ntk' or 'nngp'"),
        ({"depth": 0}, "depth to be a whole number"),
        ({"depth": math.nan}, "depth to be a whole number"),
        ({"intrinsic_dim": "guess"}, "intrinsic_dim to be"),
        ({"intrinsic_dim": 0}, "intrinsic_dim to be"),
        ({"ridge": -1.0}, "ridge of at least 0"),
        ({"activation": "linear2"}, "expected an activation of"),
        ({"activation": "identity"}, "not linear at infinite depth"),
        ({"activation": OptimalActivation(2), "depth": 2000}, "leaves the range of float64"),
        ({"activation": "relu", "depth": 2}, "not positive definite"),
    ],
)
def test_settings_are_refused(settings, message):
    X, y = sphere()
    X = np.concatenate([X, X[:1]])
    y = np.concatenate([y, y[:1]])
    with pytest.raises((ValueError, TypeError), match=message):
        InfiniteNetworkClassifier(**settings).fit(X, y)


def test_points_are_refused():
    X, y = sphere()
    with pytest.raises(ValueError, match="1 of zeros alone"):
        InfiniteNetworkClassifier().fit(np.concatenate([X[:-1], np.zeros((1, 3))]), y)
    with pytest.raises(ValueError, match="norm 1 with normalize=False"):
        InfiniteNetworkClassifier(normalize=False).fit(2 * X, y)
    model = InfiniteNetworkClassifier(normalize=False).fit(X, y)
    assert np.array_equal(model.predict(X), y)
    with pytest.raises(ValueError, match="NaN"):
        model.predict(np.full((1, 3), math.nan))
    with pytest.raises(ValueError, match="three different points"):
        InfiniteNetworkClassifier(intrinsic_dim="estimate").fit(X[:2], y[:2])
