"""SLTT: where it equals backpropagation through time, what it cuts, what it costs."""

from __future__ import annotations

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import fit
from torchfolio.measure import gradient_dict, saved_bytes
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.encoders import frames
from torchfolio.spiking.nets import SpikingConvNet, SpikingResNet18
from torchfolio.spiking.neurons import LIF, find_neurons
from torchfolio.spiking.sequence import Unrolled, run_sequence
from torchfolio.spiking.sltt import SLTT, SLTTLoss, gradient_agreement
from torchfolio.spiking.state import Stateful, reset_state

T = 4


def batch(dtype=torch.float64, size: int = 8):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 1, 8, 8, generator=generator, dtype=dtype)
    return x, torch.randint(10, (size,), generator=generator)


def network(tau: float = 2.0, norm: bool = False, dtype=torch.float64, **neuron) -> nn.Module:
    torch.manual_seed(0)
    return SpikingConvNet((1, 8, 8), 10, (3, 4), partial(LIF, tau=tau, **neuron), norm=norm).to(dtype)


def gradients(rule, net: nn.Module, data=None) -> dict[str, Tensor]:
    data = data or batch(next(net.parameters()).dtype)
    net.zero_grad(set_to_none=True)
    rule.prepare(net, data)
    rule.step(data, Tensor.backward)
    rule.release()
    return gradient_dict(net)


def assert_same(a, b, rtol=1e-10):
    assert set(a) == set(b) != set()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize(("tau", "timesteps"), [(2.0, 1), (1.0, T)])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("norm", [False, True])
def test_equals_bptt_without_memory(tau, timesteps, dtype, rtol, norm):
    net = network(tau, norm, dtype)
    assert_same(gradients(SLTT(timesteps=timesteps), net), gradients(BPTT(timesteps=timesteps), net), rtol)


@pytest.mark.parametrize("timesteps", [2, 5])
@pytest.mark.parametrize("tau", [1.1, 3.0])
@pytest.mark.parametrize("reset", [None, 0.0])
def test_read_out_gradient_is_that_of_bptt(timesteps, tau, reset):
    net = network(tau, v_reset=reset)
    ours, theirs = gradients(SLTT(timesteps=timesteps), net), gradients(BPTT(timesteps=timesteps), net)
    for name in ("head.1.weight", "head.1.bias"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-13)
    assert not torch.allclose(ours["layer1.0.weight"], theirs["layer1.0.weight"])


class Chosen(SLTT):
    """SLTT-K at given steps."""

    steps: frozenset[int] = frozenset()

    def draw_steps(self) -> set[int]:
        return set(self.steps)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("rescale", [True, False])
def test_mean_over_all_subsets(k, rescale):
    net = network()
    whole = gradients(SLTT(timesteps=T), net)
    mean = {name: torch.zeros_like(g) for name, g in whole.items()}
    subsets = list(itertools.combinations(range(T), k))
    for subset in subsets:
        rule = Chosen(timesteps=T, k=k, rescale=rescale)
        rule.steps = frozenset(subset)
        for name, g in gradients(rule, net).items():
            mean[name] += g / len(subsets)
    factor = 1 if rescale else k / T
    assert_same(mean, {name: factor * g for name, g in whole.items()})


