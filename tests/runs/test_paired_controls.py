"""A control differs from its method in one point: what it draws is its own, and it starts from the same weights."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from torchfolio.data import load
from torchfolio.dynamics.bias_free import BiasFreeUNet
from torchfolio.dynamics.harmonic_denoising import generalization_test
from torchfolio.experiments import _attacked_relu_networks as attacked
from torchfolio.experiments import _implicit_layers, fast_slow_memory, guidance, harmonic_denoising
from torchfolio.experiments._policy_alone import ShuffledRewards
from torchfolio.runs import Run
from torchfolio.training.noise_mask import Reinforce


def _equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(v, w) for (a, v), (b, w) in pairs)


@pytest.fixture
def untouched_generators():
    """Fails a test that draws from a global generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("untouched_generators")
def test_shuffled_rewards_draw_from_a_generator_of_their_own():
    losses, log_p = torch.arange(6.0), torch.linspace(-1, 1, 6)[:, None]
    first, again, other = (ShuffledRewards(seed) for seed in (0, 0, 1))
    drawn = [[float(control(losses, log_p, 0.0)) for _ in range(4)] for control in (first, again, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1  # anew for every batch
    assert float(Reinforce()(losses, log_p, 0.0)) not in drawn[0]


@pytest.mark.usefixtures("untouched_generators")
def test_a_guide_on_the_wrong_examples_draws_from_a_generator_of_its_own():
    x = torch.arange(32)
    first, again = guidance.shuffled(3), guidance.shuffled(3)
    orders = [first(x) for _ in range(2)]
    assert all(torch.equal(order, again(x)) for order in orders)
    assert not torch.equal(*orders)
    assert torch.equal(orders[0].sort().values, x)


def test_denoisers_of_shuffled_pixels_start_from_the_weights_of_the_straight_ones():
    starts: list[nn.Module] = []

    def make() -> nn.Module:
        net = BiasFreeUNet(1, settings.base, 2)
        starts.append(copy.deepcopy(net))
        return net

    settings = harmonic_denoising.SCALES["smoke"]
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generalization_test(make, images[:16], images[16:], (8,), steps=1, seed=5)
    net, seed = harmonic_denoising.untrained(settings, 5)
    assert seed == 10
    assert _equal(net, starts[0])
    assert not _equal(net, starts[1])


@pytest.mark.parametrize("kind", ["blind", "sealed"])
def test_networks_that_see_no_errors_start_from_the_weights_of_those_that_do(kind):
    run = Run("fast_slow_memory", "smoke", 3, fast_slow_memory.SCALES["smoke"], torch.device("cpu"), Path("unused"))
    study, nets = fast_slow_memory.Study(run), []
    for chosen in ("fast", kind):
        torch.manual_seed(3)
        nets.append(study.network("sines", chosen))
    assert type(nets[0].feedback) is not type(nets[1].feedback)
    assert _equal(*nets)


def test_an_equilibrium_and_a_tied_network_start_alike(monkeypatch):
    starts: list[list[torch.Tensor]] = []

    class Watched(_implicit_layers._Cell):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes)
            starts.append([p.detach().clone() for p in self.parameters()])

    monkeypatch.setattr(_implicit_layers, "_Cell", Watched)
    monkeypatch.setattr(_implicit_layers, "_quadratic", lambda seed: {})
    _implicit_layers.implicit_layers(load("digits", seed=0), 1, 4)
    assert len(starts) == 2
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))


def test_attacks_of_all_networks_start_from_the_same_points(monkeypatch):
    starts: list[torch.Tensor] = []

    def held(network, X, y, epsilon, steps=20, generator=None):
        starts.append(torch.rand(2, generator=generator))
        return X

    monkeypatch.setattr(attacked, "_pgd", held)
    X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    part = X, X[:, 0].sign()
    for draws in (1, 2):  # whatever was drawn before
        torch.manual_seed(draws)
        network = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        attacked._attacked(network, part, part, 0.1, seed=7)
    assert torch.equal(starts[0], starts[2])
    assert torch.equal(starts[1], starts[3])
    assert not torch.equal(starts[0], starts[1])
