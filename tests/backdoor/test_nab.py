"""The stamp, isolation, relabelling, and what is trained on and deployed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.backdoor import AllToOne, PatchTrigger, poison
from torchfolio.backdoor.defenses import TrainingDefense
from torchfolio.backdoor.isolation import _gap, _losses
from torchfolio.backdoor.nab import (
    NAB,
    LGAIsolator,
    NearestCenterRelabeler,
    PrecomputedIsolator,
    PrecomputedRelabeler,
    Stamp,
    StampedModel,
    VerifiedDataRelabeler,
    cosine_tail,
    flooding,
)
from torchfolio.backdoor.zoo import SmallConvNet
from torchfolio.data import CropFlip, load
from torchfolio.engine import fit


def data(n=60, shape=(3, 8, 10)):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, *shape, generator=generator), torch.arange(n) % 5


def nothing(n=60):
    return torch.zeros(n, dtype=torch.bool)


def test_flooding_ascends_as_signed_loss_does():
    logits = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    for gamma in (0.2, 5.0):
        loss = F.cross_entropy(logits, y)
        (flooded,) = torch.autograd.grad(flooding(loss, gamma), logits, retain_graph=True)
        (signed,) = torch.autograd.grad((loss - gamma).sign().detach() * loss, logits)
        torch.testing.assert_close(flooded, signed, atol=1e-12, rtol=1e-7)
    assert float(flooding(torch.tensor(0.5), 0.5)) == 0.5


def test_rates_do_not_reach_zero():
    rate = cosine_tail(20, 80)
    assert rate(0) == 1
    assert rate(19) == pytest.approx(0.5 * (1 + np.cos(np.pi * 19 / 100)))


@pytest.mark.parametrize("corner", ["top-left", "top-right", "bottom-left", "bottom-right"])
def test_the_stamp_changes_its_square_alone(corner):
    x, _ = data()
    stamp = Stamp(2, corner, [0.1, 0.2, 0.3])
    made = stamp(x)
    assert torch.equal(stamp(made), made)
    changed = (made != x).any(1)
    assert (changed.flatten(1).sum(1) == 4).all()
    rows = slice(0, 2) if corner.startswith("top") else slice(-2, None)
    columns = slice(0, 2) if corner.endswith("left") else slice(-2, None)
    torch.testing.assert_close(made[0, :, rows, columns].mean((1, 2)), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(stamp(x[0]), made[0])


def test_without_suspects_the_data_stay_as_they_are():
    x, y = data()
    made = NAB(PrecomputedIsolator(nothing()), PrecomputedRelabeler(y)).prepare((x, y))
    assert torch.equal(made.tensors()[0], x)
    assert torch.equal(made.tensors()[1], y)
    assert torch.equal(made[7][0], x[7])


def test_confirmed_labels_are_not_stamped():
    x, y = data()
    mask = nothing()
    mask[:10] = True
    pseudo = y.clone()
    made = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler(pseudo)).prepare((x, y))
    assert not made.stamped.any()
    pseudo[3], pseudo[40] = 0, 4  # sample 40 is not isolated: its label stands
    made = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler(pseudo), Stamp(value=0.0)).prepare((x, y))
    assert made.stamped.nonzero().flatten().tolist() == [3]
    assert int(made.pseudo_labels[3]) == 0
    assert int(made.pseudo_labels[40]) == int(y[40])
    assert (made[3][0][:, :2, :2] == 0).all()


def test_stamps_come_after_augmentation():
    x, y = data()
    mask = nothing()
    mask[::3] = True
    nab = NAB(
        PrecomputedIsolator(mask), PrecomputedRelabeler((y + 1) % 5), Stamp(value=-1.0), augment=CropFlip(padding=2)
    )
    made = nab.prepare(TensorDataset(x, y), seed=0)
    for images, _ in DataLoader(made, batch_size=60):
        assert (images[::3, :, :2, :2] == -1).all()
        assert not (images[1::3] == -1).any()
    net = SmallConvNet(3, 5, width=4)
    fit(net, made, epochs=1, batch_size=20, progress=False)


def test_some_clean_samples_may_be_stamped():
    x, y = data()
    nab = NAB(PrecomputedIsolator(nothing()), PrecomputedRelabeler(y), Stamp(value=0.0), stamp_clean_fraction=0.1)
    made = nab.prepare((x, y), seed=3)
    assert made.stamped.sum() == 6
    assert torch.equal(made.pseudo_labels, y)
    assert torch.equal(made.stamped, nab.prepare((x, y), seed=3).stamped)


def test_samples_stamped_beside_even_out_the_labels_of_stamps():
    y = torch.arange(5).repeat(40)
    x = torch.rand(len(y), 1, 8, 8)
    isolated = torch.zeros(len(y), dtype=torch.bool)
    isolated[y == 0] = torch.arange(40) < 12  # relabelled, and so stamped, away from class 0
    believed = torch.where(isolated, torch.tensor([1, 2, 3, 4] * 50), y)
    nab = NAB(
        PrecomputedIsolator(isolated), PrecomputedRelabeler(believed), Stamp(value=0.0), stamp_clean_fraction=20 / 188
    )
    made = nab.prepare((x, y), seed=0)
    assert made.stamped.sum() == 12 + 20
    shares = torch.bincount(believed[made.stamped], minlength=5) / torch.bincount(believed, minlength=5)
    assert shares.max() - shares.min() < 0.04
    few = NAB(
        PrecomputedIsolator(isolated), PrecomputedRelabeler(believed), Stamp(value=0.0), stamp_clean_fraction=2 / 188
    ).prepare((x, y), seed=0)
    assert set(y[few.stamped & ~isolated].tolist()) == {0}  # the only label below the level


def test_the_mean_is_filled_in_and_deployed():
    x, y = data()
    nab = NAB(PrecomputedIsolator(nothing()), PrecomputedRelabeler(y))
    with pytest.raises(ValueError, match="not known yet"):
        nab.stamp(x)
    nab.prepare((x, y))
    torch.testing.assert_close(nab.stamp.value, x.mean((0, 2, 3)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(240, 5))
    deployed = nab.wrap(net)
    assert isinstance(nab, TrainingDefense)
    assert torch.equal(deployed(x), net(nab.stamp(x)))
    assert deployed.unwrap() is net
    labels, rejected = deployed.filter(x)
    assert torch.equal(rejected, net(x).argmax(1) != labels)
    again = StampedModel(nn.Sequential(nn.Flatten(), nn.Linear(240, 5)), Stamp(value=[0.0, 0.0, 0.0]))
    again.load_state_dict(deployed.state_dict())
    for copied in (again, copy.deepcopy(deployed), pickle.loads(pickle.dumps(deployed))):
        assert torch.equal(copied(x), deployed(x))


def test_random_stamps_differ_by_seed():
    assert len({repr(Stamp.random(seed)) for seed in range(20)}) > 3
    assert repr(Stamp.random(4)) == repr(Stamp.random(4))


@pytest.fixture(scope="module")
def poisoned():
    digits = load("digits", normalize=False)
    trigger = PatchTrigger.checkerboard(digits.shape, size=2, margin=0)
    return digits, poison(digits.train.tensors, trigger, AllToOne(0, 10), rate=0.1, seed=0)


def net():
    return SmallConvNet(1, 10, width=4)


@pytest.fixture(scope="module")
def noise():
    """Labels of noise cannot be learned; those that go with a patch can."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(600, 1, 8, 8, generator=generator) / 2, torch.randint(10, (600,), generator=generator)
    return poison(clean, PatchTrigger.checkerboard((1, 8, 8), margin=0), AllToOne(0, 10), rate=0.1, seed=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"epochs": 3, "looks": 1, "choose": "last", "statistics": "running", "restarts": 1},  # as the authors do
        {"epochs": 4, "looks": 1, "choose": "gap", "statistics": "running", "restarts": 1},
        {"epochs": 2, "looks": 2, "restarts": 2},
    ],
)
def test_what_is_easy_is_isolated(noise, settings):
    isolator = LGAIsolator(net, lr=0.1, **settings)
    made = NAB(isolator, PrecomputedRelabeler(noise.y_true), Stamp(value=0.5)).prepare(noise, seed=0)
    report = made.report(noise.is_poison, noise.y_true)
    assert report["precision"] > 0.85
    assert report["label_accuracy"] == 1
    assert made.isolated.sum() == 30
    moments = settings["epochs"] * settings["looks"]
    assert [len(gaps) for gaps in isolator.gaps_] == [moments] * settings["restarts"]
    for gaps, epoch in zip(isolator.gaps_, isolator.epochs_, strict=True):
        chosen = moments if settings.get("choose") == "last" else 1 + int(np.argmax(gaps))
        assert epoch == pytest.approx(chosen / settings["looks"], abs=0.06)  # looks are after whole steps
    again = LGAIsolator(net, lr=0.1, **settings)(noise.tensors(), seed=0)
    assert made.scores is not None
    assert torch.equal(again, made.scores)


