"""Hierarchical polynomials against Monte Carlo, descent in closed form against the loop, and scikit-learn's conventions."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

from torchfolio.theory.hierarchical_polynomials import (
    HierarchicalPolynomial,
    LayerwiseThreeLayerRegressor,
    RandomFeatureRidge,
    SpectralDescent,
    ThreeLayerNetwork,
    TunedKernelRidge,
    feature_recovery,
    gradient_descent,
    hermite,
    sample_complexity,
)
from torchfolio.theory.lazy_regression import random_features, ridge


def small(**options) -> LayerwiseThreeLayerRegressor:
    return LayerwiseThreeLayerRegressor(20, 40, random_state=0, **options)


@parametrize_with_checks([small(), RandomFeatureRidge(40, random_state=0), TunedKernelRidge(2)])
def test_follows_scikit_learn(estimator, check):
    check(estimator)


# The target


def test_hermite_polynomials_are_orthonormal():
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    values = hermite(torch.tensor(nodes), 6)
    gram = values.T @ (torch.tensor(weights / weights.sum())[:, None] * values)
    torch.testing.assert_close(gram, torch.eye(7).double(), atol=1e-10, rtol=0)
    # he_2² = 1 + 2√2 he_2 + √6 he_4
    expected = 1 + 2 * math.sqrt(2) * values[:, 2] + math.sqrt(6) * values[:, 4]
    torch.testing.assert_close(values[:, 2].square(), expected)


@pytest.mark.parametrize(
    ("family", "k"), [("sum_of_hermite", 2), ("sum_of_hermite", 3), ("sum_of_monomials", 2), ("sum_of_monomials", 3)]
)
@pytest.mark.parametrize("rotate", [True, False])
def test_hidden_polynomial_is_normalised(family, k, rotate):
    target = HierarchicalPolynomial(12, k=k, family=family, rotate=rotate, seed=2)
    x, y = target.sample(60_000)
    torch.testing.assert_close(target.axes @ target.axes.T, torch.eye(12).double())
    p = target.p(x)
    assert abs(float(p.mean())) < 0.01
    assert abs(float(p.var()) - 1) < 0.06
    torch.testing.assert_close(y, target.g(p))
    gram = target.features(x).T @ target.features(x) / len(x)
    assert float((gram - torch.eye(target.L)).abs().max()) < 0.4  # features of degree 3 have heavy tails
    if k == 2 and family == "sum_of_hermite":
        assert abs(float(p.pow(4).mean()) - 3 - 12 / target.L) < 0.5


def test_rotations_turn_the_target():
    turned = HierarchicalPolynomial(6, seed=5)
    plain = HierarchicalPolynomial(6, rotate=False)
    given = HierarchicalPolynomial(6, rotate=turned.axes)
    x, _ = turned.sample(50)
    torch.testing.assert_close(turned(x), plain(x @ turned.axes.T))
    torch.testing.assert_close(turned(x), given(x))


def test_projection_of_a_sum_of_hermite_polynomials():
    target = HierarchicalPolynomial(8, seed=1)
    x, h = target.sample(200_000)
    outer = (x.T @ (h[:, None] * x) / len(x) - h.mean() * torch.eye(8)) / math.sqrt(2)
    exact = target.axes.T @ torch.diag(target.coefficients()) @ target.axes
    assert float((outer - exact).abs().max()) < 0.03
    g1, g2, L = *target.link[1:].tolist(), target.L
    formula = g1 * target.p(x) + g2 / math.sqrt(2) * 2 * math.sqrt(2) / L * target.features(x).sum(1)
    torch.testing.assert_close(target.projection_degree_k(x), formula)


@pytest.mark.parametrize(
    ("family", "k", "d"),
    [
        ("sum_of_monomials", 2, 8),
        ("sum_of_monomials", 3, 9),
        ("sum_of_hermite", 4, 6),
        ("sum_of_hermite", 3, 6),
        ("sum_of_monomials", 4, 8),
    ],
)
def test_projection_is_what_is_left_of_degree_k(family, k, d):
    target = HierarchicalPolynomial(d, k=k, family=family, rotate=False)
    x, h = target.sample(200_000)
    part = target.projection_degree_k(x)
    limit = float(torch.corrcoef(torch.stack([part, target.p(x)]))[0, 1])
    assert abs(limit - target.recovery_limit()) < 0.08
    # E[h he] = E[P_k h he] along the terms of p and, for monomials, along the others of degree k.
    probes = [target.features(x)[:, j] for j in range(2)]
    if family == "sum_of_monomials" and k % 2 == 0:
        probes.append(hermite(x[:, 0], 2)[:, 2] * (hermite(x[:, 1], 2)[:, 2] if k == 4 else 1))
    for probe in probes:
        assert abs(float((h * probe).mean() - (part * probe).mean())) < 0.15


def test_recovery_limit():
    assert HierarchicalPolynomial(24).recovery_limit() == pytest.approx(math.sqrt(0.6 / (0.6 + 1.6 / 24)))
    assert round(HierarchicalPolynomial(24).recovery_limit(), 3) == 0.949
    assert HierarchicalPolynomial(24, k=3).recovery_limit() == pytest.approx(1)
    single = HierarchicalPolynomial(9, k=1, link=(0, 0.8, 0, 0.6), L=1)
    assert single.recovery_limit() == pytest.approx(1)


# Descent in closed form


def regression(n: int, m: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n + m)
    x = torch.randn(n, m, generator=generator, dtype=torch.float64) @ torch.diag(0.9 ** torch.arange(m).double())
    return x, torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(60, 20), (20, 60)])
@pytest.mark.parametrize("decay", [0.0, 1e-3, 0.5])
def test_closed_form_is_the_loop(shape, decay):
    features, y = regression(*shape)
    spectrum = SpectralDescent(features, y)
    for steps in (1, 10, 500):
        loop = gradient_descent(features, y, decay, steps)
        torch.testing.assert_close(spectrum.weights(decay, steps), loop, atol=1e-8, rtol=0)
    assert float(spectrum.weights(decay, 0).abs().max()) == 0
    if decay:
        n, m = shape
        exact = torch.linalg.solve(features.T @ features / n + decay * torch.eye(m).double(), features.T @ y / n)
        for found in (spectrum.weights(decay), ridge(features, y, decay), spectrum.weights(decay, 10**7)):
            torch.testing.assert_close(found, exact, atol=1e-8, rtol=0)
    many = spectrum.weights(torch.tensor([0.0, 1e-3, 0.5]).double(), 10)
    torch.testing.assert_close(many[:, 1], spectrum.weights(1e-3, 10))


def test_random_features_see_a_standard_normal():
    V, s = random_features(30, 4000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(V.norm(dim=1), torch.full((4000,), math.sqrt(0.5)).double())
    z = torch.randn(1, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(float((z * math.sqrt(30) / z.norm() @ V.T + s).var()) - 1) < 0.06


def test_kernel_ridge_is_scikit_learns():
    target = HierarchicalPolynomial(6)
    X, y = (part.numpy() for part in target.sample(200))
    ours = TunedKernelRidge(4, decays=(1e-3,)).fit(X, y)
    gram = (1 + X @ X.T / 6) ** 4
    alpha = 1e-3 * gram.diagonal().mean() * len(X)
    peer = KernelRidge(kernel="poly", degree=4, gamma=1 / 6, coef0=1, alpha=alpha).fit(X, y - y.mean())
    assert np.abs(ours.predict(X) - peer.predict(X) - y.mean()).max() < 1e-3


# The estimator


@pytest.mark.parametrize(
    "options", [{}, {"decay1": 0.01, "decay2": 0.1}, {"split": None}, {"skip": False}, {"inner": "quadratic"}]
)
def test_loop_and_closed_form_train_the_same_network(options):
    X, y = (part.numpy() for part in HierarchicalPolynomial(5).sample(160))
    for steps in (1, 10, 500):
        both = [small(solver=solver, steps1=steps, steps2=steps, **options).fit(X, y) for solver in ("gd", "spectral")]
        assert np.abs(both[0].predict(X) - both[1].predict(X)).max() < 1e-8
    loop = small(solver="gd", decay1=0.05, decay2=0.05, **{k: v for k, v in options.items() if "decay" not in k}).fit(
        X, y
    )
    assert loop.score(X, y) > 0


def test_network_is_a_plain_module(tmp_path):
    X, y = (part.numpy() for part in HierarchicalPolynomial(5).sample(300))
    model = small().fit(X, y)
    x = torch.tensor(X)
    assert np.array_equal(model.module_(x).numpy(), model.predict(X))
    net = model.module_
    f = net.bottleneck(torch.nn.functional.softplus(net.inner(x)))
    by_hand = f[:, 0] + (torch.relu(net.outer(f)) @ net.readout.weight.T + net.readout.bias)[:, 0]
    torch.testing.assert_close(net(x), by_hand)
    assert np.allclose(f[:, 0].numpy(), model.feature_(X))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    twin = ThreeLayerNetwork(5, 20, 40).double()
    twin.load_state_dict(torch.load(tmp_path / "net.pt"))
    for copied in (twin, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(copied(x), net(x))
    assert sum(p.numel() for p in net.parameters()) == 5 * 40 + 40 + 40 + 1 + 20 + 20 + 20 + 1
    assert copy.deepcopy(net).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    state = torch.get_rng_state()
    assert np.array_equal(small().fit(X, y).predict(X), model.predict(X))
    assert torch.equal(torch.get_rng_state(), state)


def test_units_of_the_target_do_not_matter():
    X, y = (part.numpy() for part in HierarchicalPolynomial(5).sample(300))
    plain, scaled = small().fit(X, y).predict(X), small().fit(X, 50 * y - 7).predict(X)
    np.testing.assert_allclose(scaled, 50 * plain - 7, rtol=1e-6, atol=1e-6)


def test_learns_single_index_models_and_reports_the_feature():
    target = HierarchicalPolynomial(12, k=1, link=(0, math.sqrt(0.6), 0, math.sqrt(0.4)), L=1)
    X, y = target.sample(1200)
    model = LayerwiseThreeLayerRegressor(100, 200, random_state=0).fit(X.numpy(), y.numpy())
    X_test, y_test = target.sample(1000, seed=1)
    recovery = feature_recovery(model, target, X_test)
    assert recovery.correlation > 0.95
    assert model.score(X_test.numpy(), y_test.numpy()) > 0.8
    flipped = HierarchicalPolynomial(12, k=1, link=(0, -0.8, 0, 0.6), L=1)
    X, y = flipped.sample(1200)
    model.fit(X.numpy(), y.numpy())
    assert feature_recovery(model, flipped, X).correlation > 0.9
    rows = sample_complexity(
        [4, 6],
        [100],
        HierarchicalPolynomial,
        {"net": lambda d, n: small(), "kernel": lambda d, n: TunedKernelRidge(2)},
        n_test=200,
    )
    assert [(row["d"], row["model"]) for row in rows] == [(4, "net"), (4, "kernel"), (6, "net"), (6, "kernel")]
    assert rows[0]["n/d^k"] == 100 / 16
    assert rows[0]["n/d^kq"] == 100 / 4**4
    assert math.isnan(rows[1]["corr"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HierarchicalPolynomial(4, k=0), "k"),
        (lambda: HierarchicalPolynomial(4, L=5), "at most 4 terms"),
        (lambda: HierarchicalPolynomial(5, k=3, family="sum_of_monomials", L=2), "at most 1 terms"),
        (lambda: HierarchicalPolynomial(2, k=3, family="sum_of_monomials"), "terms|room|at least"),
        (lambda: HierarchicalPolynomial(4, signs=(1, 1, 1, 2)), "squares sum to 4"),
        (lambda: HierarchicalPolynomial(4, link=(0, float("nan"))), "finite"),
        (lambda: HierarchicalPolynomial(4, rotate=torch.ones(4, 4)), "orthonormal"),
        (lambda: HierarchicalPolynomial(4).p(torch.ones(3, 5)), r"inputs \[n, 4\]"),
        (lambda: HierarchicalPolynomial(4, link=(0, 1, 0, 1)).coefficients(), "degree at most 2"),
        (lambda: SpectralDescent(torch.ones(3, 2), torch.ones(4)), "features"),
        (lambda: SpectralDescent(torch.ones(3, 2), torch.ones(3)).weights(-1.0), "decay"),
        (lambda: small(solver="newton").fit(np.ones((9, 2)), np.ones(9)), "solver"),
        (lambda: small().fit(np.full((9, 2), np.nan), np.ones(9)), "NaN"),
        (lambda: small().fit(np.ones((3, 2)), np.ones(3)), "minimum of 8"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_link_without_a_linear_part_is_warned_of():
    with pytest.warns(UserWarning, match="no linear part"):
        HierarchicalPolynomial(4, link=(0, 0, 1))
