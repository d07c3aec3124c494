"""Masks from a policy: its score function, both objectives, the masks, and what each gradient reaches."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Beta
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.engine import fit, seeded
from torchfolio.engine.recipes import sgd
from torchfolio.models import ConvNet
from torchfolio.training.mask_rendering import render_mask
from torchfolio.training.noise_mask import (
    BetaMaskPolicy,
    LogSumExp,
    NoiseMaskPretraining,
    Reinforce,
    average_checkpoints,
)
from torchfolio.training.snapshots import Snapshots


def batch(n: int = 12, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, side, side, generator=generator), torch.randint(3, (n,), generator=generator)


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def policy(grid: int | tuple[int, ...] = 4, **options) -> BetaMaskPolicy:
    with seeded(1):
        features = nn.Sequential(nn.Conv2d(2, 3, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return BetaMaskPolicy(features, 12, grid, **options)


def prepared(**options):
    net, rule = classifier().train(), NoiseMaskPretraining(policy(), **options)
    pair = rule.prepare(net, batch())
    return net, rule, pair


# The score function and the objectives


def test_score_function_estimates_the_gradient_and_a_baseline_lowers_its_variance():
    torch.manual_seed(0)
    a, b = torch.tensor(2.0, dtype=torch.float64), torch.tensor(3.0, dtype=torch.float64)
    m = Beta(a, b).sample((200_000,))
    psi = torch.special.digamma
    scores = torch.stack([m.log() - psi(a) + psi(a + b), (1 - m).log() - psi(b) + psi(a + b)], 1)
    exact = torch.tensor([0.12, -0.08], dtype=torch.float64)
    spread = {}
    for baseline in (0.0, 0.4):
        terms = (m - baseline)[:, None] * scores
        error = terms.std(0) / len(m) ** 0.5
        assert ((terms.mean(0) - exact).abs() <= 3 * error).all()
        spread[baseline] = terms.var(0)
    assert (spread[0.4] < spread[0.0]).all()


def test_reinforce_gradient_is_the_score_function():
    losses, logits = torch.rand(5), torch.randn(5, 2, 6, dtype=torch.float64, requires_grad=True)
    beta = Beta(*logits.exp().unbind(1))
    m = beta.sample()
    Reinforce()(losses, beta.log_prob(m), losses.mean()).backward()
    a, b = logits.detach().exp().unbind(1)
    psi = torch.special.digamma
    score = torch.stack([a * (m.log() - psi(a) + psi(a + b)), b * ((1 - m).log() - psi(b) + psi(a + b))], 1)
    expected = (losses - losses.mean()).double()[:, None, None] * score / (5 * 6)
    torch.testing.assert_close(logits.grad, expected)


def test_lse_is_the_codes_product_and_scales_the_classifiers_gradient():
    log_p, w = torch.randn(5, 6), torch.randn(5, requires_grad=True)
    value = LogSumExp()(w**2, log_p, 0.0)
    assert value.item() == (torch.logsumexp(log_p, 1) * (w**2).mean()).mean().item()
    (got,) = torch.autograd.grad(value, w)
    (plain,) = torch.autograd.grad((w**2).mean(), w)
    torch.testing.assert_close(got, plain * log_p.logsumexp(1).mean())


@pytest.mark.parametrize("objective", ["reinforce", "lse"])
def test_the_losses_gradient_never_reaches_the_policy(objective):
    """A classifier that is worse by a constant factor of its gradient leaves REINFORCE's policy gradient alone."""
    net, rule, pair = prepared(objective=objective)
    x, y = batch()
    torch.manual_seed(3)
    cells = pair.policy(x).sample()
    assert not cells.requires_grad
    seen = {}

    def capture(losses, log_p, baseline):
        seen["classifier"] = torch.autograd.grad(losses.sum(), list(pair.policy.parameters()), retain_graph=True, allow_unused=True)  # fmt: skip
        seen["policy"] = torch.autograd.grad(log_p.sum(), list(net.parameters()), retain_graph=True, allow_unused=True)
        return losses.mean() + log_p.mean()

    rule._objective = capture
    rule.step((x, y), torch.Tensor.backward)
    assert all(g is None for g in seen["classifier"] + seen["policy"])
    assert all(p.grad is not None for p in pair.parameters())


