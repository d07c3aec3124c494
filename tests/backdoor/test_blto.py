"""Bi-level trigger optimisation: the outer gradient, the ball, who is poisoned, lives of surrogates, and CTRL."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchfolio.backdoor import BLTO, GeneratorTrigger, evaluate_ssl_backdoor
from torchfolio.backdoor.frequency import ctrl_trigger
from torchfolio.backdoor.trigger_nets import TriggerNet, UniversalPattern
from torchfolio.data.views import ColorJitter, Compose, ResizedCrop
from torchfolio.measure import knn_accuracy
from torchfolio.training.amcl import AMCL
from torchfolio.training.contrastive_learning import BYOL, SimCLR, SimSiam

EPS = 0.1
VIEW = Compose([ResizedCrop((0.5, 1.0)), ColorJitter(0.4, 0.4, 0.2, 0.1)])


def encoder(channels: int = 3) -> nn.Module:
    conv = nn.Conv2d(channels, 6, 3, 2, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())


def data(n: int = 40, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return (255 * x).round() / 255, torch.arange(n) % 4


def attack(channels: int = 3, rule=SimSiam, **settings) -> BLTO:
    torch.manual_seed(0)
    settings = {
        "rounds": 2, "inner_steps": 1, "outer_steps": 1, "reinit_every": 1, "batch_size": 8, "rate": 0.1, "eps": EPS,
        "view": VIEW, "generator": TriggerNet(channels, EPS, width=4, blocks=1), "lr": 1e-2, **settings,
    }  # fmt: skip
    return BLTO(lambda: encoder(channels), lambda: rule(VIEW, hidden=8, out_dim=6), 2, **settings)


@pytest.mark.parametrize("generator", ["network", "pattern"])
def test_outer_gradient_is_the_finite_difference(generator):
    """The gradient goes through the augmentations: with their seeds fixed it is that of a function of psi."""
    torch.manual_seed(0)
    net = TriggerNet(3, EPS, width=2, blocks=1) if generator == "network" else UniversalPattern((3, 8, 8), EPS)
    made, surrogate = attack(generator=net), encoder().double().eval()
    made.trigger = GeneratorTrigger(net, EPS).double().eval()
    x = 0.2 + 0.6 * data()[0][:6].double()
    weight = next(net.parameters())

    def objective():
        torch.manual_seed(7)
        return made.objective(surrogate, x, x.flip(0))

    (gradient,) = torch.autograd.grad(objective(), weight)
    place = tuple(int(i) for i in np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
    step = 1e-6
    with torch.no_grad():
        weight[place] += step
        above = objective()
        weight[place] -= 2 * step
        below = objective()
    assert float((above - below) / (2 * step)) == pytest.approx(float(gradient[place]), rel=1e-4)


def test_without_views_the_objective_is_a_cosine():
    made, surrogate = attack(augment_outer=False), encoder().eval()
    made.trigger = GeneratorTrigger(nn.Identity(), EPS)
    x = data()[0]
    wanted = F.cosine_similarity(surrogate(x[:5]), surrogate(x[5:10])).mean()
    torch.testing.assert_close(made.objective(surrogate, x[:5], x[5:10]), wanted)


@pytest.mark.parametrize("net", [TriggerNet(1, 0.0, width=2), UniversalPattern((1, 8, 8), 0.0)])
def test_without_room_nothing_changes(net):
    x = data(channels=1)[0]
    assert torch.equal(GeneratorTrigger(net, eps=0.0).eval()(x), x)


def test_success_without_change_is_the_confusion_into_the_target():
    x, y = data(80, channels=1)
    torch.manual_seed(0)
    net = encoder(1).eval()
    trigger = GeneratorTrigger(UniversalPattern((1, 8, 8), 0.0), eps=0.0)
    report = evaluate_ssl_backdoor(
        net, (x[:60], y[:60]), (x[60:], y[60:]), trigger, 2, probe=lambda *a: knn_accuracy(*a, k=3)
    )
    with torch.no_grad():
        f = F.normalize(net(x), dim=1)
    others = y[60:] != 2
    wanted = knn_accuracy(f[:60], y[:60], f[60:][others], torch.full((int(others.sum()),), 2), k=3)
    assert report.asr == wanted
    assert report.accuracy == knn_accuracy(f[:60], y[:60], f[60:], y[60:], k=3)
    pairs = (f[60:, None] - f[None, 60:]).square().sum(-1)
    i, j = torch.triu_indices(20, 20, 1)
    assert report.uniformity == pytest.approx(float((-2 * pairs[i, j]).exp().mean().log()), abs=1e-5)


@pytest.mark.parametrize("rule", [SimSiam, SimCLR, BYOL])
def test_poison_keeps_labels_and_the_ball(rule, tmp_path):
    x, y = data()
    made = attack(rule=rule)
    before = torch.get_rng_state()
    made.fit((x, y))
    assert torch.equal(before, torch.get_rng_state())
    poisoned = made.poison((x, y), seed=0)
    assert int(poisoned.is_poison.sum()) == 4
    assert (poisoned.y_true[poisoned.is_poison] == 2).all()
    assert (poisoned.y == y.numpy()).all()
    with torch.no_grad():
        triggered = made.trigger(x)
    assert float((triggered - x).abs().max()) <= EPS + 1e-7
    assert not torch.equal(triggered, x)
    assert not made.trigger.training
    torch.testing.assert_close(made.trigger(x[:1]), triggered[:1], atol=1e-5, rtol=1e-5)
    assert [len(h) for h in (made.history.similarity, made.history.surrogate, made.history.lives)] == [2, 2, 2]
    again = attack(rule=rule).fit(torch.utils.data.TensorDataset(x, y))
    for a, b in zip(made.trigger.parameters(), again.trigger.parameters(), strict=True):
        assert torch.equal(a, b)
    copied = pickle.loads(pickle.dumps(made.trigger))
    assert torch.equal(copied(x), triggered)
    assert torch.equal(copy.deepcopy(made.trigger)(x), triggered)
    assert "TriggerNet" in repr(made.trigger)


def test_lives_of_surrogates():
    born = []

    def fresh():
        born.append(1)
        return encoder()

    for settings, lives in (
        ({"reinit_every": 2}, 3),
        ({"reinit_every": None}, 1),
        ({"bilevel": False}, 1),
        ({"bilevel": False, "inner_steps": 0}, 1),
    ):
        born.clear()
        made = attack(rounds=6, **settings)
        made.encoder_fn = fresh
        made.fit(data())
        assert len(born) == lives
        assert len(made.history.surrogate) == (6 if made.bilevel else 0)


def test_the_trigger_comes_near_the_target():
    x, y = data(64)
    x[y == 2] = (x[y == 2] + torch.tensor([0.5, 0.0, 0.0]).view(3, 1, 1)).clamp(0, 1)  # the target is red
    pattern = UniversalPattern((3, 8, 8), 0.3)
    made = attack(
        rounds=20, outer_steps=3, bilevel=False, inner_steps=3, eps=0.3, generator=pattern, lr=0.1, rate=0.05
    ).fit((x, y))
    for triggered, clean in made.history.lives:
        assert triggered > clean + 0.02
    assert made.history.similarity[-1] > made.history.similarity[0]
    assert made.fit((x, y), target_images=x[y == 2][:3]).history.lives


def test_features_of_the_backbone_serve_any_rule():
    x, y = data()
    made = attack(feature="backbone")
    made.rule_fn = lambda: AMCL(VIEW, out_dim=8)
    made.fit((x, y))
    made.feature = "projector"
    with pytest.raises(ValueError, match="backbone"):
        made.fit((x, y))


def cut(x, generator=None):
    return x.detach()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attack(eps=0), "eps"),
        (lambda: attack(eps=math.nan), "eps"),
        (lambda: attack(feature="head"), "feature"),
        (lambda: attack(rounds=0), "rounds"),
        (lambda: attack().fit((data()[0], data()[1].clamp(max=1))), "target class 2"),
        (lambda: attack().fit((data()[0], data()[1]), target_images=torch.zeros(0, 3, 8, 8)), "target_images"),
        (lambda: attack().fit((255 * data()[0], data()[1])), r"\[0, 1\]"),
        (lambda: attack(rate=0.5).fit(data()), "poisoned samples"),
        (lambda: attack(view=cut).fit(data()), "gradient is cut"),
        (lambda: TriggerNet(3, width=2)(torch.rand(1, 3, 9, 8)), "multiples of 4"),
        (lambda: ctrl_trigger((2, 8, 8)), "one or three"),
        (lambda: ctrl_trigger((3, 48, 40)), "tile"),
        (lambda: ctrl_trigger((3, 32, 32), coefficients=[(0, 32)]), "column"),
        (lambda: evaluate_ssl_backdoor(nn.Conv2d(3, 2, 3), data(), data(), lambda x: x, 2), "features"),
        (lambda: evaluate_ssl_backdoor(encoder(), data(), (data()[0][2:3], torch.tensor([2])), lambda x: x, 2), "other classes"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(RuntimeError, match="fit first"):
        attack().poison(data(), seed=0)


def test_ctrl_changes_two_coefficients_of_u_and_v():
    scipy = pytest.importorskip("scipy.fft")
    delta = ctrl_trigger((3, 64, 32), 50 / 255).delta.double()
    to_yuv = torch.linalg.inv(torch.tensor([[1, 0, 1.140], [1, -0.395, -0.581], [1, 2.032, 0]], dtype=torch.float64))
    yuv = torch.einsum("ij,jhw->ihw", to_yuv, delta).numpy()
    for window in (yuv[:, :32], yuv[:, 32:]):
        spectrum = np.stack([scipy.dctn(plane, norm="ortho") for plane in window])
        wanted = np.zeros((3, 32, 32))
        wanted[1:, 15, 15] = wanted[1:, 31, 31] = 50 / 255
        np.testing.assert_allclose(spectrum, wanted, atol=1e-6)
    assert ctrl_trigger((1, 8, 8)).delta.shape == (1, 8, 8)