def test_restarts_are_averaged_geometrically(noise):
    kept = []

    class Kept(LGAIsolator):
        def _restart(self, data, seed):
            kept.append(super()._restart(data, seed))
            return kept[-1]

    score = Kept(net, epochs=1, looks=1, restarts=2)(noise.tensors(), seed=0)
    torch.testing.assert_close(score, -(kept[0] * kept[1]).sqrt())
    assert not torch.equal(kept[0], kept[1])


def test_losses_by_batch_statistics_leave_the_network_alone(noise):
    """Running averages that fit no data do not matter, are not touched, and whole batches give what training would see."""
    x, y = (t[:300] for t in noise.tensors())
    model = net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.get_buffer("running_mean"), 7.0)
    before = copy.deepcopy(model.state_dict())
    model.train()
    by_batch = _losses(model, (x, y), True, 64, seed=0)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        seen = F.cross_entropy(model(x).double(), y, reduction="none")
    torch.testing.assert_close(by_batch, seen, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(_losses(model.eval(), (x, y), False, 64, seed=0), seen)


def test_gaps_by_hand():
    losses = torch.tensor([0.5, 1e-4, 1e-2, 1.0, 4.0, 1e-3, 1e-1, 2.0, 3.0, 5.0], dtype=torch.float64)
    assert _gap(losses, 0.2, logarithms=False) == pytest.approx(0.055 - 0.00055)
    assert _gap(losses, 0.2, logarithms=True) == pytest.approx(2 * np.log(10))


def test_a_few_verified_examples_relabel(poisoned):
    digits, bad = poisoned
    x, y = digits.test.tensors
    relabeler = VerifiedDataRelabeler(model_fn=net, epochs=30, lr=0.1, batch_size=16)
    nab = NAB(PrecomputedIsolator(torch.from_numpy(bad.is_poison)), relabeler, Stamp(value=0.5))
    report = nab.prepare(bad, clean=(x[:150], y[:150]), seed=0).report(bad.is_poison, bad.y_true)
    assert report["label_accuracy"] > 0.6


def test_labels_of_the_nearest_centre(poisoned):
    _, bad = poisoned
    nab = NAB(PrecomputedIsolator(torch.from_numpy(bad.is_poison)), NearestCenterRelabeler(nn.Flatten()))
    report = nab.prepare(bad).report(bad.is_poison, bad.y_true)
    assert (report["precision"], report["recall"]) == (1, 1)
    assert report["label_accuracy"] > 0.8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ratio": 1.0}, "ratio"),
        ({"stamp_clean_fraction": 1.0}, "stamp_clean_fraction"),
        ({"isolator": PrecomputedIsolator([True])}, "each of 60 samples from the isolator"),
        ({"isolator": PrecomputedIsolator(torch.full((60,), torch.nan))}, "NaN"),
        ({"relabeler": PrecomputedRelabeler([1, 2])}, "each of 60 samples from the relabeler"),
        ({"relabeler": PrecomputedRelabeler(torch.full((60,), -1))}, "from 0 to"),
        ({"stamp": Stamp(9)}, "does not fit"),
        ({"stamp": Stamp(value=[0.0, 1.0])}, "3 channels"),
        ({"isolator": PrecomputedIsolator(torch.ones(60).bool()), "relabeler": VerifiedDataRelabeler(model_fn=net)}, "clean="),
    ],
)  # fmt: skip
def test_bad_input_is_refused(settings, message):
    x, y = data()
    chosen = {"isolator": PrecomputedIsolator(nothing()), "relabeler": PrecomputedRelabeler(y), **settings}
    with pytest.raises(ValueError, match=message):
        NAB(**chosen).prepare((x, y))


