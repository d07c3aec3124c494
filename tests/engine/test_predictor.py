"""How a network answers is the rule's to say, and state does not leak from one batch into the next."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio import measure
from torchfolio.engine import LearningRule, evaluate, fit
from torchfolio.insight import information_plane
from torchfolio.models import collect_features
from torchfolio.robustness import pgd
from torchfolio.spiking import LIF, SLTT, Unrolled, frames
from torchfolio.spiking.bptt import BPTT
from torchfolio.spiking.nets import SpikingConvNet
from torchfolio.spiking.state import reset_state, state_modules


def spiking(shape=(1, 8, 8), classes=3):
    torch.manual_seed(0)
    return SpikingConvNet(shape, classes, (4, 6))


def examples(n, shape=(1, 8, 8), classes=3):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, *shape, generator=generator), torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("make", [SLTT, BPTT])
def test_validation_of_any_size_runs_the_network_over_time(make):
    net, rule = spiking(), make(timesteps=3)
    result = fit(net, examples(40), val=examples(27), rule=rule, epochs=2, batch_size=16, progress=False)
    # The last row of the history is of the trained network.
    scores = evaluate(net, examples(27), rule=rule, batch_size=10)
    assert result.history.rows[-1]["val_loss"] == pytest.approx(scores["loss"], rel=1e-5)
    assert scores == pytest.approx(evaluate(Unrolled(net, 3), examples(27)), rel=1e-5)


def test_scores_do_not_depend_on_the_batches_before():
    net, data = spiking(), examples(60)
    scores = [evaluate(net, data, batch_size=size) for size in (20, 25, 60)]
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)
    reset_state(net)
    net(data[0][:7])  # a sequence that somebody has left unfinished
    assert evaluate(net, data) == pytest.approx(scores[0], rel=1e-5)
    assert all(m.v is None for m in state_modules(net))


def test_features_of_stateful_networks_are_those_of_single_batches():
    net, (x, _) = spiking(), examples(23)
    whole = collect_features(net, x, ["layer2"], batch_size=23)["layer2"]
    parts = collect_features(net, x, ["layer2"], batch_size=10)["layer2"]
    torch.testing.assert_close(whole, parts)


def curvature(net, data, size):
    return measure.Hessian(net, F.cross_entropy, data, batch_size=size)(
        torch.ones(sum(p.numel() for p in net.parameters()))
    )


MEASURES = {
    "losses": lambda net, data, size: measure.per_example_losses(net, F.cross_entropy, data, batch_size=size),
    "gradients": lambda net, data, size: measure.loss_gradients(net, F.cross_entropy, data, batch_size=size)["head.1.bias"],
    "per example": lambda net, data, size: measure.per_example_gradients(net, F.cross_entropy, data, batch_size=size)["head.1.bias"],
    "curvature": curvature,
    "outputs": lambda net, data, size: measure.outputs(net, data, batch_size=size),
    "attack": lambda net, data, size: pgd(net, *data, eps=0.1, alpha=0.05, steps=3, start="zero", max_batch=size).x_adv,
    "information": lambda net, data, size: torch.tensor(information_plane(net, ["layer1"], *data, reduce="mean", batch_size=size).to_frame().iloc[:, 1:].to_numpy(float)),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURES)
def test_measures_start_every_batch_afresh(name):
    net, data = spiking().eval(), examples(12)
    net(data[0][:5])  # a sequence that somebody has left unfinished
    whole, parts = (MEASURES[name](net, data, size) for size in (12, 4))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    assert all(m.v is None for m in state_modules(net))


def test_any_rule_starts_every_batch_afresh():
    losses = [fit(spiking(), examples(30), batch_size=size, epochs=2, progress=False).history.rows[-1]["loss"]
              for size in (30, 10, 8)]  # fmt: skip
    assert all(map(math.isfinite, losses))


def test_recordings_train():
    net = spiking((1, 12, 12))
    x, y = torch.rand(16, 4, 1, 12, 12), torch.randint(3, (16,))
    rule = SLTT(timesteps=4, encode=frames)
    with pytest.raises(ValueError, match=r"recordings \[B, T, \.\.\.\] are run through time by encode='frames'"):
        fit(net, (x, y), rule=SLTT(timesteps=4), epochs=1, progress=False)
    before = copy.deepcopy(net.state_dict())
    fit(net, (x, y), val=(x[:7], y[:7]), rule=rule, epochs=1, batch_size=8, progress=False)
    assert not torch.equal(before["layer1.0.weight"], net.state_dict()["layer1.0.weight"])
    assert set(evaluate(net, (x, y), rule=rule)) == {"loss", "accuracy"}


def test_the_network_is_released_at_the_end_of_fit():
    net = spiking()
    fit(net, examples(16), rule=SLTT(timesteps=3), epochs=1, progress=False)
    assert not any(m.detach_state for m in net.modules() if isinstance(m, LIF))

    def stop(state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(net, examples(16), rule=SLTT(timesteps=3), epochs=1, progress=False, callbacks=[stop])
    assert not any(m.detach_state for m in net.modules() if isinstance(m, LIF))


def test_a_module_whose_reset_draws_weights_has_no_state():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.v = nn.Linear(4, 2)

        def reset(self):
            raise AssertionError("weights drawn anew")

        def forward(self, x):
            return self.v(x)

    assert not state_modules(Layer())
    evaluate(Layer(), (torch.randn(5, 4), torch.randint(2, (5,))))


def test_a_rule_answers_by_its_own_predictor():
    class Doubled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return 2 * self.model(x)

    class Rule(LearningRule):
        def prepare(self, model, example):
            self.model = model
            return model

        def step(self, batch, backward):
            loss = nn.functional.mse_loss(self.predictor(self.model)(batch[0]), batch[1])
            backward(loss)
            return {"loss": loss.detach()}

        def predictor(self, model):
            return Doubled(model)

    net = nn.Linear(3, 1)
    data = torch.randn(10, 3), torch.randn(10, 1)
    row = fit(net, data, val=data, rule=Rule(), epochs=1, progress=False).history.rows[-1]
    expected = nn.functional.mse_loss(2 * net(data[0]), data[1])
    assert row["val_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
