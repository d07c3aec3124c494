"""Representational geometry: measures on known shapes, kernels of exact alignment, gradients against autograd."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.data import Examples
from torchfolio.insight import (
    Geometry,
    ShallowNetwork,
    aligned_kernel,
    ccgp,
    decoding_accuracy,
    dichotomies,
    expected_gradient,
    geometry,
    kernel_alignment,
    kernel_to_inputs,
    parallelism_score,
    participation_ratio,
    random_clusters,
    separable_xor,
    train_side_by_side,
    weight_trajectories,
)
from torchfolio.insight.shallow_networks import ACTIVATIONS


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


SQUARE = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)


def test_alignment_is_one_with_itself_and_blind_to_rotation_and_scale():
    z = randn(6, 4)
    turn = torch.linalg.qr(randn(4, 4, seed=1))[0]
    k = z @ z.T
    assert kernel_alignment(k, k) == pytest.approx(1)
    turned = 3 * z @ turn
    assert kernel_alignment(turned @ turned.T, k) == pytest.approx(1)
    assert kernel_alignment(k.numpy(), k) == pytest.approx(1)
    assert abs(kernel_alignment(k, randn(6, 6) @ randn(6, 6).T, unbiased=True)) <= 1
    with pytest.warns(UserWarning, match="L is the kernel of a constant"):
        assert math.isnan(kernel_alignment(k, torch.ones(6, 6)))


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("alignment", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_sampled_kernels_have_exactly_the_alignment(outputs, alignment):
    bits = torch.tensor([[k >> j & 1 for j in range(4)] for k in range(16)], dtype=torch.float64)[:, :outputs]
    K_y = (2 * bits - 1) @ (2 * bits - 1).T
    for seed in range(3):
        K = aligned_kernel(K_y, alignment, scale=2.0, generator=generator(seed))
        assert kernel_alignment(K, K_y) == pytest.approx(alignment, abs=1e-8)
        assert float(torch.linalg.eigvalsh(K)[0]) >= -1e-10
        assert float(K.trace()) == pytest.approx(32)
        assert float(K.sum(0).abs().max()) <= 1e-9
        X = kernel_to_inputs(K, 20, generator=generator(seed))
        assert torch.allclose(X @ X.T, K, atol=1e-8)
    assert torch.equal(
        aligned_kernel(K_y, 0.5, generator=generator(1)), aligned_kernel(K_y, 0.5, generator=generator(1))
    )


def test_kernels_that_cannot_be():
    full = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be reached"):
        aligned_kernel(full, 0.0, generator=generator())
    for bad, match in ((torch.ones(4, 4), "constant"), (-torch.eye(4), "semidefinite"), (full[:3], "symmetric")):
        with pytest.raises(ValueError, match=match):
            aligned_kernel(bad, 0.5)
    for value in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="alignment"):
            aligned_kernel(full, value)
    with pytest.raises(ValueError, match="rank 4"):
        kernel_to_inputs(full, 3)
    with pytest.raises(ValueError, match="eigenvalue"):
        kernel_to_inputs(-full, 4)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_the_alignment_of_xor_is_its_formula(epsilon):
    task = separable_xor(30, epsilon, generator=generator())
    assert task.alignment == pytest.approx(epsilon**2 / math.sqrt(2 + epsilon**4), abs=1e-9)
    x, y, c = task.sample(9, noise=0.0)
    assert torch.allclose(x, task.means[c])
    assert y.shape == (9, 1)


def test_parallelism_of_a_rectangle_and_a_simplex():
    side = [True, True, False, False]
    assert parallelism_score(SQUARE, side) == pytest.approx(1)
    assert parallelism_score(torch.eye(4), side) == pytest.approx(0, abs=1e-12)
    assert parallelism_score(SQUARE[[0, 3, 1, 2]], side) == pytest.approx(-1), "XOR of a square: opposite vectors"
    cube = torch.tensor([[k >> 2 & 1, k >> 1 & 1, k & 1] for k in range(8)], dtype=torch.float64)
    split = cube[:, 0] > 0
    assert parallelism_score(cube, split) == pytest.approx(1)
    assert parallelism_score(cube, split, "assignment") == pytest.approx(1)
    for bad in ([True] * 4, [True, False, False, False], [True, False]):
        with pytest.raises(ValueError, match="balanced dichotomy"):
            parallelism_score(SQUARE, bad)
    with pytest.raises(ValueError, match="assignment"):
        parallelism_score(randn(10, 3), [True] * 5 + [False] * 5)


def test_generalisation_and_decoding_of_known_shapes():
    conditions = np.arange(400) % 4
    z = torch.tensor([8.0, 2.0]) * SQUARE[conditions] + 0.3 * randn(400, 2)
    abstract, xor = [True, True, False, False], [True, False, False, True]
    assert ccgp(z, conditions, abstract) > 0.98
    assert ccgp(z, conditions, xor) < 0.1, "a line that is right on two corners is wrong on the others"
    assert decoding_accuracy(z, conditions, abstract) > 0.98
    assert decoding_accuracy(z, conditions, xor) < 0.8
    assert len(dichotomies(4)) == 3
    assert len(dichotomies(8)) == 35
    assert len(dichotomies(3, balanced=False)) == 3
    with pytest.raises(ValueError, match="two conditions on each side"):
        ccgp(z, conditions % 2, [True, False])
    with pytest.raises(ValueError, match="even number"):
        dichotomies(3)


def test_participation_ratio():
    assert participation_ratio(torch.eye(5)) == pytest.approx(4)
    assert participation_ratio(torch.arange(5.0)[:, None] * torch.ones(1, 3)) == pytest.approx(1)
    assert math.isnan(participation_ratio(torch.ones(4, 3)))
    z = randn(50, 7)
    c = torch.cov(z.T)
    assert participation_ratio(z) == pytest.approx(float(c.trace() ** 2 / (c @ c).trace()))


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_the_expected_gradient_is_autograds(name):
    net = ShallowNetwork(5, 8, 2, name, readout="uniform", generator=generator()).double()
    X, Y = randn(4, 5, seed=1), (randn(4, 2, seed=2) > 0).double()
    logits = net(X)
    loss = F.binary_cross_entropy_with_logits(logits, Y)
    grad = torch.autograd.grad(loss, net.weight)[0]
    found = expected_gradient(net.weight, X, Y, net.readout, name, bias=net.bias, logits=logits)
    assert torch.allclose(found, -grad, atol=1e-6)


def test_side_by_side_is_one_by_one():
    tasks = [random_clusters(4, 6, generator=generator(k)) for k in range(3)]
    kinds = ("tanh", "relu", "tanh")
    for train_readout in (False, True):
        nets = [ShallowNetwork(6, 10, 1, kind, train_readout=train_readout, generator=generator(k)).double()
                for k, kind in enumerate(kinds)]  # fmt: skip
        alone = copy.deepcopy(nets)
        train_side_by_side(nets, tasks, steps=5, batch_size=32, generator=generator())
        g = generator()
        optimizers = [torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1) for net in alone]
        for _ in range(5):
            pick = torch.randint(4, (3, 32), generator=g)
            noise = torch.randn(3, 32, 6, dtype=torch.float64, generator=g)
            for k, net in enumerate(alone):
                optimizers[k].zero_grad()
                x = tasks[k].means[pick[k]] + 0.1 * noise[k]
                F.binary_cross_entropy_with_logits(net(x), tasks[k].labels[pick[k]]).backward()
                optimizers[k].step()
        for a, b in zip(nets, alone, strict=True):
            assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="a task for each network"):
        train_side_by_side(nets, tasks[:2])
    with pytest.raises(ValueError, match="equal sizes"):
        train_side_by_side([*nets[:1], ShallowNetwork(6, 4).double()], tasks[:2])


def test_a_network_is_a_good_module():
    net = ShallowNetwork(5, 8, 3, "relu_linear_gradient", "balanced", generator=generator())
    x = torch.randn(4, 5)
    twin = ShallowNetwork(5, 8, 3, "relu_linear_gradient")
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.allclose(net.readout.norm(dim=0), torch.full((8,), 8**-0.5))
    assert net(x.double().float()).dtype == torch.float32
    assert net.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    for bad in (
        lambda: ShallowNetwork(0),
        lambda: ShallowNetwork(3, activation="x"),
        lambda: ShallowNetwork(3, readout="x"),
    ):
        with pytest.raises(ValueError, match="expected"):
            bad()
    assert pickle.loads(pickle.dumps(random_clusters())).noise == 0.1


def test_trajectories_start_at_the_initial_weights():
    task = random_clusters(4, 12, generator=generator())
    paths = weight_trajectories(task, "tanh", steps=20, every=10, width=6)
    assert paths["inter"].shape == paths["intra"].shape == (2, 6)
    assert (paths["inter"][1].abs() > paths["inter"][0].abs()).float().mean() > 0.6


def test_geometry_of_ones_own_network_and_its_panel():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 12), nn.Dropout(0.5), nn.Tanh(), nn.Linear(12, 4)).train()
    conditions = torch.arange(80) % 4
    x = torch.randn(4, 2, 3, 3)[conditions] + 0.1 * torch.randn(80, 2, 3, 3)
    table = geometry(net, ["1", "3"], x, conditions, torch.tensor([0, 1, 1, 0]))
    assert list(table.index) == ["inputs", "1", "3"]
    assert table.loc["inputs", "input_alignment"] == pytest.approx(1)
    assert table.notna().all(axis=None)
    assert net.training
    odd = geometry(net, ["3"], x, conditions, torch.tensor([0, 0, 1, 0]))
    assert odd[["parallelism", "ccgp"]].isna().all(axis=None)
    panel = Geometry().look(net, data=Examples((x, conditions)))
    assert panel.record["layers"][0]["input alignment"] == pytest.approx(1)
    assert len(panel.pictures) == 1
    with pytest.raises(ValueError, match="three classes"):
        Geometry().look(net, data=Examples((x, conditions % 2)))
    with pytest.raises(ValueError, match="4 conditions"):
        geometry(net, ["3"], x, conditions, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="none of 1"):
        geometry(net, ["3"], x, 2 * conditions, torch.tensor([0, 1, 0, 1]))


@pytest.mark.parametrize(
    "conditions", [np.full(8, 0.5), np.arange(8) - 1, np.array([0, 2, 3] * 2 + [0, 0]), np.zeros((8, 1), int)]
)
def test_conditions_are_whole_numbers_from_0_on(conditions):
    z = np.random.default_rng(0).standard_normal((8, 3))
    for measure in (ccgp, decoding_accuracy):
        with pytest.raises(ValueError, match="condition"):
            measure(z, conditions, [0, 0, 1, 1])


def test_what_is_not_finite_is_refused():
    z, c = np.full((8, 3), np.nan), np.arange(8) % 4
    for measure in (
        lambda: ccgp(z, c, [0, 0, 1, 1]),
        lambda: decoding_accuracy(z, c, [0, 0, 1, 1]),
        lambda: parallelism_score(z[:4], [0, 0, 1, 1]),
        lambda: participation_ratio(z),
    ):
        with pytest.raises(ValueError, match="finite"):
            measure()
    with pytest.raises(ValueError, match="both sides"):
        decoding_accuracy(np.ones((2, 3)), [0, 1], [0, 1])
