"""Double descent: closed forms against loops and the pseudo-inverse, null space, peaks, sweeps of any model, the estimator."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from torchfolio.insight.double_descent import (
    Decomposition,
    RandomFeatureRegressor,
    RandomFeatures,
    SweepResult,
    capacity_sweep,
    compare,
    gradient_descent_path,
    peak,
    plot_comparison,
    sgd_rate,
    train_nested,
)

INF = math.inf


def problem(n: int = 25, p: int = 40, k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((n, p), (n, k), (p, k)))  # pyright: ignore


def looped(Z, Y, steps, lr, momentum, init, l2) -> Tensor:
    weight, velocity = init.clone(), torch.zeros_like(init)
    for _ in range(steps):
        velocity = momentum * velocity - lr * (Z.T @ (Z @ weight - Y) / len(Z) + l2 * weight)
        weight = weight + velocity
    return weight


@pytest.mark.parametrize("shape", [(25, 40), (40, 25), (30, 30)])
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("l2", [0.0, 0.05])
@pytest.mark.parametrize("share", [0.3, 1.0, 1.9])
def test_closed_form_is_the_loop(shape, momentum, l2, share):
    Z, Y, init = problem(*shape)
    lr = share * Decomposition(Z, Y).limit(0.0, l2) / 2
    path = gradient_descent_path(Z, Y, [1, 7, 500], lr, momentum, init, l2)
    for k, steps in enumerate((1, 7, 500)):
        weight = looped(Z, Y, steps, lr, momentum, init, l2)
        assert float((path.weights()[k] - weight).norm() / weight.norm()) <= 1e-9
        torch.testing.assert_close(path.predict(Z)[k], Z @ weight, rtol=1e-9, atol=1e-9)
        assert float(path.train_loss[k]) == pytest.approx(float((Z @ weight - Y).square().mean()), rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("shape", [(25, 40), (40, 25), (30, 30)])
def test_limits(shape):
    Z, Y, init = problem(*shape)
    torch.testing.assert_close(gradient_descent_path(Z, Y).weights(INF), torch.linalg.pinv(Z) @ Y, rtol=0, atol=1e-8)
    for momentum in (0.0, 0.9):
        ridge = torch.linalg.solve(Z.T @ Z + 0.1 * len(Z) * torch.eye(Z.shape[1]), Z.T @ Y)
        path = gradient_descent_path(Z, Y, INF, init=init, l2=0.1, momentum=momentum)
        torch.testing.assert_close(path.weights(INF), ridge, rtol=1e-9, atol=1e-9)
    assert float(gradient_descent_path(torch.ones(4, 2), torch.arange(4.0)).train_loss) == pytest.approx(1.25)


def test_a_million_steps_on_tiny_singular_values():
    sigma = torch.tensor([1.0, 1e-4, 1e-7], dtype=torch.float64)
    Z, Y = torch.diag(sigma), torch.ones(3, 1, dtype=torch.float64)
    # 1 - (1 - x)^t by a series where x t is small: x t - t (t - 1) / 2 x^2.
    for momentum in (0.0, 0.9):
        path = gradient_descent_path(Z, Y, 10**6, lr=1.0, momentum=momentum)
        x = 1e-14 / 3
        effective = (1e6 - (0.9 * (1 - 0.9**1e6) / 0.1 if momentum else 0)) / (1 - momentum)
        expected = (effective * x - (effective * x) ** 2 / 2) / 1e-7
        assert float(path.weights(10**6)[2]) == pytest.approx(expected, rel=1e-7)


def test_rank_deficient_features():
    Z, Y, _ = problem(20, 10)
    Z[:, 9] = Z[:, 8]
    path = gradient_descent_path(Z, Y, [100, INF])
    assert path.condition_number == INF
    torch.testing.assert_close(path.weights(INF), torch.linalg.pinv(Z) @ Y, rtol=0, atol=1e-8)
    assert bool(torch.isfinite(path.train_loss).all())


def test_null_space_identity():
    Z, Y, _ = problem(20, 50, 2)
    omega, generator = 0.7, torch.Generator().manual_seed(1)
    point = torch.randn(1, 50, generator=generator, dtype=torch.float64)
    taken_apart = Decomposition(Z, Y)
    projection = torch.linalg.pinv(Z) @ Z
    expected = omega**2 / 50 * 2 * float((point - point @ projection).square().sum())
    base = taken_apart.path(INF).predict(point)[0]
    energies = []
    for _ in range(2000):
        init = omega / 50**0.5 * torch.randn(50, 2, generator=generator, dtype=torch.float64)
        energies.append(float((taken_apart.path(INF, init=init).predict(point)[0] - base).square().sum()))
    assert abs(np.mean(energies) - expected) < 4 * np.std(energies) / 2000**0.5


def test_one_decomposition_serves_all_settings():
    Z, Y, _ = problem()
    taken_apart = Decomposition(Z, Y)
    points = taken_apart.project(Z[:5])
    a = taken_apart.path([10, 100], lr=0.1, momentum=0.5).predict(points)
    b = gradient_descent_path(Z, Y, [10, 100], lr=0.1, momentum=0.5).predict(Z[:5])
    torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    single = gradient_descent_path(Z.float(), Y.float())
    assert single.weights(3).dtype == torch.float64


def test_peak():
    assert peak([1, 2, 3, 4], [4, 3, 2, 1]) == (1.0, None, None)
    assert peak([1, 2, 3, 4], [1, 2, 3, 4]).height == 1.0
    assert peak([1, 2, 3], [2, 1, 2]).height == 1.0
    # The largest height, not the largest loss.
    assert peak([1, 2, 3, 4, 5], [9, 8, 1, 3, 2]) == (1.5, 4.0, 3)
    assert peak([10, 20, 30], torch.tensor([1.0, 5.0, 2.0])) == (2.5, 20.0, 1)


@pytest.mark.parametrize(("batch_size", "optimizer"), [(None, "sgd"), (5, "sgd"), (5, "adam")])
def test_nested_training_is_training_of_each(batch_size, optimizer):
    Z, Y, _ = problem(20, 12)
    sizes = [3, 7, 12]
    if optimizer == "sgd":
        rates, make = [sgd_rate(Z[:, :p], batch_size or 20) for p in sizes], partial(torch.optim.SGD, lr=1.0)
    else:
        rates, make = None, partial(torch.optim.Adam, lr=0.01)
    own = {"epochs": 4, "batch_size": batch_size}
    together = train_nested(Z, Y, sizes, make, rates=rates, generator=torch.Generator().manual_seed(3), **own)
    for k, p in enumerate(sizes):
        g = torch.Generator().manual_seed(3)
        torch.randn(12, 1, 3, generator=g)  # the draw of initial weights, which is as wide as all of them
        weight = nn.Parameter(torch.zeros(p, 3, dtype=torch.float64))
        steps = torch.optim.SGD([weight], lr=rates[k]) if rates else make([weight])
        for _ in range(4):
            order = torch.randperm(20, generator=g) if batch_size else torch.arange(20)
            for rows in order.split(batch_size or 20):
                steps.zero_grad()
                ((Z[rows, :p] @ weight - Y[rows]).square().sum() / (2 * len(rows))).backward()
                steps.step()
        torch.testing.assert_close(together[k, :p], weight.detach(), rtol=1e-9, atol=1e-12)
        assert not together[k, p:].any()
    if batch_size is None:
        path = gradient_descent_path(Z, Y, 4)
        torch.testing.assert_close(together[2], path.weights(4), rtol=1e-9, atol=1e-12)


def test_random_features():
    g = torch.Generator().manual_seed(0)
    features = RandomFeatures(64, 300, scale=2.0, generator=g)
    assert float(features.weight.var()) == pytest.approx(1 / 64, rel=0.05)
    x = torch.randn(5, 64)
    torch.testing.assert_close(features.first(17)(x), features(x)[:, :17])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(features)))
    twin.load_state_dict(features.state_dict())
    assert torch.equal(twin(x), torch.tanh(2 * x @ features.weight))
    assert features.double()(x.double()).dtype == torch.float64
    assert "out_features=300" in repr(features)


def sweep(capacities=(2, 4, 8), train=None, test=None, **kwargs) -> SweepResult:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 5, generator=g), torch.randint(3, (30,), generator=g)

    def build(width, generator):
        model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Dropout(0.1), nn.Linear(width, 3))
        nn.init.normal_(model[0].weight, generator=generator)  # pyright: ignore
        return model

    def fit(model, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(data[0]), nn.functional.one_hot(data[1], 3).float())
            loss.backward()
            optimizer.step()
        return loss.item()

    return capacity_sweep(build, capacities, fit, train or (x, y), test or (x, y), **kwargs)


def test_sweep_of_any_model():
    state = torch.get_rng_state()
    result = sweep(metrics={"largest": lambda output, y: float(output.max())})
    assert torch.equal(state, torch.get_rng_state())
    columns = ["capacity", "n_parameters", "train_loss", "test_loss", "test_error", "largest", "condition_number"]
    assert list(result.to_frame().columns) == columns
    assert list(result.frame.n_parameters) == [25, 47, 91]
    pd.testing.assert_frame_equal(result.frame, sweep(metrics={"largest": lambda output, y: float(output.max())}).frame)
    assert result.peak("test_error").height >= 1
    result.plot()
    table = compare({"a": result, "b": sweep(seed=1)}, threshold=4)
    assert list(table.index) == ["a", "b"]
    assert table.train_loss["a"] == result.frame.train_loss[1]
    plot_comparison(table)


def test_sweep_of_regression():
    x = torch.randn(20, 2)
    data = (x, x[:, :1])

    def fit(model, train):
        return 0.5

    result = capacity_sweep(lambda width, generator: nn.Linear(2, 1), [1, 2, 3], fit, data, data)
    assert result.frame.test_error.isna().all()
    assert result.at(2.2) == 0.5


@parametrize_with_checks([RandomFeatureRegressor(30, solver=solver, n_steps=50) for solver in ("lstsq", "adam")])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


def test_estimator():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(60, 4)) * [1, 10, 100, 0.1]
    y = np.column_stack([np.sin(X[:, 0]), X[:, 3]]) + 50
    closed = RandomFeatureRegressor(20, solver="gd", n_steps=40, random_state=0).fit(X, y)
    looped = RandomFeatureRegressor(20, solver="sgd", n_steps=40, random_state=0).fit(X, y)
    np.testing.assert_allclose(closed.predict(X), looped.predict(X), rtol=1e-9)
    exact = RandomFeatureRegressor(200, random_state=0).fit(X, y[:, 0])
    assert exact.train_loss_ < 1e-20
    assert exact.predict(X).shape == (60,)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: gradient_descent_path(*problem()[:2], lr=2 * 25 / 1.0), "expected lr below .* diverges"),
        (lambda: gradient_descent_path(*problem()[:2], steps=0), "steps"),
        (lambda: gradient_descent_path(*problem()[:2], steps=1.5), "steps"),
        (lambda: gradient_descent_path(torch.full((3, 2), torch.nan), torch.ones(3)), "Z to be finite"),
        (lambda: gradient_descent_path(torch.ones(3, 2), torch.ones(4)), "Z .N, P. and Y"),
        (lambda: gradient_descent_path(*problem()[:2], momentum=1.0), "momentum"),
        (lambda: Decomposition(*problem()[:2]).project(torch.ones(2, 3)), "features .M, 40"),
        (lambda: peak([1, 2], [1, 2]), "at least 3 increasing"),
        (lambda: peak([1, 3, 2], [1, 2, 3]), "increasing"),
        (lambda: peak([1, 2, 3], [1, float("nan"), 3]), "finite"),
        (lambda: sweep((4, 2, 8)), "increasing"),
        (lambda: sweep(test=(torch.ones(3, 5), torch.tensor([0, 1, 7]))), "training classes"),
        (lambda: sweep(train=(torch.full((3, 5), torch.nan), torch.tensor([0, 1, 2]))), "finite"),
        (lambda: compare({}), "at least one sweep"),
        (lambda: train_nested(*problem()[:2], [50], torch.optim.SGD, epochs=1), "sizes"),
        (lambda: RandomFeatureRegressor(5, solver="newton").fit(*problem(9, 2, 1)[:2]), "solver"),  # pyright: ignore
        (lambda: RandomFeatures(0, 3), "in_features"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
