"""The parts of spiking networks: neurons in closed form, surrogates on a grid, state, sequences, conversion."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.models import MLP, ConvNet, ResNetCIFAR
from torchfolio.spiking import SLTT
from torchfolio.spiking.conversion import to_spiking
from torchfolio.spiking.encoders import encode_input, frames, latency, poisson, repeat
from torchfolio.spiking.losses import SLTTLoss
from torchfolio.spiking.nets import SpikingConvNet, SpikingResNet18, spiking_vgg11
from torchfolio.spiking.neurons import IF, LIF, find_neurons
from torchfolio.spiking.sequence import Flattened, Stepped, Unrolled, multi_step, run_sequence
from torchfolio.spiking.state import SequenceDropout, detach_state, reset_state, state_modules
from torchfolio.spiking.surrogates import ATan, Rectangle, Sigmoid, Triangle

GRID = torch.arange(-40, 41, dtype=torch.float64) / 20
TABLE = [
    (Rectangle(), lambda x: (x.abs() <= 0.5).double()),
    (Rectangle(2.0), lambda x: (x.abs() <= 1).double() / 2),
    (Triangle(), lambda x: (1 - x.abs()).clamp(min=0)),
    (Triangle(0.5), lambda x: (0.5 - 0.25 * x.abs()).clamp(min=0)),
    (Sigmoid(), lambda x: 4 / (2 + torch.exp(4 * x) + torch.exp(-4 * x))),
    (ATan(), lambda x: 1 / (1 + (math.pi * x) ** 2)),
]


@pytest.mark.parametrize(("surrogate", "expected"), TABLE)
def test_surrogate_spikes_exactly_and_differs_by_the_table(surrogate, expected):
    x = GRID.clone().requires_grad_()
    s = surrogate(x)
    assert torch.equal(s, (GRID >= 0).double())
    assert s[40] == 1  # at zero
    s.sum().backward()
    torch.testing.assert_close(x.grad, expected(GRID), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(surrogate.derivative(GRID), expected(GRID), rtol=1e-12, atol=1e-12)
    assert x.grad.max() <= 1
    assert pickle.loads(pickle.dumps(surrogate)) == surrogate


def test_rectangle_saves_a_mask():
    saved = []
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        Rectangle()(x)
    assert [t.dtype for t in saved] == [torch.bool]


def test_surrogate_under_vmap():
    grads = torch.func.vmap(torch.func.grad(lambda x: Triangle()(x).sum()))(GRID[:, None])
    torch.testing.assert_close(grads[:, 0], TABLE[2][1](GRID))


def test_subthreshold_current_converges_geometrically():
    neuron = LIF(tau=2.0)
    current = torch.tensor([0.3, 0.49], dtype=torch.float64)  # below V_th (1 - lambda) = 0.5
    limit = current / (1 - neuron.decay)
    errors = []
    for _ in range(30):
        assert not neuron(current).any()
        errors.append(limit - neuron.v)
    for before, after in zip(errors, errors[1:], strict=False):
        torch.testing.assert_close(after, neuron.decay * before, rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_perfect_neuron_fires_at_the_rate_of_its_current(threshold):
    neuron, steps = IF(threshold), 200
    current = torch.linspace(0, threshold, 33, dtype=torch.float64)
    rate = run_sequence(neuron, repeat(current, steps)).mean(0)
    assert ((rate - current / threshold).abs() <= 1 / steps).all()


def test_reset_lines_in_numbers():
    soft = LIF(tau=2.0)
    assert soft(torch.tensor([1.6])) == 1
    torch.testing.assert_close(soft.v, torch.tensor([0.6]))
    assert soft(torch.tensor([0.6])) == 0
    torch.testing.assert_close(soft.v, torch.tensor([0.9]))
    hard = LIF(tau=2.0, v_reset=-0.5)
    assert hard(torch.tensor([1.6])) == 1
    torch.testing.assert_close(hard.v, torch.tensor([-0.5]))
    assert hard(torch.tensor([0.4])) == 0
    torch.testing.assert_close(hard.v, torch.tensor([-0.25 - 0.25 + 0.4]))
    scaled = LIF(tau=4.0, decay_input=True)
    scaled(torch.tensor([2.0]))
    torch.testing.assert_close(scaled.v, torch.tensor([0.5]))


def test_hard_reset_rests_at_its_reset_potential():
    neuron = LIF(tau=3.0, v_reset=0.25)
    for _ in range(5):
        neuron(torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(neuron.v, torch.full((4,), 0.25, dtype=torch.float64))


def _temporal_gradient(**flags) -> float:
    first = torch.tensor([0.8], dtype=torch.float64, requires_grad=True)
    neuron = LIF(tau=2.0, **flags)
    neuron(first)
    spike = neuron(torch.tensor([0.3], dtype=torch.float64)).sum()
    return float(torch.autograd.grad(spike, first)[0]) if spike.requires_grad else 0.0


def test_gradient_through_time_and_its_cuts():
    slope = Triangle().derivative(torch.tensor(0.5 * 0.8 + 0.3 - 1, dtype=torch.float64))
    at_reset = Triangle().derivative(torch.tensor(0.8 - 1, dtype=torch.float64))
    assert _temporal_gradient() == pytest.approx(float(slope * 0.5 * (1 - at_reset)))  # epsilon
    assert _temporal_gradient(detach_reset=True) == pytest.approx(float(slope * 0.5))
    for reset in (None, 0.0):
        assert _temporal_gradient(detach_state=True, v_reset=reset) == 0


def test_state_is_no_part_of_checkpoints_copies_and_pickles():
    net = SpikingConvNet((1, 8, 8))
    net(torch.randn(3, 1, 8, 8)).sum()
    assert not any(key.endswith(".v") for key in net.state_dict())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(n.v is None for n in find_neurons(other))
        assert torch.equal(other.head[1].weight, net.head[1].weight)
    assert all(n.v is not None for n in find_neurons(net))


def test_reset_and_detach():
    net = nn.Sequential(nn.Linear(4, 4), LIF(), SequenceDropout(0.5))
    net(torch.randn(2, 4))
    assert net[1].v.requires_grad
    value = net[1].v.clone()
    detach_state(net)
    assert not net[1].v.requires_grad
    assert torch.equal(net[1].v, value)
    assert net[2].mask is not None
    reset_state(net)
    assert net[1].v is None
    assert net[2].mask is None


def test_modules_of_other_libraries_are_handled():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = 0.0

        def reset(self):
            self.v = 0.0

        def forward(self, x):
            self.v = self.v * 0.5 + x
            return self.v

    net = nn.Sequential(nn.Linear(2, 2), Foreign())
    net(torch.ones(1, 2))
    detach_state(net)
    assert not net[1].v.requires_grad
    reset_state(net)
    assert net[1].v == 0.0
    assert state_modules(net) == find_neurons(net) == [net[1]]


def test_another_batch_without_reset_is_refused():
    net = nn.Sequential(nn.Linear(4, 4), LIF())
    net(torch.randn(64, 4))
    message = r"LIF state has batch 64, input has batch 32: call reset_state\(model\)"
    with pytest.raises(ValueError, match=message):
        net(torch.randn(32, 4))
    neuron = LIF()
    neuron(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="shape"):
        neuron(torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_respected(dtype):
    neuron = LIF(v_reset=0.1)
    assert run_sequence(neuron, torch.rand(3, 2, 4, dtype=dtype)).dtype == neuron.v.dtype == dtype


def test_sequence_dropout_keeps_its_mask():
    torch.manual_seed(0)
    drop, x = SequenceDropout(0.5), torch.ones(4, 50)
    first = drop(x)
    assert torch.equal(drop(x), first)
    assert set(first.unique().tolist()) == {0.0, 2.0}
    reset_state(drop)
    assert not torch.equal(drop(x), first)
    assert torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("dim", [1, 2])
def test_multi_step_and_single_step_agree(dim):
    torch.manual_seed(0)
    if dim == 1:
        net = nn.Sequential(nn.Linear(6, 8), LIF(1.5), nn.Linear(8, 8), nn.Identity(), IF(), nn.Linear(8, 3))
    else:
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), LIF()), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        )
    net = net.double()
    x = 2 * torch.randn(5, 7, *((6,) if dim == 1 else (1, 6, 6)), dtype=torch.float64)
    seen, found = [], []
    for neuron in find_neurons(net):
        neuron.register_forward_hook(lambda m, a, o: seen.append(o.detach()))
    whole = multi_step(net)
    assert any(isinstance(m, Flattened) for m in whole.modules())
    assert any(isinstance(m, Stepped) for m in whole.modules())
    for run in (lambda: run_sequence(net, x), lambda: whole(x)):
        reset_state(net)
        net.zero_grad()
        seen.clear()
        out = run()
        out.square().mean().backward()
        spikes = sum(float(s.sum()) for s in seen)
        found.append((out.detach(), spikes, [p.grad.clone() for p in net.parameters()]))
    (a, spikes_a, grads_a), (b, spikes_b, grads_b) = found
    assert spikes_a == spikes_b > 0
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    for p, q in zip(grads_a, grads_b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_unrolled_is_the_mean_over_time_and_leaves_no_state():
    net = SpikingConvNet((1, 8, 8), 3).eval()
    x = torch.randn(5, 1, 8, 8)
    expected = run_sequence(net, repeat(x, 4)).mean(0)
    reset_state(net)
    unrolled = Unrolled(net, 4)
    torch.testing.assert_close(unrolled(x), expected)
    torch.testing.assert_close(unrolled(x[:2]), expected[:2])
    assert all(n.v is None for n in find_neurons(net))


def test_encoders():
    x = torch.rand(3, 4)
    assert repeat(x, 5).shape == (5, 3, 4)
    assert repeat(x, 5).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    spikes = poisson(x, 4000, torch.Generator().manual_seed(0))
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(spikes.mean(0), x, rtol=0, atol=0.04)
    again = encode_input(x, 4000, "poisson", torch.Generator().manual_seed(0))
    assert torch.equal(spikes, again)
    early = latency(torch.tensor([0.0, 0.5, 1.0]), 5)
    assert early.argmax(0).tolist() == [4, 2, 0]
    assert early.sum(0).tolist() == [1, 1, 1]
    assert frames(torch.zeros(3, 7, 2), 7).shape == (7, 3, 2)
    assert encode_input(torch.zeros(7, 3), 7, None).shape == (7, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_input(torch.zeros(3, 2), 7, None), "7 steps"),
        (lambda: encode_input(torch.zeros(3, 2), 7, "rate"), "rate"),  # pyright: ignore[reportArgumentType]
        (lambda: SLTT(timesteps=3, encode=["frames"]), "expected encode"),  # pyright: ignore[reportArgumentType]
        (lambda: poisson(torch.tensor([1.5]), 3), r"\[0, 1\]"),
        (lambda: latency(torch.tensor([-0.5]), 3), r"\[0, 1\]"),
        (lambda: frames(torch.zeros(3, 6), 7), "recordings"),
        (lambda: repeat(torch.zeros(3), 0), "time step"),
        (lambda: LIF(tau=0.5), "tau"),
        (lambda: LIF(v_threshold=0), "v_threshold"),
        (lambda: LIF(v_reset=1.0), "v_reset"),
        (lambda: LIF(math.inf, decay_input=True), "decay_input"),
        (lambda: Triangle(0), "alpha"),
        (lambda: Rectangle(-1), "width"),
        (lambda: SequenceDropout(1.0), "p in"),
        (lambda: SLTTLoss(2.0), "alpha"),
        (lambda: SLTTLoss(target="zeros"), "target"),  # pyright: ignore[reportArgumentType]
        (lambda: SLTTLoss()(torch.zeros(2, 3), torch.zeros(2)), "labels"),
        (lambda: find_neurons(nn.Linear(2, 2)), "spiking neuron"),
        (lambda: Unrolled(LIF(), 0), "time step"),
        (lambda: SpikingConvNet((1, 2, 2), widths=(2, 2, 2)), "too small"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_loss_in_numbers():
    output, y = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([0, 1])
    entropy = F.cross_entropy(output, y)
    torch.testing.assert_close(SLTTLoss(0.0)(output, y), entropy)
    torch.testing.assert_close(SLTTLoss()(output, y), 0.95 * entropy + 0.05 * torch.tensor(0.5))
    torch.testing.assert_close(SLTTLoss(0.5, "one_hot")(output, y), 0.5 * entropy + 0.5 * torch.tensor(0.5))


def test_conversion_gives_every_place_its_own_neurons():
    net = to_spiking(ConvNet(widths=(4, 8)), partial(LIF, tau=1.1), average_pool=True)
    neurons = find_neurons(net)
    assert len(neurons) == len({id(n) for n in neurons}) == 2
    assert all(n.tau == 1.1 for n in neurons)
    assert not any(isinstance(m, nn.ReLU | nn.MaxPool2d) for m in net.modules())
    assert any(isinstance(m, nn.MaxPool2d) for m in to_spiking(ConvNet(widths=(4,))).modules())
    assert len(find_neurons(to_spiking(MLP(4, 2, (3, 3), activation="gelu")))) == 2
    assert isinstance(to_spiking(nn.ReLU()), LIF)


def test_average_pools_where_max_pools_were():
    net = to_spiking(ConvNet(widths=(4,)), average_pool=True)
    pool = next(m for m in net.modules() if isinstance(m, nn.AvgPool2d))
    x = torch.ones(1, 4, 5, 5)
    assert torch.equal(pool(x), torch.ones(1, 4, 3, 3))  # rounded up, and padding does not count


class Twice(nn.Module):
    def __init__(self, branch: bool = False):
        super().__init__()
        self.a, self.b, self.relu, self.branch = nn.Linear(3, 3), nn.Linear(3, 3), nn.ReLU(), branch

    def forward(self, x):
        if self.branch and x.sum() > 1e9:  # cannot be traced
            return x
        return self.relu(self.b(self.relu(self.a(x))))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), nn.ReLU()

    def forward(self, x):
        return torch.relu(self.act(self.linear(x)))


def test_conversion_of_a_residual_network():
    net = to_spiking(ResNetCIFAR(8))
    assert not any(isinstance(m, nn.ReLU) for m in net.modules())
    assert torch.isfinite(net(torch.rand(2, 3, 16, 16))).all()


def test_conversion_refuses_what_would_share_state():
    with pytest.raises(ValueError, match="used 2 times"):
        to_spiking(Twice())
    with pytest.raises(ValueError, match="example="):
        to_spiking(Twice(branch=True))
    with pytest.raises(ValueError, match="used 2 times"):
        to_spiking(Twice(branch=True), example=torch.zeros(2, 3))
    shared = nn.ReLU()
    with pytest.raises(ValueError, match="used 2 times"):
        to_spiking(nn.Sequential(nn.Linear(3, 3), shared, nn.Linear(3, 3), shared))
    with pytest.raises(ValueError, match="as a function"):
        to_spiking(Functional())
    with pytest.raises(ValueError, match="activations"):
        to_spiking(nn.Linear(3, 3))


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (lambda: SpikingResNet18(5, 3, width=4), (3, 16, 16)),
        (lambda: spiking_vgg11(5, width=1 / 16), (2, 16, 16)),
        (lambda: SpikingConvNet((1, 9, 9), 5, (2, 3, 4)), (1, 9, 9)),
    ],
)
def test_reference_networks(net, shape):
    model = net()
    out = run_sequence(model, repeat(torch.randn(2, *shape), 2))
    assert out.shape == (2, 2, 5)
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_resnet18_has_eighteen_weight_layers():
    net = SpikingResNet18(width=64)
    layers = [
        m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear) and getattr(m, "kernel_size", 0) != (1, 1)
    ]
    assert len(layers) == 18
    assert len(find_neurons(net)) == 17
