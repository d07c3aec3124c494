"""Physical local learning: no graph through physics, counted measurements, exact gradients, refusals."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.local.physical_ff import (
    CosineGoodness,
    KerrCavity,
    MeasuredSurrogate,
    MetasurfaceCavity,
    MultimodeOptics,
    PhysicalBlock,
    PhysicalLocalFeatures,
    PhysicalLocalNet,
    as_physical,
    convert,
    hybrid_masks,
    local_loss,
    two_bit_encode,
)

SYSTEMS = (MultimodeOptics, KerrCavity, MetasurfaceCavity)


def table(n=60):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 3
    return torch.randn(n, 5, generator=generator) + 3 * F.one_hot(y, 5), y


def network(system=MultimodeOptics, cls=PhysicalLocalNet, **block):
    blocks = [
        PhysicalBlock(system(8, 6, seed=1), 7, seed=1, **block),
        PhysicalBlock(system(7, 6, seed=2), 7, seed=2, **block),
    ]
    return cls(blocks, 3, 5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_learns_and_counts_two_calls_a_layer_and_batch(system):
    x, y = table()
    for steps in (1, 7):
        net = network(system).fit(x, y, epochs=3, inner_steps=steps, batch_size=25)  # the last batch is partial
        assert net.physical_calls == 3 * 2 * 2 * 3
    net.reset_calls()
    net.partial_fit(x, y, epochs=10)
    assert net.physical_calls == 10 * 2 * 2
    assert net.score(x, y) > 0.8
    assert net.goodness(x).shape == (60, 3, 2)
    assert net.layer_accuracy(x, y).shape == (2,)


def test_no_gradient_passes_the_physics_or_reaches_an_earlier_layer():
    physics = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    first = PhysicalBlock(as_physical(physics, 8, 6), 7)
    second = PhysicalBlock(MultimodeOptics(7, 6), 7)
    h = first(torch.rand(4, 8, requires_grad=True))
    second.loss(second.measure(h)).backward()
    assert all(p.grad is None for p in [*first.parameters(), *physics.parameters()])
    assert second.linear.weight.grad is not None


def test_silent_physics_is_ordinary_forward_forward():
    x, y = table()
    net = PhysicalLocalNet([PhysicalBlock(as_physical(lambda v: v[:, :4] * 0, 8, 4), 7)], 3, 5).double()
    layer, goodness = copy.deepcopy(net.blocks[0].linear), copy.deepcopy(net.blocks[0].goodness)
    net.fit(x, y, epochs=2, inner_steps=3)
    generator, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(layer.parameters(), lr=2e-3)
    for _ in range(2):
        good, bad = net._pairs(net.scale(x), y, generator)
        for _ in range(3):
            optimizer.zero_grad()
            s = F.pad(torch.cat((good, bad)), (4, 0))
            local_loss(*goodness(layer(s)).chunk(2)).backward()
            optimizer.step()
    assert torch.equal(layer.weight, net.blocks[0].linear.weight)
    assert torch.equal(layer.bias, net.blocks[0].linear.bias)


def test_cosine_gradient_and_invariance():
    goodness = CosineGoodness(9, seed=3).double()
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    G = goodness(z)
    assert torch.allclose(G, F.cosine_similarity(z.abs(), goodness.target[None]))
    (gradient,) = torch.autograd.grad(G.sum(), z)
    norm = z.norm(dim=1, keepdim=True)
    closed = z.sign() * (goodness.target - G[:, None] * z.abs() / norm) / norm
    assert (gradient - closed).abs().max() < 1e-6
    for scale in (-2.0, 0.1, 30.0):
        assert torch.allclose(goodness(scale * z), G)


def test_equal_passes_stay_at_log_two():
    class Equal(PhysicalLocalNet):
        def wrong_labels(self, y, generator):
            return y

    net = network(cls=Equal).fit(*table(), epochs=2)
    assert np.abs(np.array(net.losses) - math.log(2)).max() < 1e-3


def test_negatives_are_wrong_and_uniform():
    y = torch.arange(3).repeat(3000)
    wrong = network().wrong_labels(y, torch.Generator().manual_seed(0))
    assert (wrong != y).all()
    assert torch.allclose(torch.bincount(wrong[y == 0], minlength=3)[1:] / 3000, torch.tensor(0.5), atol=0.04)


def test_systems_follow_their_equations():
    x = torch.rand(4, 5)
    optics = MultimodeOptics(5, 3)
    assert torch.allclose(
        optics(x), (torch.view_as_complex(optics.transmission) @ x.mT.to(torch.complex64)).abs().mT, atol=1e-6
    )
    cavity = MetasurfaceCavity(5, 3)
    W = torch.view_as_complex(cavity.coupling)
    W = (W + W.mT) * (0.8 / torch.linalg.matrix_norm(W + W.mT, 2, keepdim=True))
    A = torch.diag(1 + 0.2j + 0.8 * (x[0] / x[0].max() > 0.3))
    g, t, H = (torch.view_as_complex(b) for b in (cavity.antennas[1], cavity.antennas[0], cavity.direct))
    for f in range(3):
        assert torch.allclose(cavity(x)[0, f], (H[f] + g[f] @ torch.linalg.inv(A - W[f]) @ t[f]).abs(), atol=1e-5)
    assert two_bit_encode(torch.tensor([[0.0, 1.0, 2.0, 4.0]])).tolist() == [[0, 0, 0, 1, 1, 0, 1, 1]]


@pytest.mark.parametrize("system", SYSTEMS)
def test_noise_drift_twin_and_copies(system):
    x = torch.rand(4, 5)
    a = system(5, 3, noise_std=0.1, seed=1)
    before = torch.get_rng_state()
    assert not torch.equal(a(x), a(x))
    assert torch.equal(torch.get_rng_state(), before)
    assert (a.calls, a.samples) == (2, 8)
    clean, twin = a.response(x), a.twin()
    assert torch.equal(twin(x), clean)
    assert not torch.equal(a.twin(0.2)(x), clean)
    assert torch.equal(pickle.loads(pickle.dumps(a)).response(x), clean)
    other = system(5, 3, seed=9)
    other.load_state_dict(a.state_dict())
    assert torch.equal(other(x), clean)
    a.drift(0.0)
    assert torch.equal(a.response(x), clean)
    a.drift(1.0)
    assert not torch.allclose(a.response(x), clean)
    assert system(5, 3).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.isfinite(system(5, 3)(torch.zeros(1, 5))).all()


def test_any_callable_is_measured():
    module = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    box = as_physical(module, 3, 2)
    assert torch.equal(box(torch.ones(1, 3)), box(torch.ones(1, 3)))
    assert module.training
    box = as_physical(lambda v: np.sin(v), 3, 3, numpy=True)
    assert torch.allclose(box(torch.ones(2, 3)), torch.ones(2, 3).sin())
    box.drift(0.5)
    assert not torch.allclose(box(torch.ones(2, 3)), torch.ones(2, 3).sin())
    weight = torch.ones(3, requires_grad=True)

    def graph(v):
        with torch.enable_grad():
            return v * weight

    with pytest.warns(UserWarning, match="graph"):
        assert not as_physical(graph, 3, 3)(torch.ones(1, 3)).requires_grad


def test_black_boxes_that_write_into_their_input_or_give_no_real_numbers():
    x = torch.ones(2, 3)
    assert torch.equal(as_physical(lambda v: v.mul_(2), 3, 3)(x), 2 * torch.ones(2, 3))
    assert torch.equal(x, torch.ones(2, 3))
    for fn, got in ((lambda v: v * 1j, "complex"), (lambda v: None, "None"), (lambda v: np.asarray(v) * 1j, "complex")):
        with pytest.raises(TypeError, match=f"real outputs of a physical layer, got {got}"):
            as_physical(fn, 3, 3)(x)


def test_a_frozen_block_is_measured_and_left():
    net = network()
    net.blocks[0].linear.requires_grad_(False)
    before = net.blocks[0].linear.weight.clone()
    net.fit(*table(), epochs=2)
    assert torch.equal(net.blocks[0].linear.weight, before)
    assert net.physical_calls == 2 * 2 * 2


def test_surrogate_fits_pairs():
    x = torch.rand(300, 4)
    system = MeasuredSurrogate(x, x.square(), epochs=30, lr=3e-3)
    assert float(system.error) < 0.5
    assert not any(p.requires_grad for p in system.parameters())


def test_features_without_labels():
    x, y = table()
    net = PhysicalLocalFeatures(
        [PhysicalBlock(MultimodeOptics(5, 6), 7), PhysicalBlock(MultimodeOptics(7, 6), 7)], 3, (5,)
    )
    assert net.fit(x, epochs=2).fit_readout(x, y).score(x, y) > 0.8
    with pytest.raises(ValueError, match="length"):
        net.fit_readout(x, y[:-1])
    masks = hybrid_masks(5, (2, 8, 8), torch.Generator().manual_seed(0))
    assert masks.shape == (5, 2, 8, 8)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[:, 0], masks[:, 1])


def test_copies_loaders_and_seeds():
    x, y = table()
    a, b = network().fit(x, y, epochs=2), network().fit(x, y, epochs=2)
    assert torch.equal(a.goodness(x), b.goodness(x))
    copies = copy.deepcopy(a), pickle.loads(pickle.dumps(a))
    b.partial_fit(x, y)  # the optimizers' state goes along
    assert all(torch.equal(c.partial_fit(x, y).goodness(x), b.goodness(x)) for c in copies)
    d = network()
    d.load_state_dict(a.state_dict())
    assert torch.equal(d.predict(x), a.predict(x))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    assert network(goodness="sq", skip=False).fit(loader, epochs=1).physical_calls == 4 * 4


def test_convert_takes_over_a_sequence():
    model = nn.Sequential(nn.Tanh(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 4))
    net = convert(model, {"0": None, "2": MultimodeOptics(8, 8)}, num_classes=3, n_features=5)
    assert [block.skip for block in net.blocks] == [True, False]
    assert torch.equal(net.blocks[0].linear.weight, model.get_parameter("1.weight"))
    net.fit(*table(), epochs=1)
    with pytest.raises(ValueError, match="in turn"):
        convert(model, {"0": None}, num_classes=3, n_features=5)


def test_refusals():
    x, y = table()
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        network().fit(x, y + 1)
    with pytest.raises(ValueError, match="num_classes"):
        PhysicalLocalNet([PhysicalBlock(MultimodeOptics(6, 3), 4)], 1, 5)
    with pytest.raises(ValueError, match="layer 0"):
        PhysicalLocalNet([PhysicalBlock(as_physical(lambda v: v, 8, 3), 4)], 3, 5).fit(x, y)
    with pytest.raises(ValueError, match="layer 0 to be finite"):
        PhysicalLocalNet([PhysicalBlock(as_physical(lambda v: v / 0, 8, 8), 4)], 3, 5).fit(x, y)
    with pytest.raises(ValueError, match="fit"):
        network().predict(x)
    with pytest.raises(ValueError, match="finite"):
        network().fit(x * float("nan"), y)
    with pytest.raises(ValueError, match="theta"):
        PhysicalBlock(MultimodeOptics(6, 3), 4, theta=float("nan"))
    with pytest.raises(ValueError, match="step"):
        MultimodeOptics(6, 3).drift(2)
    with pytest.raises(ValueError, match="labels"):
        network().fit(x)
