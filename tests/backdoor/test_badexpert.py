"""The score's geometry, the two finetunings, the threshold, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.backdoor import AllToOne, PatchTrigger, poison, poisoned_test
from torchfolio.backdoor.badexpert import SCORES, BaDExpert, extract_backdoor_expert, suspicion, triangle_score
from torchfolio.backdoor.detectors import InputDetector
from torchfolio.backdoor.evaluation import evaluate_input_detector
from torchfolio.backdoor.metrics import attack_metrics, auroc
from torchfolio.backdoor.zoo import SmallConvNet, fit_classifier
from torchfolio.data import load


def t(value):
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize(("b", "m", "wanted"), [(1, 0, 0), (0.5, 0.5, 2), (0.5, 0.25, 1), (0, 0, 0), (0, 1, 1e8)])
def test_triangle_at_known_points(b, m, wanted):
    assert float(triangle_score(t(b), t(m))) == pytest.approx(wanted, rel=1e-9, abs=1e-12) or m == 1


def test_triangle_has_rays_for_level_sets():
    for a in (0.3, 0.8, 1.5):
        b = torch.linspace(0.05, 0.95, 50, dtype=torch.float64)
        m = a * b / 2
        on = (m < 0.5) & (1 - b >= a * (0.5 - m))
        assert on.any()
        torch.testing.assert_close(triangle_score(b, m)[on], torch.full_like(b[on], a), atol=1e-6, rtol=0)
        m = torch.linspace(0, 0.45, 50, dtype=torch.float64)
        b = 1 - a * (0.5 - m)
        on = (b > 0) & (2 * m >= a * b)
        torch.testing.assert_close(triangle_score(b, m)[on], torch.full_like(b[on], a), atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kappa", [0.5, 0.2])
def test_suspicion_rises_with_the_expert_and_falls_with_the_auxiliary(score, kappa):
    grid = torch.linspace(0, 1, 101, dtype=torch.float64)
    s = suspicion(grid[:, None].expand(101, 101), grid[None].expand(101, 101), score, kappa)
    tolerance = 1e-9 * s.abs().max().clamp_min(1)
    assert (s.diff(dim=0) >= -tolerance).all()
    assert (s.diff(dim=1) <= tolerance).all()


@pytest.fixture(scope="module")
def victim():
    digits = load("digits", normalize=False)
    trigger, labels = PatchTrigger.checkerboard(digits.shape, size=2, margin=0), AllToOne(0, 10)
    torch.manual_seed(0)
    net = SmallConvNet(1, 10, width=8)
    fit_classifier(net, poison(digits.train.tensors, trigger, labels, rate=0.1, seed=0), epochs=6, lr=0.1)
    x, y = digits.test.tensors
    return net, (x[:180], y[:180]), (x[180:], y[180:]), poisoned_test((x[180:], y[180:]), trigger, labels)


def detector(**settings):
    return BaDExpert(
        **{"unlearn_lr": 3e-3, "unlearn_batch": 16, "unlearn_epochs": 2, "finetune_lr": 0.05, "fpr": 0.05, **settings}
    )


@pytest.fixture(scope="module")
def fitted(victim):
    return detector().fit(victim[0], victim[1])


def test_the_expert_keeps_the_backdoor_and_forgets_the_task(victim, fitted):
    net, _, test, attacked = victim
    before, expert = attack_metrics(net, test, attacked), attack_metrics(fitted.expert_, test, attacked)
    assert before.asr > 0.95
    assert expert.acc < 0.7 * before.acc
    assert expert.asr > expert.acc + 0.2
    accuracies = [a for _, a in fitted.history_]
    assert accuracies[-1] <= accuracies[0] / 2 < accuracies[-2]


def test_it_tells_triggered_inputs(victim, fitted):
    net, _, test, attacked = victim
    assert isinstance(fitted, InputDetector)
    report = evaluate_input_detector(fitted, net, test, attacked)
    assert report.auroc > 0.8
    labels, rejected = fitted.filtered(test[0])
    assert torch.equal(labels, net(test[0]).argmax(1))
    assert torch.equal(rejected, fitted.score(test[0]) > fitted.threshold_)
    assert fitted.threshold(0.5) < fitted.threshold_


def test_the_network_is_left_as_it_was(victim):
    net, clean, *_ = victim
    net = copy.deepcopy(net).train()
    net.layer1.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    detector(finetune_epochs=1).fit(net, clean)
    assert net.training
    assert [p.requires_grad for p in net.parameters()][:2] == [False, False]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_threshold_lets_the_wanted_share_pass(fitted):
    above = (fitted.calibration_ > fitted.threshold_).double().mean()
    assert above <= 0.05
    assert len(fitted.calibration_) >= 45


def test_right_labels_make_no_expert(victim):
    net, clean, test, attacked = victim
    control = detector(mislabel="none", score="expert", stop_acc=0.0).fit(net, clean)
    assert control.auxiliary_ is None
    expert = detector(score="expert").fit(net, clean)
    scores = [auroc(d.score(test[0]), d.score(attacked.tensors()[0])) for d in (control, expert)]
    assert scores[0] < scores[1]


def test_seeds_reproduce_and_filters_are_saved(victim, fitted, tmp_path):
    net, clean, test, _ = victim
    again = detector().fit(net, TensorDataset(*clean))
    assert torch.equal(again.score(test[0]), fitted.score(test[0]))
    fitted.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]
    loaded = BaDExpert.load(tmp_path, net)
    assert torch.equal(loaded.score(test[0]), fitted.score(test[0]))
    assert loaded.threshold_ == fitted.threshold_
    assert loaded.history_ == fitted.history_


def test_another_repaired_network_may_stand_in(victim):
    net, clean, test, _ = victim
    made = detector(auxiliary=nn.Sequential(nn.Flatten(), nn.Linear(64, 10))).fit(
        net, DataLoader(TensorDataset(*clean), 32)
    )
    assert made.score(test[0]).isfinite().all()


def test_tables_and_other_labels_work_too():
    torch.manual_seed(0)
    x = torch.randn(300, 5)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    net = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))
    fit_classifier(net, (x, y), 5, 0.1)
    for mislabel in ("random", lambda y, classes: (y + 2) % classes):
        expert = extract_backdoor_expert(
            net, (x, y), mislabel=mislabel, unlearn_lr=0.01, unlearn_batch=20, unlearn_epochs=5
        )
        assert (expert(x).argmax(1) == y).double().mean() < 0.6


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.zeros(180, dtype=torch.long), "at least two classes"),
        (torch.full((180,), 10), "0 to 9"),
        (torch.rand(180), "integer labels"),
    ],
)
def test_bad_labels_are_refused(victim, y, message):
    with pytest.raises(ValueError, match=message):
        detector().fit(victim[0], (victim[1][0], y))


def test_bad_settings_are_refused(victim):
    net, (x, y), *_ = victim
    with pytest.raises(ValueError, match="hexagon"):
        BaDExpert(score="hexagon")  # pyright: ignore
    with pytest.raises(ValueError, match="fpr"):
        BaDExpert(fpr=0.0)
    with pytest.raises(ValueError, match="finetune_batch"):
        BaDExpert(finetune_batch=0)
    with pytest.raises(ValueError, match="mislabel"):
        BaDExpert(mislabel="swap")  # pyright: ignore
    with pytest.raises(ValueError, match="none of 54 calibration"):
        detector().fit(net, (x, (net(x).argmax(1) + 1) % 10))
    with pytest.raises(ValueError, match="NaN"):
        detector().fit(net, (x * torch.nan, y))
    with pytest.raises(ValueError, match="logits"):
        detector().fit(nn.Flatten(0), (x, y))
    with pytest.raises(RuntimeError, match="fit"):
        detector().score(x)


def test_weak_and_strong_unlearning_and_small_calibration_warn(victim):
    net, clean, *_ = victim
    with pytest.warns(UserWarning, match="still gets"):
        detector(unlearn_lr=1e-6, score="expert").fit(net, clean)
    with pytest.warns(UserWarning, match="no more than chance"):
        detector(unlearn_lr=0.1, check_every=5, score="expert").fit(net, clean)
    with pytest.warns(UserWarning, match="cannot tell"):
        detector(fpr=0.001, score="expert").fit(net, clean)


@pytest.fixture(scope="module")
def plain():
    """A backdoored network without batch norm for 8x8 digits, 150 clean images, test images and triggered ones."""
    digits = load("digits", normalize=False)
    trigger, labels = PatchTrigger.checkerboard(digits.shape, size=2, margin=0), AllToOne(0, 10)
    torch.manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    fit_classifier(net, poison(digits.train.tensors, trigger, labels, rate=0.1, seed=5), epochs=20, lr=0.05, seed=5)
    x, y = digits.test.tensors
    return net, (x[:150], y[:150]), (x[150:], y[150:]), poisoned_test((x[150:], y[150:]), trigger, labels)


@pytest.mark.filterwarnings("ignore:.*cannot tell")
def test_few_examples_make_an_expert_by_more_steps_and_not_by_a_higher_rate(plain):
    net, clean, test, attacked = plain
    made = BaDExpert(seed=5).fit(net, clean)
    assert made.unlearn_lr_ <= 1e-3
    assert made.history_[-1][0] >= 20
    assert evaluate_input_detector(made, net, test, attacked).auroc >= 0.95
    assert made.faults_ == []
    assert made.remarks(clean[0], [str(k) for k in range(10)])[0].startswith("Both came out")
    control = BaDExpert(seed=5, mislabel="none", score="expert", stop_acc=0.0, unlearn_lr=made.unlearn_lr_).fit(
        net, clean
    )
    assert control.history_[-1][0] >= 100
    assert evaluate_input_detector(control, net, test, attacked).auroc <= 0.75


@pytest.mark.filterwarnings("ignore:.*cannot tell")
def test_a_wrecked_expert_and_a_spoiled_auxiliary_network_are_said(plain):
    net, clean, *_ = plain
    with pytest.warns(UserWarning, match="forgotten the backdoor too"):
        made = BaDExpert(score="expert", unlearn_lr=0.03).fit(net, clean)
    assert "Do not trust the filter" in made.remarks(clean[0], [str(k) for k in range(10)])[0]
    with pytest.warns(UserWarning, match="auxiliary network gets only"):
        BaDExpert(seed=2, finetune_epochs=10, finetune_batch=16).fit(net, clean)
    with pytest.warns(UserWarning, match="still gets"):
        BaDExpert(score="expert", unlearn_lr=1e-6).fit(net, clean)


def test_batches_of_few_examples_make_as_many_steps_as_the_authors():
    from torchfolio.backdoor.expert import batch_size, epochs_of

    assert batch_size("auto", 1400, 11, 128) == 127
    assert batch_size("auto", 350, 11, 128) == 32
    assert batch_size("auto", 350, 22, 64) == 16
    assert batch_size("auto", 100_000, 22, 64) == 64
    assert batch_size("auto", 10, 22, 64) == 10
    assert batch_size(48, 350, 22, 64) == 48
    assert epochs_of(100, 105, 16) == 15
    assert epochs_of(100, 17, 16) == 100  # a last batch of one is dropped
    assert epochs_of(1, 3, 8) == 1