def test_reinforce_leaves_the_classifiers_gradient_as_it_is_under_the_mask():
    net, rule, pair = prepared()
    x, y = batch()
    other, twin = copy.deepcopy(net), copy.deepcopy(pair.policy)
    torch.manual_seed(5)
    rule.step((x, y), torch.Tensor.backward)
    torch.manual_seed(5)
    mask = rule._mask(twin(x).sample().clamp(1e-6, 1 - 1e-6), x, twin)
    F.cross_entropy(other(x * mask), y).backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# The policy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_policy_mixes_the_old_base_and_moves_it_without_a_gradient(dtype):
    judge, (x, _) = policy().to(dtype), batch()
    x = x.to(dtype)
    old, calls = judge.base.clone(), []
    judge.features.register_forward_hook(lambda *_: calls.append(1))
    beta = judge(x)
    assert len(calls) == 1
    twin = policy().to(dtype)
    features = twin.features(x)
    logits = torch.stack([twin.a(features), twin.b(features)], 1)
    logits = logits if dtype == torch.float64 else logits.float()
    torch.testing.assert_close(beta.concentration1, (0.9 * old.to(logits) + 0.1 * logits)[:, 0].exp())
    torch.testing.assert_close(judge.base, old.lerp(logits.mean(0).to(old), 0.01))
    assert not judge.base.requires_grad
    moved = judge.base.clone()
    judge.eval()(x[:1])
    assert torch.equal(judge.base, moved)
    with pytest.raises(ValueError, match="at least two examples"):
        judge.train()(x[:1])


def test_masks_depend_on_the_image_and_on_the_mode():
    _, rule, _ = prepared()
    x, _ = batch()
    masks = rule.masks(x, expected=True)
    assert masks.shape == (12, 1, 8, 8)
    assert masks.std(0).max() > 1e-4
    assert not torch.equal(rule.masks(x), rule.masks(x))
    assert rule.base_mask(x).shape == (1, 1, 8, 8)


def test_extreme_logits_stay_finite():
    _, rule, pair = prepared()
    pair.policy.base.fill_(1e4)
    scalars = rule.step(batch(), torch.Tensor.backward)
    assert all(torch.isfinite(v) for v in scalars.values())
    assert all(p.grad.isfinite().all() for p in pair.parameters())


# The masks


@pytest.mark.parametrize(
    ("size", "grid", "kernel"), [((16, 16), (8, 8), 3), ((13, 20), (4, 5), 5), ((8, 8), (8, 8), 1)]
)
def test_rendering_is_nearest_then_gaussian(size, grid, kernel):
    cells = torch.rand(3, *grid, dtype=torch.float64)
    places = torch.arange(kernel, dtype=torch.float64) - kernel // 2
    line = (-0.5 * places**2 / 1.5**2).exp()
    line = line / line.sum()
    mask = F.pad(F.interpolate(cells[:, None], size=size), (kernel // 2,) * 4, mode="reflect")
    expected = F.conv2d(mask, (line[:, None] * line)[None, None])
    torch.testing.assert_close(render_mask(cells, size, kernel=kernel, sigma=1.5), expected)


def test_masks_stay_in_range_and_a_constant_stays():
    torch.testing.assert_close(render_mask(torch.full((1, 5, 5), 0.3), (32, 32)), torch.full((1, 1, 32, 32), 0.3))


# The rule


@pytest.mark.parametrize("objective", ["reinforce", "lse"])
def test_rule_keeps_the_contract(objective):
    check_rule(lambda: NoiseMaskPretraining(policy(), objective=objective, baseline="ema"), classifier(), batch())


@pytest.mark.parametrize("ignore_index", [-100, 1])
@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 5.0, 0.5])])
@pytest.mark.parametrize("places", [(), (8, 8)])
def test_classes_weigh_and_are_passed_over_as_in_the_criterion(ignore_index, weight, places):
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 1) if places else classifier()
    loss = nn.CrossEntropyLoss(weight, ignore_index=ignore_index)
    rule, (x, _) = NoiseMaskPretraining(policy(), loss=loss, baseline=None), batch()
    y = torch.randint(3, (12, *places))
    y[:2] = ignore_index
    rule.prepare(net, (x, y))
    seen = {}
    net.register_forward_hook(lambda _m, _i, output: seen.update(output=output))
    scalars = rule.step((x, y), lambda value: seen.update(value=value))
    torch.testing.assert_close(scalars["loss"], loss(seen["output"], y).detach())


def test_rows_signals_and_non_square_images_with_the_default_policy():
    for x in (torch.randn(9, 6), torch.randn(9, 2, 16), torch.randn(9, 1, 10, 14)):
        net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 1))
        rule = NoiseMaskPretraining()
        fit(net, (x, torch.randn(9)), rule=rule, epochs=1, batch_size=5, device="cpu")
        assert rule.masks(x).shape == ((9, 6) if x.dim() == 2 else (9, 1, *x.shape[2:]))