def test_gradient_is_the_sum_of_the_local_products():
    """The definition, by hand, for two layers of neurons and a linear read-out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), LIF(), nn.Linear(6, 4), LIF(), nn.Linear(4, 3)).double()
    x, y = 4 * torch.randn(2, 5, dtype=torch.float64), torch.tensor([0, 2])
    nn.init.normal_(net[2].weight)  # strong enough that the second layer fires
    found = gradients(SLTT(F.cross_entropy, timesteps=T), net, (x, y))
    w1, w2, w3 = (net[k].weight.detach() for k in (0, 2, 4))
    v1 = v2 = 0
    expected = [torch.zeros_like(w) for w in (w1, w2, w3)]
    with torch.no_grad():
        for _ in range(T):
            u1 = 0.5 * v1 + net[0](x)
            s1 = (u1 >= 1).double()
            u2 = 0.5 * v2 + net[2](s1)
            s2 = (u2 >= 1).double()
            v1, v2 = u1 - s1, u2 - s2
            e3 = (net[4](s2).softmax(-1) - F.one_hot(y, 3)) / len(x) / T
            e2 = (e3 @ w3) * (1 - (u2 - 1).abs()).clamp(min=0)
            e1 = (e2 @ w2) * (1 - (u1 - 1).abs()).clamp(min=0)
            for g, e, s in zip(expected, (e1, e2, e3), (x, s1, s2), strict=True):
                g += e.T @ s
    for name, g in zip(("0.weight", "2.weight", "4.weight"), expected, strict=True):
        torch.testing.assert_close(found[name], g, rtol=1e-10, atol=1e-14)
        assert g.abs().sum() > 0


def test_memory_is_that_of_one_step():
    def peak(rule):
        # Wide layers: the image, which all steps share, counts once however many there are.
        net = SpikingConvNet((1, 8, 8), 10, (16, 32), partial(LIF, tau=1.1))
        rule.prepare(net, batch())
        return saved_bytes(lambda: rule.step(batch(torch.float32, 32), Tensor.backward), exclude=net).peak

    assert peak(SLTT(timesteps=12)) == pytest.approx(peak(SLTT(timesteps=2)), rel=0.01)
    assert peak(BPTT(timesteps=6)) == pytest.approx(6 * peak(SLTT(timesteps=6)), rel=0.05)


def test_agreement_falls_with_the_time_constant():
    x, y = batch(size=32)
    cosines = [gradient_agreement(network(tau), x, y, timesteps=T)["cosine"] for tau in (1.0, 1.1, 2.0, 5.0)]
    assert cosines[0] == pytest.approx(1, abs=1e-12)
    assert cosines[1] >= 0.99
    assert cosines == sorted(cosines, reverse=True)


def test_agreement_leaves_the_model_alone():
    net = network(norm=True).train()
    net.head[1].weight.grad = torch.ones_like(net.head[1].weight)
    before = copy.deepcopy(net.state_dict())
    found = gradient_agreement(net, *batch(), timesteps=T)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(net.head[1].weight.grad, torch.ones_like(net.head[1].weight))
    assert set(found["parameters"]) == {n for n, _ in net.named_parameters()}
    assert found["parameters"]["head.1.weight"]["cosine"] == pytest.approx(1)
    assert found["sltt_norm"] > 0 < found["bptt_norm"]


@pytest.mark.parametrize(("rule", "cut"), [(SLTT, True), (BPTT, False)])
def test_credit_for_an_early_cue(rule, cut):
    net, (x, y) = network(), batch()
    cue = torch.zeros(T, *x.shape, dtype=x.dtype)
    cue[0] = x
    rule(timesteps=T).prepare(net, (x, y))
    F.cross_entropy(run_sequence(net, cue)[-1], y).backward()
    gradient = net.layer1[0].weight.grad
    assert (gradient == 0).all() if cut else gradient.abs().max() > 0


def test_steps_without_backward_still_move_state_and_statistics():
    rules = SLTT(timesteps=T), SLTT(timesteps=T, k=1)
    nets = [network(norm=True).train() for _ in rules]
    outcomes = []
    for rule, net in zip(rules, nets, strict=True):
        rule.prepare(net, batch())
        outcomes.append(rule.step(batch(), Tensor.backward))
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert outcomes[0]["accuracy"] == outcomes[1]["accuracy"]
    assert [o["backward_steps"] for o in outcomes] == [T, 1]


def test_random_steps_repeat_and_vary():
    draws = [SLTT(timesteps=6, k=2, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    first, second = ([rule.draw_steps() for _ in range(20)] for rule in draws)
    assert first == second
    assert set().union(*first) == set(range(6))
    assert all(len(steps) == 2 for steps in first)
    rule, other = draws[0], SLTT(timesteps=6, k=2, generator=torch.Generator())
    other.load_state_dict(rule.state_dict())
    assert rule.draw_steps() == other.draw_steps()


def test_under_autocast_forward_only_steps_do_not_swallow_gradients():
    net = network(norm=True, dtype=torch.float32)
    rule = Chosen(timesteps=T, k=1)
    rule.steps = frozenset({T - 1})
    rule.prepare(net, batch())
    with torch.autocast("cpu", torch.bfloat16):
        rule.step(batch(torch.float32), Tensor.backward)
    assert all(p.grad is not None for p in net.parameters())


def test_flags_are_set_and_given_back():
    net = network()
    neurons = find_neurons(net)
    neurons[0].detach_state = True
    for rule, flag in ((SLTT(timesteps=T), True), (BPTT(timesteps=T), False)):
        assert rule.prepare(net, batch()) is net
        assert all(n.detach_state == flag for n in neurons)
        rule.release()
        assert [n.detach_state for n in neurons] == [True, False]


def test_other_modules_with_state_are_cut_too():
    class Lateral(Stateful):
        states = ("last",)

        def __init__(self):
            super().__init__()
            self.mix, self.last = nn.Linear(6, 6), None

        def forward(self, x):
            out = x if self.last is None else x + self.mix(self.last)
            self.last = out
            return out

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Lateral(), LIF(), nn.Linear(6, 3)).double()
    found = gradients(SLTT(timesteps=T), net, (torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])))
    assert set(found) == {n for n, _ in net.named_parameters()}


@pytest.mark.parametrize("k", [None, 1])
def test_trains_and_predicts_over_time(k):
    torch.manual_seed(0)
    x = torch.rand(128, 6)
    y = (x[:, 0] > x[:, 1]).long()
    net = nn.Sequential(nn.Linear(6, 16), LIF(1.1), nn.Linear(16, 2))
    rule = SLTT(timesteps=T, k=k, rescale=True)
    result = fit(
        net, (x, y), val=(x, y), rule=rule, evaluate=rule.evaluate, epochs=20, batch_size=32, device="cpu",
        optimizer=partial(torch.optim.Adam, lr=0.02),
    )  # fmt: skip
    assert result.history["val_accuracy"][-1] > 0.85
    predicted = Unrolled(net, T)(x).argmax(-1)
    assert (predicted == y).double().mean() == pytest.approx(result.history["val_accuracy"][-1])


def test_same_seed_same_weights():
    ends = []
    for _ in range(2):
        net = network(norm=True, dtype=torch.float32)
        fit(net, batch(torch.float32, 32), rule=SLTT(timesteps=T, k=2), epochs=2, batch_size=8, device="cpu", seed=1)
        ends.append(net.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_residual_network_of_photographs():
    net = SpikingResNet18(4, 3, width=2, neuron=partial(LIF, tau=1.1))
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])
    assert gradient_agreement(net, x, y, timesteps=3)["cosine"] > 0.9


def test_inputs_with_a_time_axis():
    net, (x, y) = network(), batch()
    x_seq = torch.stack([x, 0.5 * x, -x])
    given = gradients(SLTT(timesteps=3, encode=None), net, (x_seq, y))
    for encode in (frames, "frames"):
        assert_same(given, gradients(SLTT(timesteps=3, encode=encode), net, (x_seq.movedim(0, 1), y)))


def test_regression_with_a_loss_of_ones_own():
    net = nn.Sequential(nn.Linear(3, 8), LIF(), nn.Linear(8, 2))
    rule = SLTT(F.mse_loss, timesteps=3)
    rule.prepare(net, (torch.randn(4, 3), torch.randn(4, 2)))
    scalars = rule.step((torch.randn(4, 3), torch.randn(4, 2)), Tensor.backward)
    assert "accuracy" not in scalars
    assert net[0].weight.grad is not None


def test_state_is_gone_after_a_step():
    net, rule = network(), SLTT(timesteps=T)
    rule.prepare(net, batch())
    rule.step(batch(size=8), Tensor.backward)
    rule.step(batch(size=3), Tensor.backward)
    assert all(n.v is None for n in find_neurons(net))
    reset_state(net)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SLTT(timesteps=0), "timesteps"),
        (lambda: SLTT(timesteps=4, k=5), "expected k .* got 5"),
        (lambda: SLTT(timesteps=4, k=0), "expected k"),
        (lambda: BPTT(timesteps=4, encode="rate"), "encode"),  # pyright: ignore[reportArgumentType]
        (lambda: SLTT(timesteps=4).prepare(nn.Linear(2, 2), batch()), "spiking neuron"),
        (lambda: gradients(SLTT(timesteps=4, encode=None), network()), "4 steps"),
        (lambda: gradients(SLTT(lambda o, y: o.mean(-1), timesteps=4), network()), "scalar that requires"),
        (lambda: gradients(SLTT(lambda o, y: o.detach().mean(), timesteps=4), network()), "requires_grad=False"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_step_before_prepare():
    with pytest.raises(RuntimeError, match="prepare"):
        SLTT(timesteps=2).step(batch(), Tensor.backward)


def test_loss_is_the_papers_by_default():
    assert isinstance(SLTT(timesteps=2).loss, SLTTLoss)
    assert SLTT(timesteps=2).loss.alpha == 0.05


@pytest.mark.parametrize("rule", [SLTT, BPTT])
def test_a_neuron_at_two_places_is_refused(rule):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.fire = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3), LIF(tau=1.5)

        def forward(self, x):
            return self.c(self.fire(self.b(self.fire(self.a(x)))))

    data = (torch.rand(8, 6), torch.randint(3, (8,)))
    with pytest.raises(ValueError, match="'fire' runs at two places"):
        fit(Shared(), data, rule=rule(timesteps=3), epochs=1, device="cpu")
    net = nn.Sequential(nn.Linear(6, 6), LIF(tau=1.5), nn.Linear(6, 3))
    fit(net, data, rule=rule(timesteps=3), epochs=2, batch_size=4, device="cpu")
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_numbers_and_labels_at_the_door():
    for settings in (
        {"timesteps": 2.5},
        {"timesteps": float("nan")},
        {"timesteps": 3, "k": 1.5},
        {"timesteps": 3, "k": 4},
    ):
        with pytest.raises((TypeError, ValueError), match="expected"):
            SLTT(**settings)
    with pytest.raises(ValueError, match="labels from 0 to 2, got 3"):
        SLTTLoss()(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 3]))
