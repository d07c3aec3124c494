"""Smoothing averages probabilities, the steps are those of the paper, and a target is found from single images."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.contracts.detectors import Left, check_model_detector
from torchfolio.backdoor import AllToOne, PatchTrigger
from torchfolio.backdoor.denoising import OneStepDenoiser
from torchfolio.backdoor.inversion import fast_copy, share_interval
from torchfolio.backdoor.smoothinv import SmoothedClassifier, SmoothInv, budget
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import load
from torchfolio.models import BasicBlock


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)
    )
    net.train()(torch.rand(32, 3, 6, 6))  # statistics that are not trivial
    return net.eval(), torch.rand(5, 3, 6, 6)


@pytest.fixture(scope="module")
def victims():
    data = load("digits", normalize=False, val=0)
    trigger, labels = PatchTrigger.checkerboard(data.shape, size=2, margin=0), AllToOne(0, 10)
    bad, clean = (victim(data, trigger, labels, rate=rate, epochs=5, lr=0.1, seed=0).model for rate in (0.1, 0))
    return data, bad, clean


def test_without_noise_it_is_the_softmax(small):
    net, x = small
    torch.testing.assert_close(SmoothedClassifier(net, 0.0, 1)(x), net(x).softmax(1))


def test_it_averages_probabilities_of_each_image_by_itself(small):
    net, x = small
    smooth = SmoothedClassifier(net, 0.3, 7, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(5, 7, 3, 6, 6, generator=torch.Generator().manual_seed(3))
    by_hand = torch.stack([net(x[b] + 0.3 * noise[b]).softmax(1).mean(0) for b in range(5)])
    torch.testing.assert_close(smooth(x), by_hand)
    torch.testing.assert_close(smooth(x).sum(1), torch.ones(5))
    chunked = SmoothedClassifier(net, 0.3, 7, chunk=7, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(chunked(x), by_hand)
    assert not torch.equal(smooth(x), smooth(x))  # fresh noise


def test_the_mean_over_seeds_does_not_depend_on_the_number_of_draws(small):
    net, x = small
    means, errors = [], []
    for n, seeds in ((40, 100), (400, 20)):
        values = torch.stack([SmoothedClassifier(net, 0.5, n, generator=torch.Generator().manual_seed(s))(x[:1])[0, 0]
                              for s in range(seeds)])  # fmt: skip
        means.append(values.mean())
        errors.append(values.std() / seeds**0.5)
    assert abs(means[0] - means[1]) < 3 * (errors[0] ** 2 + errors[1] ** 2).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_it_is_descent_by_normalised_momentum(small, dtype):
    net, x = copy.deepcopy(small[0]).to(dtype), small[1][0].to(dtype)
    inverted = SmoothInv(0.0, eps=0.7, steps=25, n=1).invert(net, x, 2)
    v, delta = torch.zeros_like(x), torch.zeros_like(x)
    for _ in range(25):
        moved = (x + delta).requires_grad_(True)
        (g,) = torch.autograd.grad(-net(moved[None]).log_softmax(1)[0, 2], moved)
        v = 0.9 * v + g / g.norm()
        delta = (x + delta - 0.7 / 20 * v).clamp(0, 1) - x
        delta = delta * min(1.0, 0.7 / float(delta.norm()))
    assert inverted.delta.dtype == dtype
    torch.testing.assert_close(inverted.delta, delta, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("sigma", "n"), [(0.0, 1), (0.5, 8)])
def test_the_first_step_on_a_linear_network_follows_its_weights(sigma, n):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    w = net[1].weight[1] - net[1].weight[0]  # pyright: ignore[reportIndexIssue]
    delta = SmoothInv(sigma, eps=0.1, steps=1, n=n).invert(net, torch.full((3, 2, 2), 0.5), 1).delta
    assert float(torch.cosine_similarity(delta.flatten(), w.detach(), dim=0)) > 0.999


def test_iterates_stay_in_the_box_and_the_ball(small):
    net, x = small
    for steps in range(1, 12):
        found = SmoothInv((0.1, 0.3), eps=0.4, steps=steps, lr=0.2, n=4).invert(net, x[0], 1)
        assert float(found.delta.norm()) <= 0.4 * (1 + 1e-5)
        assert 0 <= float((x[0] + found.delta).min()) <= float((x[0] + found.delta).max()) <= 1
        assert found.history.shape == (steps,)


def test_a_batch_is_as_good_as_one_by_one_and_chunks_change_nothing(small):
    net, x = small
    for chunk in (4, 7, 400):
        made = SmoothInv(0.0, eps=0.5, steps=12, chunk=chunk, patience=None)
        found = made._inversions(fast_copy(net), x, [0, 3], torch.Generator())
        for b in range(5):
            for k, t in enumerate((0, 3)):
                with (
                    pytest.warns(UserWarning, match="before")
                    if int(net(x[b : b + 1]).argmax()) == t
                    else torch.no_grad()
                ):
                    torch.testing.assert_close(found.delta[b, k], made.invert(net, x[b], t).delta, atol=1e-5, rtol=0)


def test_the_fast_copy_answers_as_the_network_and_leaves_it(small):
    net, x = small
    block = nn.Sequential(BasicBlock(3, 3, 1, "A"), copy.deepcopy(net)).eval()
    for one in (net, block, nn.Sequential(nn.Flatten(), nn.Linear(108, 2))):
        before = Left(one)
        torch.testing.assert_close(fast_copy(one)(x), one(x))
        before.check()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fast_copy(net).modules())


def test_the_target_is_found_and_a_clean_network_has_none(victims):
    data, bad, clean = victims
    x = data.test.tensors[0]
    finder = SmoothInv((0.12, 0.25), eps=1.25, steps=40, n=6)
    profile = finder.identify_target(bad, x[1], x[10:74])
    assert profile.target == 0
    assert finder.identify_target(bad, x[1], x[10:74]).scores.equal(profile.scores)
    assert finder.identify_target(bad, x[1:3]).scores.argmax() == 0  # from copies of the images alone
    assert finder.identify_target(clean, x[1], x[10:74]).target is None
    found = finder.invert(bad, x[3:6], 0)
    other = x[100:][data.test.tensors[1][100:] != 0]
    assert found.asr(bad, other) > 0.7
    assert found.sigma in (0.12, 0.25)
    assert pickle.loads(pickle.dumps(found.trigger)).delta.equal(found.trigger.delta)
    assert (bad(found.trigger(other)).argmax(1) == 0).double().mean() == pytest.approx(found.asr(bad, other))


def test_it_keeps_the_contract_and_says_how_sure_it_is(victims):
    data, bad, clean = victims
    pair = (data.test.tensors[0][:60], data.test.tensors[1][:60])
    make = lambda: SmoothInv(0.12, eps=1.25, steps=30, n=5)  # noqa: E731
    verdict = check_model_detector(make, bad, pair)
    assert verdict.is_backdoored
    assert {t for _, t in verdict.pairs} == {0}
    said = " ".join(verdict.sentences([f"digit {k}" for k in range(10)]))
    assert "towards the class digit 0" in said
    assert "95 % interval" in said
    assert len(make().pictures(verdict, [str(k) for k in range(10)])) == 2
    other = check_model_detector(make, clean, data.test.tensors[0][:60])
    assert not other.is_backdoored
    assert "no proof" in " ".join(other.sentences())
    with pytest.warns(UserWarning, match="cut short"):
        short = SmoothInv(0.12, steps=30, n=5, chunk=5).scan(bad, pair, budget_seconds=1e-6)
    assert not short.complete


def test_a_diffusion_model_cleans_images_first(small):
    net, x = small
    alphas = torch.linspace(0.999, 0.01, 100, dtype=torch.float64)

    class Knowing(nn.Module):
        """The exact noise where the image is grey."""

        def forward(self, z, t):
            a = alphas[t[0]].float()
            return z / (1 - a).sqrt()

    denoiser = OneStepDenoiser(Knowing(), alphas)
    t = denoiser.step(0.25)
    assert ((1 - alphas[t]) / alphas[t]).sqrt() >= 0.5 > ((1 - alphas[t - 1]) / alphas[t - 1]).sqrt()
    torch.testing.assert_close(denoiser(torch.rand(2, 3, 6, 6), 0.25), torch.full((2, 3, 6, 6), 0.5))
    torch.testing.assert_close(SmoothedClassifier(net, 0.25, 3, denoiser)(x), net(torch.full_like(x, 0.5)).softmax(1))
    assert OneStepDenoiser(Knowing()).step(0.0) == 0
    with pytest.raises(ValueError, match="sigma up to"):
        denoiser.step(100.0)
    with pytest.raises(ValueError, match="fall within"):
        OneStepDenoiser(Knowing(), alphas.flip(0))


def test_intervals_and_budgets():
    assert share_interval(0, 0) == (0, 1)
    low, high = share_interval(10, 10)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 10)), 1)
    assert budget((3, 224, 224)) == 5
    assert budget((1, 28, 28)) == budget((3, 32, 32)) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, x: SmoothInv(eps=0.0), "eps"),
        (lambda net, x: SmoothInv(eps=float("nan")), "eps"),
        (lambda net, x: SmoothInv(()), "at least one sigma"),
        (lambda net, x: SmoothInv(-0.1), "sigma"),
        (lambda net, x: SmoothInv(n=0), "n"),
        (lambda net, x: SmoothInv(0.1).invert(net, x[0] + 1, 0), r"\[0, 1\]"),
        (lambda net, x: SmoothInv(0.1).invert(net, x * torch.nan, 0), "finite"),
        (lambda net, x: SmoothInv(0.1).invert(net, x[0], 4), "target"),
        (lambda net, x: SmoothInv(0.1).identify_target(net, x[0], x[:0]), "pool|x"),
    ],
)
def test_what_is_refused(small, call, message):
    with pytest.raises(ValueError, match=message):
        call(*small)


def test_default_net_is_a_network_on_pixels():
    data = load("digits", normalize=False, val=0)
    assert default_net(data)(data.test.tensors[0][:2]).shape == (2, 10)