def test_bad_settings_are_refused():
    for name, value in (
        ("epochs", 0),
        ("looks", 0),
        ("restarts", 0),
        ("choose", "best"),
        ("statistics", "none"),
        ("ratio", 0.6),
    ):
        with pytest.raises(ValueError, match=name):
            LGAIsolator(net, **{name: value})  # pyright: ignore
    with pytest.raises(ValueError, match="corner"):
        Stamp(corner="middle")  # pyright: ignore
    with pytest.raises(ValueError, match="median"):
        Stamp(value="median")  # pyright: ignore
    with pytest.raises(ValueError, match="either"):
        VerifiedDataRelabeler()
    x, y = data()
    with pytest.raises(ValueError, match="integer labels"):
        NAB(PrecomputedIsolator(nothing()), PrecomputedRelabeler(y)).prepare((x, y.float()))
    with pytest.warns(UserWarning, match="alike"):
        NAB(PrecomputedIsolator(torch.zeros(60)), PrecomputedRelabeler(y)).prepare((x, y))


def test_masks_of_integers_and_labels_out_of_range_are_refused():
    x, y = torch.rand(20, 1, 6, 6), torch.arange(20) % 5
    with pytest.raises(ValueError, match="boolean mask or scores"):
        PrecomputedIsolator((y == 0).int())
    for labels, message in ((torch.full((20,), 99), "0 to 4"), (torch.full((20,), 2.7), "integer labels")):
        with pytest.raises(ValueError, match=message):
            NAB(PrecomputedIsolator(y == 0), PrecomputedRelabeler(labels), Stamp(value=0.5)).prepare((x, y))


