"""Concatenated features: averaged heads, copies that add nothing, probes, distillation, episodes in one pass."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.nn import functional as F

from tests.contracts.rules import check_rule
from torchfolio.bundle import Manifest
from torchfolio.engine import evaluate, fit, seeded
from torchfolio.engine.modes import random_state
from torchfolio.engine.recipes import sgd
from torchfolio.measure import outputs
from torchfolio.models import MLP, ConvNet
from torchfolio.training.episodes import fit_episodes, load_episodes, save_episodes, train_episodes
from torchfolio.training.rich_representations import (
    Concatenated,
    CosineClassifier,
    LinearProbe,
    RichDistillation,
    RichFeatures,
    average_heads,
    split_head,
    two_stage_finetune,
    vrex_penalty,
)


def blobs(n: int = 90, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return torch.randn(n, 6, generator=generator) + 2 * F.one_hot(y, 6).float(), y


def nets(n: int = 3, classes: int = 3, **options) -> list[nn.Module]:
    made = []
    for k in range(n):
        with seeded(k):
            made.append(MLP(6, classes, (5 + k, 4), norm="batch", dropout=0.2).eval())
    return made


# Heads and copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_averaged_heads_give_the_mean_of_the_logits(dtype):
    models = [m.to(dtype) for m in nets()]
    pairs = [split_head(m) for m in models]
    joint, head = Concatenated(t for t, _ in pairs), average_heads([h for _, h in pairs])
    x = blobs()[0].to(dtype)
    expected = torch.stack([m(x) for m in models]).mean(0)
    assert (head(joint(x)) - expected).abs().max() < 1e-5
    assert joint.feature_dims == (4, 4, 4)
    torch.testing.assert_close(joint(x)[:, joint.block(1)], pairs[1][0](x))
    assert head.weight.dtype == dtype


def test_head_is_found_in_nested_networks_and_the_network_stays():
    net = ConvNet(4, 1, (3, 5)).eval()
    before = copy.deepcopy(net.state_dict())
    trunk, head = split_head(net)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(head(trunk(x)), net(x))
    assert trunk(x).shape == (2, 5)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_copies_of_a_trunk_are_one_copy_under_a_smaller_penalty():
    trunk, n, penalty = split_head(nets(1)[0])[0].double(), 4, 0.7
    z = trunk(blobs()[0].double()).detach()
    y = F.one_hot(blobs()[1]).double()
    many = Concatenated([copy.deepcopy(trunk) for _ in range(n)])(blobs()[0].double())

    def predict(f, strength):
        return f @ torch.linalg.solve(f.T @ f + strength * torch.eye(f.shape[1], dtype=f.dtype), f.T @ y)

    assert (predict(many, penalty) - predict(z, penalty / n)).abs().max() < 1e-6
    labels = blobs()[1].numpy()
    c = 0.3
    twin = LogisticRegression(C=c, tol=1e-12, max_iter=5000).fit(many.numpy(), labels)
    one = LogisticRegression(C=c * n, tol=1e-12, max_iter=5000).fit(z.numpy(), labels)
    np.testing.assert_allclose(twin.predict_proba(many.numpy()), one.predict_proba(z.numpy()), atol=1e-5)


# The concatenation


def test_frozen_trunks_stay_in_evaluation_mode_and_untouched():
    joint = Concatenated(split_head(m)[0] for m in nets())
    before = copy.deepcopy(joint.state_dict())
    net = nn.Sequential(joint, nn.Linear(12, 3)).train()
    assert not any(m.training for m in joint.modules())
    fit(net, blobs(), optimizer=sgd(0.1), epochs=1, batch_size=30, device="cpu")
    assert all(torch.equal(v, before[k]) for k, v in joint.state_dict().items())
    tuned = Concatenated([split_head(nets()[0])[0]], frozen=False)
    assert tuned.training
    assert all(p.requires_grad for p in tuned.parameters())


def test_blocks_of_unit_length_and_copies():
    joint = Concatenated((split_head(m)[0] for m in nets()), normalize=True)
    x = blobs()[0]
    norms = joint(x)[:, joint.block(2)].norm(dim=1)
    torch.testing.assert_close(norms[norms > 0], torch.ones(int((norms > 0).sum())))
    for other in (copy.deepcopy(joint), pickle.loads(pickle.dumps(joint))):
        assert torch.equal(other(x), joint(x))
    assert "normalize=True" in repr(joint)


# Probes and fine-tuning


def test_probe_computes_features_once_and_learns():
    joint, calls = Concatenated(split_head(m)[0] for m in nets()), []
    joint.trunks[0].register_forward_hook(lambda *_: calls.append(1))
    state = random_state()
    probe = LinearProbe(joint, 3).fit(*blobs(91), lr=0.1, batch_size=30)
    assert torch.equal(random_state()["torch"], state["torch"])
    assert len(calls) == 1
    assert evaluate(probe, blobs(seed=1))["accuracy"] > 0.8
    assert not probe.train().features.training
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        LinearProbe(joint, 2).fit(*blobs())


def test_two_stages_start_as_the_ensemble_of_the_tuned_networks():
    models, tuned = nets(), []
    before = [copy.deepcopy(m.state_dict()) for m in models]

    def finetune(net, seed):
        fit(net, blobs(), optimizer=sgd(0.05), epochs=2, batch_size=30, seed=seed, device="cpu")
        tuned.append(net)

    joint = two_stage_finetune(models, finetune, blobs(), epochs=0)
    x = blobs()[0]
    torch.testing.assert_close(joint(x), torch.stack([m.eval()(x) for m in tuned]).mean(0), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, b[k]) for m, b in zip(models, before, strict=True) for k, v in m.state_dict().items())
    trained = two_stage_finetune(models, finetune, blobs(), epochs=2)
    assert not torch.equal(trained[1].weight, joint[1].weight)


def test_cosine_classifier_and_vrex():
    head = CosineClassifier(4, 3, scale=7.0)
    f = torch.randn(5, 4)
    torch.testing.assert_close(head(f), 7 * F.cosine_similarity(f[:, None], head.weight[None], dim=-1))
    risks = torch.tensor([1.0, 3.0])
    assert vrex_penalty(risks, 0.5).item() == 2.5


# Distillation


@pytest.mark.parametrize(("heads", "count"), [("separate", 3), ("averaged", 1)])
def test_distillation_is_the_equation(heads, count):
    teachers, tau = nets(), 4.0
    trunk = split_head(nets(1)[0])[0].eval()
    rule = RichDistillation(teachers, tau, heads)
    module = rule.prepare(trunk, blobs())
    x, y = blobs()
    assert len(module["heads"]) == count
    loss = rule.step((x, y), torch.Tensor.backward)["loss"]
    targets = torch.stack([(t(x) / tau).softmax(1) for t in teachers])
    targets = targets if heads == "separate" else targets.mean(0, keepdim=True)
    logs = torch.stack([(h(trunk(x)) / tau).log_softmax(1) for h in module["heads"]])
    expected = tau**2 * (targets * (targets.log() - logs)).sum((0, 2)).mean()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for t in teachers for p in t.parameters())


@pytest.mark.parametrize("heads", ["separate", "averaged"])
def test_distillation_keeps_the_contract_of_rules(heads):
    check_rule(lambda: RichDistillation(nets(2), heads=heads), split_head(nets(1)[0])[0], blobs(12))


def test_distillation_trains_in_fit_and_leaves_the_teachers():
    teachers = nets()
    before = [copy.deepcopy(t.state_dict()) for t in teachers]
    trunk = split_head(nets(1)[0])[0]
    result = fit(
        trunk, blobs(), rule=RichDistillation(teachers), optimizer=sgd(0.05), epochs=8, batch_size=30, device="cpu"
    )
    losses = result.history.to_frame()["loss"]
    assert losses.iloc[-1] < losses.iloc[0]
    assert all(torch.equal(v, b[k]) for t, b in zip(teachers, before, strict=True) for k, v in t.state_dict().items())


# Episodes


@pytest.mark.parametrize("norm", [None, "batch"])
def test_one_vectorised_pass_is_the_loop(norm):
    def build():
        return MLP(6, 3, (5,), norm=norm)

    x, y = blobs()
    together = fit_episodes(build, x, y, [3, 4], phases=((0.1, 2),), batch_size=32, weight_decay=1e-3)

    def train(net, seed):
        fit(
            net, (x, y), optimizer=sgd(0.1, 0.9, 1e-3, nesterov=False), epochs=2, batch_size=32, seed=seed, device="cpu"
        )
        if norm:
            torch.optim.swa_utils.update_bn(x.split(32), net)

    for a, b in zip(together, train_episodes(build, train, [3, 4]), strict=True):
        torch.testing.assert_close(outputs(a, x), outputs(b, x), atol=1e-4, rtol=1e-4)
    assert not torch.equal(*(next(m.parameters()) for m in together))


def test_convolutions_with_batch_norm_train_together():
    x, y = torch.randn(40, 1, 8, 8), torch.arange(40) % 2
    models = fit_episodes(lambda: ConvNet(2, 1, (2, 3)), x, y, [0, 1], phases=((0.05, 1), (0.01, 1)), batch_size=16)
    assert all(m.layer1[1].track_running_stats and m.layer1[1].running_var.isfinite().all() for m in models)
    assert Concatenated(split_head(m)[0] for m in models)(x).shape == (40, 6)


def test_episodes_are_bundles_on_disk(tmp_path):
    models = [MLP(6, 3, (5,)).eval() for _ in range(11)]
    save_episodes(
        models, tmp_path, Manifest("torchfolio.models:MLP", {"in_features": 6, "out_features": 3, "hidden": [5]})
    )
    again = load_episodes(tmp_path)
    x = blobs()[0]
    assert all(torch.equal(a(x), b(x)) for a, b in zip(models, again, strict=True))
    with pytest.raises(ValueError, match="episode-0"):
        load_episodes(tmp_path / "episode-0")


# scikit-learn


def test_transformer_stands_before_any_estimator():
    trunks = [split_head(ConvNet(3, 1, (2, 4)))[0] for _ in range(2)]
    X, y = np.random.default_rng(0).normal(size=(30, 64)), np.arange(30) % 3
    rich = RichFeatures(trunks, shape=(1, 8, 8), batch_size=7)
    features = rich.fit_transform(X)
    assert features.shape == (30, 8)
    expected = Concatenated(copy.deepcopy(trunks))(torch.tensor(X, dtype=torch.float32).view(-1, 1, 8, 8))
    np.testing.assert_allclose(features, expected.detach().numpy(), rtol=1e-4, atol=1e-6)
    assert rich.get_feature_names_out()[-1] == "block1_3"
    pipeline = make_pipeline(clone(rich), LogisticRegression()).fit(X, y)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipeline)).predict(X), pipeline.predict(X))
    for wrong, message in ((X[:, :5], "expecting 64 features"), (np.full((3, 64), np.nan), "NaN")):
        with pytest.raises(ValueError, match=message):
            rich.transform(wrong)


def test_a_teacher_has_a_precision_of_its_own():
    teacher, net = nn.Sequential(nn.Linear(6, 3)).double(), nn.Linear(6, 4)
    rule, batch = RichDistillation([teacher]), (torch.randn(5, 6), torch.zeros(5))
    rule.prepare(net, batch)
    rule.step(batch, torch.Tensor.backward)
    assert net.weight.grad.abs().sum() > 0
    assert teacher[0].weight.dtype == torch.float64


def test_what_is_no_trunk_is_refused():
    with pytest.raises(TypeError, match="networks as trunks, got str"):
        Concatenated(["trunk"])
    with pytest.raises(ValueError, match=r"trunk 0 to give features .* got tuple"):
        Concatenated([nn.LSTM(3, 4)])(torch.rand(2, 3))
    with pytest.raises(ValueError, match="got tuple"):
        RichDistillation([nn.Linear(3, 2)]).prepare(nn.LSTM(3, 4), (torch.rand(2, 3), None))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Concatenated([]), "at least one trunk"),
        (lambda: Concatenated([nn.Linear(2, 2)] * 2), "share some"),
        (lambda: Concatenated([nn.Conv2d(1, 1, 1)])(torch.rand(2, 1, 3, 3)), "pool or flatten"),
        (lambda: average_heads([]), "at least one head"),
        (lambda: average_heads([nn.Linear(2, 3), nn.Linear(2, 4)]), "equal outputs"),
        (lambda: split_head(nn.Sequential(nn.Conv2d(1, 1, 1))), "linear head"),
        (lambda: RichDistillation([]), "at least one teacher"),
        (lambda: RichDistillation(nets(), float("nan")), "tau"),
        (lambda: RichDistillation(nets(), heads="joint"), "heads"),
        (lambda: vrex_penalty(torch.ones(1), 1.0), "two environments"),
        (lambda: CosineClassifier(3, 2, scale=0), "scale"),
        (lambda: train_episodes(lambda: nn.Linear(1, 1), lambda net, seed: None, [1, 1]), "seeds that differ"),
        (lambda: fit_episodes(lambda: nn.Linear(6, 3), *blobs(), [1], phases=()), "at least one phase"),
        (lambda: RichFeatures([]).fit(np.zeros((3, 2))), "at least one trunk"),
    ],
)
def test_wrong_arguments_are_refused_in_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
