"""XOR clusters: the dual path against autograd and the equation, streaming, diagnostics, errors."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from torchfolio.experiments._descent_on_weights import primal_steps
from torchfolio.theory.xor_grokking import (
    DualGD,
    XORClusters,
    XORNetwork,
    alignment,
    grokking_time,
    odd_energy,
    xor_clusters,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


def problem(
    p: int = 50, dtype: torch.dtype = torch.float64, std: float = 1e-3, **kwargs
) -> tuple[XORClusters, XORNetwork]:
    g = generator()
    data = xor_clusters(20, p, 3.0, 0.2, generator=g, dtype=dtype)
    return data, XORNetwork(p, 8, std, generator=g, dtype=dtype, **kwargs)


@pytest.mark.parametrize("activation", [torch.relu, nn.Identity(), torch.tanh])
def test_dual_is_autograd(activation):
    data, network = problem(activation=activation)
    before = copy.deepcopy(network.state_dict())
    dual = DualGD(data, network, 0.1)
    for _ in range(30):
        dual.step()
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    primal_steps(data, network, 0.1, 30)
    new = torch.randn(7, 50, dtype=torch.float64)
    assert distance(dual.weight(), network.weight) <= 1e-10
    assert distance(dual.predict(new), network(new)) <= 1e-10
    assert distance(dual.predict(data), network(data.x)) <= 1e-10


def test_dual_with_trained_output_is_autograd():
    data, network = problem(train_output=True, std=0.1)
    dual = DualGD(data, network, 0.05)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(30):
        loss = nn.functional.softplus(-data.y * network(data.x)).mean()
        assert abs(dual.step() - loss.item()) <= 1e-10
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert distance(dual.a, network.a) <= 1e-10
    assert distance(dual.weight(), network.weight) <= 1e-10


def test_first_step_is_the_formula():
    data, network = problem(std=1e-12)
    active = (data.x @ network.weight.T > 0).double()
    step = 0.1 * network.a[:, None] / (2 * len(data)) * ((data.y[:, None] * active).T @ data.x)
    dual = DualGD(data, network, 0.1)
    dual.step()
    torch.testing.assert_close(dual.weight(), step.detach(), rtol=1e-6, atol=1e-10)


def test_streaming_equals_what_is_in_memory():
    shape = {"generator": generator(3), "dtype": torch.float64}
    data = xor_clusters(12, 9000, 5.0, 0.1, **shape)
    test = xor_clusters(16, 9000, 5.0, **shape)
    assert [block.shape[1] for block in data.blocks()] == [4096, 4096, 808]
    kept = XORNetwork(9000, 6, 1e-4, generator=generator(1), dtype=torch.float64)
    drawn = XORNetwork(9000, 6, 1e-4, generator=generator(1), dtype=torch.float64, device="meta")
    streamed = DualGD(data, drawn, 1e-4)
    seen = streamed.run(5, test)
    assert "x" not in data.__dict__
    dual = DualGD((data.x, data.y), kept, 1e-4)
    again = dual.run(5, (test.x, test.clean))
    shared = ["loss", "train_accuracy", "test_accuracy", "odd_energy"]
    np.testing.assert_allclose(seen.frame[shared].to_numpy(), again.frame[shared].to_numpy(), rtol=1e-10)
    torch.testing.assert_close(streamed.weight(), dual.weight(), rtol=0, atol=1e-12)
    torch.testing.assert_close(streamed.predict(test), streamed.predict(test.x), rtol=1e-12, atol=0)


def test_diagnostics_are_those_of_the_network():
    data, network = problem(std=0.1)
    test = xor_clusters(64, 50, 3.0, generator=generator(5), dtype=torch.float64)
    seen = DualGD(data, network, 0.1).run(4, test)
    assert list(seen.frame.index) == [0, 1, 2, 3, 4]
    primal_steps(data, network, 0.1, 4)
    row = seen.frame.loc[4]
    with torch.no_grad():
        output, new = network(data.x), network(test.x)
    assert row.train_accuracy == ((output * data.y) > 0).double().mean()
    assert row.train_clean_accuracy == ((output * data.clean) > 0).double().mean()
    assert row.flipped_margin == pytest.approx(float((output * data.y)[data.flipped].min()))
    assert row.test_accuracy == ((new * test.clean) > 0).double().mean()
    assert row.test_noisy_accuracy == pytest.approx(0.8 * row.test_accuracy + 0.2 * (1 - row.test_accuracy))
    assert row.odd_energy == pytest.approx(odd_energy(network, test.x), abs=1e-12)
    expected = alignment(network.weight.detach(), network.a.detach(), data.means)
    np.testing.assert_allclose(row[["aligned", "own_cosine", "other_cosine"]].to_numpy(float), expected, rtol=1e-9)
    torch.testing.assert_close(seen.neurons[4], network.weight.detach()[:, :2])


def test_grokking():
    g = generator()
    mu = 400**0.5
    train = xor_clusters(100, 8000, mu, 0.1, balanced=True, generator=g)
    test = xor_clusters(400, 8000, mu, generator=g)
    network = XORNetwork(8000, 100, 5e-9, generator=g)
    seen = DualGD(train, network, 5e-5).run(12, test)
    assert seen.fit_time == 1
    assert (grokking_time(seen) or 0) > 1
    assert grokking_time(seen.frame, 0.4) in (0, 1)
    assert seen.frame.odd_energy[1] > 0.95 > 0.35 > seen.frame.odd_energy[12]
    seen.plot([1, 12])
    # The output is homogeneous in the weights: while the loss is near log 2, the rate sets the scale and no more.
    slow = DualGD(train, XORNetwork(8000, 100, 1e-10, generator=generator(9)), 1e-6).run(12, test)
    fast = DualGD(train, XORNetwork(8000, 100, 2e-8, generator=generator(9)), 2e-4).run(12, test)
    np.testing.assert_allclose(slow.frame.test_accuracy[1:], fast.frame.test_accuracy[1:], atol=0.01)


def test_odd_functions_are_right_on_half_of_a_symmetric_set():
    data = xor_clusters(50, 30, 4.0, generator=generator())
    x, y = torch.cat([data.x, -data.x]), torch.cat([data.clean, data.clean])
    hidden, output = torch.randn(30, 16), torch.randn(16)
    for f in (lambda x: x @ hidden[:, 0], lambda x: torch.tanh(x @ hidden) @ output):
        assert ((y * f(x)) > 0).float().mean() == 0.5
        assert odd_energy(f, x) == pytest.approx(1)


def test_odd_energy_of_any_model():
    x = torch.randn(100, 3, 5, 5)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(36, 2)
    )
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    energy = odd_energy(model, x, batch_size=7)
    assert 0 < energy < 1
    assert energy == pytest.approx(odd_energy(model, x), rel=1e-5)
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before)
    assert torch.equal(state, torch.get_rng_state())
    assert odd_energy(torch.abs, x) == 0
    assert odd_energy(lambda x: 1e-30 * x.sum((1, 2, 3)), x) == pytest.approx(1)
    assert odd_energy(lambda x: x + x.square() * 0, x.bfloat16()) == pytest.approx(1)
    # Odd and even parts of equal energy.
    assert odd_energy(lambda x: x + x.abs(), x) == pytest.approx(0.5)


def test_data():
    data = xor_clusters(40, 500, 6.0, 0.1, balanced=True, generator=generator(2))
    assert data.cluster.bincount().tolist() == [10, 10, 10, 10]
    assert data.cluster[data.flipped].bincount().tolist() == [1, 1, 1, 1]
    assert torch.equal(data.clean > 0, data.cluster < 2)
    large = xor_clusters(20_000, 3, 6.0, 0.25, generator=generator())
    assert abs(float(large.flipped.float().mean()) - 0.25) < 0.01
    noise = (
        large.x
        - torch.cat([large.means, torch.zeros(0, 3)])[large.cluster // 2] * (1 - 2 * (large.cluster % 2))[:, None]
    )
    assert float(noise.mean(0).abs().max()) < 0.03
    torch.testing.assert_close(noise.T.cov(), torch.eye(3), atol=0.03, rtol=0)
    state = torch.get_rng_state()
    a, b = (xor_clusters(8, 5000, 1.0, generator=generator(7)) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.x, pickle.loads(pickle.dumps(b)).x)
    assert torch.equal(state, torch.get_rng_state())


def test_network():
    _, network = problem()
    assert network.a.sum() == 0
    assert not network.a.requires_grad
    twin = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    with torch.no_grad():
        twin.weight.zero_()
    twin.reset_parameters()
    assert torch.equal(twin.weight, network.weight)
    twin.load_state_dict(network.state_dict())
    assert "in_features=50, width=8" in repr(network)
    assert network.bfloat16()(torch.randn(3, 50).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: xor_clusters(8, 1, 1.0), "p to be a whole number of at least 2"),
        (lambda: xor_clusters(3, 5, 1.0, balanced=True), "multiple of 4"),
        (lambda: xor_clusters(8, 5, 1.0, 0.5), "noise_rate in"),
        (lambda: xor_clusters(8, 5, float("nan")), "mu"),
        (lambda: xor_clusters(8, 5, 1.0, dtype=torch.bfloat16), "dtype"),
        (lambda: XORNetwork(5, 3, 1.0), "even"),
        (lambda: XORNetwork(5, 4, 0.0), "init_std to be positive"),
        (lambda: DualGD(*problem(), 0.0), "lr to be positive"),
        (lambda: DualGD(problem()[0], XORNetwork(51, 4, 1.0), 1.0), "as many features"),
        (lambda: DualGD((torch.ones(2, 50), torch.tensor([0.0, 1.0])), problem()[1], 1.0), "labels -1 or 1"),
        (lambda: DualGD((torch.full((2, 50), torch.nan), torch.ones(2)), problem()[1], 1.0), "finite"),
        (lambda: DualGD(*problem(), 1.0).run(0), "steps"),
        (lambda: odd_energy(torch.abs, torch.empty(0, 3)), "at least one input"),
        (lambda: odd_energy(torch.zeros_like, torch.ones(2, 3)), "not all 0"),
        (lambda: odd_energy(torch.abs, torch.full((2,), torch.nan)), "finite"),
        (lambda: alignment(torch.ones(4, 5), torch.ones(4), torch.ones(3, 5)), "means"),
        (lambda: grokking_time(pd.DataFrame({"loss": [1.0]})), "test_accuracy"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_coarse_types_are_refused():
    data, network = problem()
    with pytest.raises(TypeError, match="float32 or float64"):
        DualGD((data.x.bfloat16(), data.y), network, 0.1)