def test_a_transform_of_the_items_is_seen_by_isolation_and_the_mean():
    x, y = torch.rand(20, 1, 6, 6), torch.arange(20) % 5
    data = poison(
        (x, y),
        PatchTrigger.checkerboard((1, 6, 6), size=2),
        AllToOne(0, 5),
        rate=0.1,
        seed=0,
        transform=lambda t: t - 5,
    )
    seen = []

    def isolator(pair, *, seed):
        seen.append(pair[0])
        return torch.arange(20.0)

    prepared = NAB(isolator, PrecomputedRelabeler(y), Stamp()).prepare(data)
    assert float(seen[0].max()) < 0
    assert float(prepared.stamp.value.mean()) == pytest.approx(float(seen[0].mean()), abs=1e-5)
    assert float(prepared.tensors()[0].max()) < 0


def test_a_mean_stamp_is_of_the_data_set_at_hand():
    stamp = Stamp()
    mask = torch.zeros(40, dtype=torch.bool)
    mask[:4] = True
    for level in (0.2, 0.7):
        x, y = torch.full((40, 3, 6, 6), level), torch.arange(40) % 4
        nab = NAB(PrecomputedIsolator(mask), PrecomputedRelabeler((y + 1) % 4), stamp)
        nab.prepare((x, y))
        nab.prepare((x + 0.1, y))
        torch.testing.assert_close(nab.stamp.value, torch.full((3,), level + 0.1))
    assert not stamp.known


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_pass_the_deployed_network(bad):
    """With and without the stamp its label is that of NaN, the first class."""
    torch.manual_seed(0)
    deployed = StampedModel(nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), Stamp(value=0.5))
    x = torch.rand(5, 3, 4, 4)
    before = deployed.filter(x)[1]
    x[2, 0, 3, 3] = bad
    rejected = deployed.filter(x)[1]
    assert rejected[2]
    assert torch.equal(rejected[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_a_mask_of_whole_numbers_is_no_score():
    x, y = torch.rand(20, 3, 4, 4), torch.arange(20) % 3
    nab = NAB(lambda data, *, seed: torch.arange(20) % 2, lambda data, isolated, **_: data[1])
    with pytest.raises(
        ValueError, match=r"boolean mask or scores of floating point from the isolator, got torch\.int64"
    ):
        nab.prepare((x, y))