def test_policy_gets_its_own_rate():
    net, rule, pair = prepared(policy_lr_scale=0.25)
    made = rule.optimizer(sgd(0.4))(pair.parameters())
    assert [g["lr"] for g in made.param_groups] == [0.4, 0.1]
    assert [len(g["params"]) for g in made.param_groups] == [len(list(m.parameters())) for m in (net, pair.policy)]


def test_policy_learns_where_a_frozen_classifier_looks():
    torch.manual_seed(0)
    x = torch.randn(256, 1, 8, 8) + 1
    y = (x[..., :4].mean((1, 2, 3)) > 1).long()
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        weight = torch.zeros(8, 8)
        weight[:, :4] = 0.5
        net[1].weight.copy_(torch.stack([-weight.flatten(), weight.flatten()]))
        net[1].bias.copy_(torch.tensor([16.0, -16.0]))  # right for the whole image alone
    net.requires_grad_(False)
    rule = NoiseMaskPretraining(BetaMaskPolicy(nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), 8, 2), kernel=1)
    adam = lambda p: torch.optim.Adam(p, lr=0.02)  # noqa: E731
    fit(net, (x, y), rule=rule, optimizer=adam, max_steps=250, batch_size=64, device="cpu")
    mask = rule.masks(x, expected=True)
    assert mask[..., :4].mean() - mask[..., 4:].mean() > 0.1


def test_snapshots_keep_the_last_epochs_and_their_mean():
    net, snapshots = classifier(), Snapshots(last=2)
    fit(net, batch(), epochs=3, batch_size=6, callbacks=[snapshots], device="cpu")
    assert len(snapshots.states) == 2
    mean = average_checkpoints(snapshots.states)
    torch.testing.assert_close(
        mean["0.weight"], (snapshots.states[0]["0.weight"] + snapshots.states[1]["0.weight"]) / 2
    )
    assert mean["1.num_batches_tracked"] == 6
    assert mean["1.num_batches_tracked"].dtype == torch.int64
    net.load_state_dict(mean)
    for wrong in ([], [mean, {}], [{k: v * float("nan") for k, v in mean.items()}]):
        with pytest.raises(ValueError, match="expected"):
            average_checkpoints(wrong)


def test_policy_copies_and_pickles():
    judge, (x, _) = policy().eval(), batch()
    for other in (copy.deepcopy(judge), pickle.loads(pickle.dumps(judge))):
        assert torch.equal(other(x).mean, judge(x).mean)
    assert "grid=(4, 4)" in repr(judge)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: policy(0), "side of the grid"),
        (lambda: policy(mix=float("nan")), "mix"),
        (lambda: NoiseMaskPretraining(policy(), objective="score"), "objective"),
        (lambda: NoiseMaskPretraining(policy(), baseline="median"), "baseline"),
        (lambda: NoiseMaskPretraining(policy(), kernel=4), "odd kernel"),
        (lambda: NoiseMaskPretraining(policy(), policy_lr_scale=0), "policy_lr_scale"),
        (lambda: Reinforce(2), "sign"),
        (lambda: render_mask(torch.rand(1, 9, 9), (8, 8)), "no larger"),
        (lambda: render_mask(torch.rand(1, 4, 4), (8, 8), kernel=4, sigma=1), "odd kernel"),
        (lambda: NoiseMaskPretraining(policy(20)).prepare(classifier(), batch()), "no larger"),
        (lambda: NoiseMaskPretraining(policy((5,))).prepare(classifier(), batch()), "grid of one side"),
        (lambda: BetaMaskPolicy(nn.Flatten(), 5, 2)(batch()[0]), "feature_dim"),
        (lambda: BetaMaskPolicy(nn.LSTM(3, 5), 5, (3,))(torch.rand(2, 3)), "got tuple"),
        (
            lambda: NoiseMaskPretraining(policy()).prepare(classifier(), (torch.rand(4, 1, 8, 8), None)),
            "policy cannot take",
        ),
        (lambda: prepared()[1].masks(batch()[0] * float("nan")), "finite"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_policy_inside_the_classifier_is_refused():
    net = ConvNet(4, 2, (2, 2))
    with pytest.raises(ValueError, match="shares parameters"):
        NoiseMaskPretraining(BetaMaskPolicy(net, 4, 2)).prepare(net, batch())
    with pytest.raises(TypeError, match="BetaMaskPolicy, got Linear"):
        NoiseMaskPretraining(nn.Linear(2, 2)).prepare(net, batch())
    with pytest.raises(RuntimeError, match="prepare"):
        NoiseMaskPretraining().masks(batch()[0])
