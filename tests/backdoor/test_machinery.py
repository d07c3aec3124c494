"""Triggers, labels, poisoned sets, metrics and protocols."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchfolio.backdoor import metrics
from torchfolio.backdoor.evaluation import evaluate_defense, evaluate_input_detector
from torchfolio.backdoor.labels import X2X, AllToAll, AllToOne, CleanLabel, LabelMap
from torchfolio.backdoor.poison import load, poison, poisoned_test
from torchfolio.backdoor.triggers import (
    ADDITIVE_SHAPES,
    AdditiveTrigger,
    BlendTrigger,
    GeneratorTrigger,
    PatchTrigger,
    SinusoidTrigger,
    TokenTrigger,
    Trigger,
    WarpTrigger,
    keyed_uniform,
)
from torchfolio.backdoor.zoo import Cutout, Normalize, ResNet18CIFAR, SmallConvNet, fit_classifier
from torchfolio.data import load as load_data
from torchfolio.measure import untouched

SHAPE = (3, 12, 10)
TRIGGERS = {
    "patch": PatchTrigger.checkerboard(SHAPE),
    "random_patch": PatchTrigger.checkerboard(SHAPE, random_location=True, alpha=0.7),
    "blend": BlendTrigger.noise(SHAPE),
    "additive": AdditiveTrigger.shape("bigX", SHAPE),
    "sinusoid": SinusoidTrigger(),
    "warp": WarpTrigger(),
    "noisy_warp": WarpTrigger(noise=True),
    "generator": GeneratorTrigger(nn.Conv2d(3, 3, 3, padding=1)),
}


def images(n=6, shape=SHAPE, dtype=torch.float32):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def data(n=200, classes=4):
    generator = torch.Generator().manual_seed(1)
    x = (255 * torch.rand(n, *SHAPE, generator=generator)).round() / 255
    return x, torch.arange(n) % classes


class Items(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_leave_their_input_alone_and_stay_in_range(name):
    x = images()
    before, made = x.clone(), TRIGGERS[name](x).detach()
    assert torch.equal(x, before)
    assert made.shape == x.shape
    assert made.dtype == x.dtype
    assert float(made.min()) >= 0
    assert float(made.max()) <= 1
    assert not torch.equal(made, x)
    assert copy.deepcopy(TRIGGERS[name]).double()(x.double()).dtype == torch.float64


def test_empty_triggers_are_the_identity():
    x = (255 * images()).round() / 255
    assert torch.equal(PatchTrigger(torch.ones(1, 12, 10), torch.zeros(12, 10))(x), x)
    assert torch.equal(AdditiveTrigger(torch.zeros(1, 12, 10))(x), x)
    assert torch.equal(BlendTrigger.noise(SHAPE, alpha=0.0)(x), x)
    torch.testing.assert_close(WarpTrigger(s=0.0)(x), x, atol=1e-5, rtol=0)
    pattern = images(1)[0]
    assert torch.equal(BlendTrigger(pattern, alpha=1.0)(x), pattern.expand_as(x))


def test_patch_stands_where_it_should():
    made = PatchTrigger.checkerboard((1, 5, 6), size=2, corner="bottom-left", margin=1)(torch.full((1, 1, 5, 6), 0.5))
    assert made[0, 0, 2:4, 1:3].tolist() == [[1, 0], [0, 1]]
    assert int((made != 0.5).sum()) == 4
    moved = PatchTrigger.checkerboard((1, 5, 6), size=2, random_location=True)(torch.full((50, 1, 5, 6), 0.5))
    assert ((moved != 0.5).flatten(1).sum(1) == 4).all()
    assert len({tuple((m != 0.5).nonzero()[0].tolist()) for m in moved}) > 10


def test_additive_shapes_have_their_amplitude():
    for shape in ADDITIVE_SHAPES:
        made = AdditiveTrigger.shape(shape, (3, 9, 9), 15 / 255)(torch.zeros(1, 3, 9, 9))
        assert set((255 * made).round().unique().tolist()) == {0, 15}, shape


@pytest.mark.parametrize("name", ["patch", "blend", "sinusoid"])
def test_triggers_are_differentiable(name):
    x = (0.3 + 0.4 * images(2, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(TRIGGERS[name], (x,))


@pytest.mark.parametrize("name", TRIGGERS)
def test_triggers_are_rebuilt_from_their_spec(name):
    trigger, x = TRIGGERS[name], images()
    modules = {"net": nn.Conv2d(3, 3, 3, padding=1)} if name == "generator" else {}
    for again in (
        Trigger.from_spec(trigger.spec(), **modules),
        copy.deepcopy(trigger),
        pickle.loads(pickle.dumps(trigger)),
    ):
        assert torch.equal(again(x), trigger(x))


@pytest.mark.parametrize("name", ["random_patch", "noisy_warp"])
def test_randomness_goes_by_the_index_of_a_sample(name):
    x, index = images(), torch.arange(6) + 10
    whole = TRIGGERS[name](x, index=index)
    order = torch.tensor([4, 0, 5])
    assert torch.equal(TRIGGERS[name](x[order], index=index[order]), whole[order])


def test_keyed_numbers_are_uniform():
    u = keyed_uniform(3, torch.arange(20_000), (2,))
    assert abs(float(u.mean()) - 0.5) < 0.01
    assert abs(float(u.var()) - 1 / 12) < 0.002
    assert abs(float(torch.corrcoef(u.T)[0, 1])) < 0.03
    assert not torch.equal(u, keyed_uniform(4, torch.arange(20_000), (2,)))


def test_phrases_are_inserted_in_one_piece():
    trigger = TokenTrigger([8, 9])
    ids = [[1, 2, 3], [4], []]
    made = trigger(ids * 30)
    for before, after in zip(ids * 30, made, strict=True):
        place = after.index(8)
        assert after[place : place + 2] == [8, 9]
        assert after[:place] + after[place + 2 :] == before
    assert {m.index(8) for m, s in zip(made, ids * 30, strict=True) if len(s) == 3} == {0, 1, 2, 3}
    padded, lengths = trigger(torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1]))
    assert lengths.tolist() == [5, 3]
    assert [row[:n].tolist() for row, n in zip(padded, lengths, strict=True)] == trigger(ids[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PatchTrigger(torch.ones(1, 4, 4), torch.ones(5, 5)), "mask"),
        (lambda: PatchTrigger(2 * torch.ones(1, 4, 4), torch.ones(4, 4)), r"\[0, 1\]"),
        (lambda: PatchTrigger.checkerboard(SHAPE, size=20), "does not fit"),
        (lambda: PatchTrigger.checkerboard(SHAPE, corner="middle"), "corner"),  # pyright: ignore
        (lambda: AdditiveTrigger.shape("heart", SHAPE), "heart"),
        (lambda: TRIGGERS["patch"](torch.rand(2, 3, 8, 8)), r"\(3, 8, 8\)"),
        (lambda: TRIGGERS["sinusoid"](torch.zeros(2, 3, 8, 8, dtype=torch.long)), "float"),
        (lambda: TokenTrigger([]), "at least one token"),
        (lambda: Trigger.from_spec({"kind": "Nothing", "settings": {}, "tensors": {}}), "Nothing"),
        (lambda: LabelMap({1: 1}), "class 1"),
        (lambda: LabelMap(((0, 1), (0, 2))), "once"),
        (lambda: LabelMap({0: 7}, 5), "got 7"),
        (lambda: X2X.random(4, 9, 0), "got 9"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_label_maps():
    assert AllToOne(2, 4)(torch.tensor([0, 1, 2, 3])).tolist() == [2, 2, -1, 2]
    assert AllToAll(3)(torch.tensor([0, 1, 2])).tolist() == [1, 2, 0]
    assert CleanLabel(1).pairs() == {1: 1}
    for seed in range(20):
        pairs = X2X.random(10, 5, seed).pairs()
        assert len(pairs) == len(set(pairs.values())) == 5
        assert all(s != t for s, t in pairs.items())
    assert LabelMap.from_spec(AllToAll(3).spec()) == AllToAll(3)


@pytest.mark.parametrize("mode", ["replace", "append"])
def test_rates_are_met_exactly(mode):
    made = poison(data(203), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0, mode=mode)
    assert made.is_poison.sum() == round(0.1 * 203)
    assert len(made) == (203 if mode == "replace" else 223)
    assert (made.y[made.is_poison] == 0).all()
    assert (made.y_true[made.is_poison] != 0).all()
    assert (made.y[~made.is_poison] == made.y_true[~made.is_poison]).all()
    x, y = made.tensors()
    clean = data(203)[0][torch.from_numpy(made.source_index)]
    changed = (x != clean).flatten(1).any(1).numpy()
    assert not changed[~made.is_poison].any()
    assert changed[made.is_poison].all()
    for i in (0, int(np.flatnonzero(made.is_poison)[0]), -1):
        assert torch.equal(made[i][0], x[i])
        assert made[i][1] == y[i]


def test_sources_get_equal_shares():
    made = poison(data(400), TRIGGERS["patch"], X2X({0: 1, 1: 2, 3: 0}, 4), count=50, seed=0)
    counts = np.bincount(made.y_true[made.is_poison], minlength=4)
    assert sorted(counts.tolist()) == [0, 16, 17, 17]
    assert counts[2] == 0


def test_covers_keep_their_label():
    made = poison(
        data(), TRIGGERS["warp"], AllToOne(0, 4), rate=0.1, seed=0, cover_rate=0.2, cover_trigger=TRIGGERS["noisy_warp"],
        keep_label_rate=0.25,
    )  # fmt: skip
    assert made.is_cover.sum() == 40 + 5
    assert made.is_poison.sum() == 20 - 5
    assert not (made.is_cover & made.is_poison).any()
    assert (made.y[made.is_cover] == made.y_true[made.is_cover]).all()
    row = int(np.flatnonzero(made.is_cover)[0])
    assert not torch.equal(made[row][0], data()[0][row])


def test_clean_label_poison_is_of_the_target():
    made = poison(data(), SinusoidTrigger(), CleanLabel(2, 4), rate=0.1, seed=0)
    assert (made.y_true[made.is_poison] == 2).all()
    assert (made.y == made.y_true).all()
    test = poisoned_test(data(), SinusoidTrigger(), CleanLabel(2, 4))
    assert (test.y == 2).all()
    assert len(test) == 150
    assert (test.y_true != 2).all()


def test_the_same_seed_gives_the_same_bytes_whoever_reads_them():
    trigger, labels = TRIGGERS["noisy_warp"], AllToOne(0, 4)
    first = poison(data(), trigger, labels, rate=0.2, seed=5)
    again = poison(Items(*data()), trigger, labels, rate=0.2, seed=5)
    read = torch.cat([x for x, _ in DataLoader(again, batch_size=7, num_workers=2)])
    assert torch.equal(first.tensors()[0], read)
    other = poison(data(), trigger, labels, rate=0.2, seed=6)
    both = len(np.intersect1d(np.flatnonzero(first.is_poison), np.flatnonzero(other.is_poison)))
    n, k = 150, 40  # hypergeometric: drawn of those that may be poisoned
    assert abs(both - k * k / n) < 5 * (k * k / n * (1 - k / n) * (n - k) / (n - 1)) ** 0.5


def test_views():
    made = poison(data(), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0)
    x, y, true, bad, index = made.with_meta()[int(np.flatnonzero(made.is_poison)[0])]
    assert (y, bad) == (0, True)
    assert torch.equal(x, made[index][0])
    assert true == made.y_true[index]
    assert torch.equal(made.clean_view().tensors()[0], data()[0])
    assert torch.equal(made.clean_view().tensors()[1], data()[1])
    part = made.subset(made.is_poison)
    assert torch.equal(part.tensors()[0], made.tensors()[0][torch.from_numpy(made.is_poison)])
    assert (made.relabelled(np.ones(200, int)).y == 1).all()
    for bad in (np.full(200, 2.7), np.full(200, -1), np.ones(3, int)):
        with pytest.raises((TypeError, ValueError), match=r"y to|label for each"):
            made.relabelled(bad)
    with pytest.raises(ValueError, match="boolean mask"):
        made.subset(np.arange(3))
    shifted = poison(data(), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0, transform=lambda x: x + 1)
    assert float(shifted[0][0].min()) >= 1


@pytest.mark.parametrize("name", ["patch", "blend", "additive", "warp"])
def test_saved_sets_come_back_to_the_bit(tmp_path, name):
    made = poison(data(), TRIGGERS[name], AllToOne(0, 4), rate=0.1, seed=0, cover_rate=0.05, name="mine")
    made.save(tmp_path)
    again = load(tmp_path, data())
    for field in ("y", "y_true", "is_poison", "is_cover", "source_index"):
        assert np.array_equal(getattr(again, field), getattr(made, field))
    assert torch.equal(again.tensors()[0], made.tensors()[0])
    assert again.label_map == made.label_map
    assert torch.equal(again.trigger(images()), made.trigger(images()))
    with pytest.raises(ValueError, match="length 200"):
        load(tmp_path, data(100))
    content = bytearray((tmp_path / "poison.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "poison.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"poison\.npz"):
        load(tmp_path, data())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one"),
        ({"rate": 0.1, "count": 3}, "exactly one"),
        ({"rate": 0.9}, "at most 150"),
        ({"rate": 1.5}, "rate in"),
        ({"rate": 0.1, "mode": "swap"}, "swap"),
        ({"rate": 0.1, "cover_rate": 0.95}, "covers"),
    ],
)
def test_bad_poison_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        poison(data(), TRIGGERS["patch"], AllToOne(0, 4), seed=0, **settings)


def test_normalised_images_are_refused():
    x, y = data()
    with pytest.raises(ValueError, match="normalisation"):
        poison((x - 0.5, y), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0)
    with pytest.raises(ValueError, match="integer labels"):
        poison((x, y.float()), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0)


def test_rankings_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    negatives, positives = (torch.randint(0, 6, (n,), generator=generator).double() for n in (300, 200))
    both = torch.cat([negatives, positives]), torch.cat([torch.zeros(300), torch.ones(200)])
    assert abs(metrics.auroc(negatives, positives) - roc_auc_score(both[1], both[0])) < 1e-12
    for fpr in (0.0, 0.05, 0.3):
        assert float((negatives > metrics.threshold_at_fpr(negatives, fpr)).double().mean()) <= fpr
    constant = torch.ones(10)
    assert metrics.auroc(constant, constant) == 0.5
    assert metrics.tpr_at_fpr(constant, constant, 0.1) == 0
    assert np.isnan(metrics.auroc(constant[:0], constant))


class Obeys(nn.Module):
    """Says 0 where the corner is marked, else the class that the first pixel holds."""

    def forward(self, x):
        marked = x[:, 0, -3, -3] == 1
        label = torch.where(marked, torch.zeros(len(x), dtype=torch.long), (255 * x[:, 0, 0, 0]).round().long())
        return nn.functional.one_hot(label, 4).float()


class CornerDetector:
    def fit(self, model, clean):
        return self

    def score(self, x):
        return x[:, 0, -3, -3]

    def threshold(self, fpr):
        return 0.99

    def predict(self, x, fpr=None):
        return self.score(x) > self.threshold(fpr or 0.01)


def marked_data():
    y = torch.arange(40) % 4
    x = torch.zeros(40, 1, 8, 8)
    x[:, 0, 0, 0] = y / 255
    return x, y


def test_metrics_of_a_network_that_obeys():
    clean, trigger = marked_data(), PatchTrigger.checkerboard((1, 8, 8), size=2)
    attacked = poisoned_test(clean, trigger, AllToOne(0, 4))
    found = metrics.attack_metrics(Obeys(), clean, attacked)
    assert found == metrics.AttackMetrics(1.0, 1.0, 0.0, 40, 30)
    report = evaluate_input_detector(CornerDetector(), Obeys(), clean, attacked)
    assert (report.auroc, report.tpr, report.tpr_held_out, report.fpr_held_out) == (1, 1, 1, 0)
    assert (report.filter.dsr, report.filter.psr, report.filter.filtered_asr) == (1, 1, 0)
    same = evaluate_defense(Obeys(), Obeys(), clean, attacked)
    assert same.effectiveness == 0.5
    assert same.filter is None


def test_stealth():
    x = images(4)
    same = metrics.stealth(x, x)
    assert (same.linf, same.l2, same.psnr) == (0, 0, np.inf)
    assert same.ssim == pytest.approx(1)
    moved = metrics.stealth(torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.1))
    assert moved.linf == pytest.approx(0.1)
    assert moved.l2 == pytest.approx(0.4)
    assert moved.psnr == pytest.approx(20)


def test_networks_are_left_as_they_were():
    net = SmallConvNet(3, 4, width=4)
    net[0].requires_grad_(False)
    before = copy.deepcopy(net.state_dict())

    def meddle():
        with untouched(net, training=True):
            net(images())
            net.requires_grad_(False)
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        meddle()
    assert net.training
    assert not net[0][0].weight.requires_grad
    assert net[1][0].weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_zoo():
    x = images()
    for net, width in ((SmallConvNet(3, 5, width=4), 16), (ResNet18CIFAR(3, 5, width=4), 32)):
        assert net(x).shape == (6, 5)
        assert torch.equal(net.eval().head(net.features(x)), net(x))
        assert net.features(x).shape == (6, width)
    normal = Normalize([0.5, 0.5, 0.5], [0.5, 0.25, 1.0])
    torch.testing.assert_close(normal(torch.ones(1, 3, 1, 1)).flatten(), torch.tensor([1.0, 2.0, 0.5]))
    torch.manual_seed(0)
    cut = Cutout(3)(torch.ones(50, 1, 8, 8))
    assert ((cut == 0).flatten(1).sum(1) <= 9).all()
    with pytest.raises(ValueError, match="lion"):
        fit_classifier(net, (x, torch.zeros(6, dtype=torch.long)), 1, optimizer="lion")  # pyright: ignore


@pytest.mark.parametrize(("rate", "obeys"), [(0.1, True), (0.0, False)])
def test_a_poisoned_network_obeys_and_a_clean_one_does_not(rate, obeys):
    digits = load_data("digits", normalize=False)
    trigger, labels = PatchTrigger.checkerboard(digits.shape, size=2, margin=0), AllToOne(0, 10)
    made = poison(digits.train.tensors, trigger, labels, rate=rate, seed=0)
    torch.manual_seed(0)
    net = SmallConvNet(1, 10, width=8)
    fit_classifier(net, made, epochs=8, lr=0.1)
    found = metrics.attack_metrics(net, digits.test.tensors, poisoned_test(digits.test.tensors, trigger, labels))
    assert found.acc > 0.9
    assert found.asr >= 0.95 if obeys else found.asr <= 0.1


class Listed(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.randint(0, 256, (8, 6, 6, 1), dtype=torch.uint8), [0, 1] * 4, "float images"),
        (255 * torch.rand(8, 1, 6, 6), [0, 1] * 4, "images in"),
        (torch.rand(8, 1, 6, 6), [0.5, 1.5] * 4, "integer labels"),
    ],
)
def test_items_are_checked_at_the_door(x, y, message):
    with pytest.raises(ValueError, match=message):
        poison(Listed(x, y), PatchTrigger.checkerboard((1, 6, 6), size=2), AllToOne(0, 2), rate=0.25, seed=0)


def test_a_trigger_that_leaves_the_range_is_refused():
    x, y = torch.rand(8, 1, 6, 6), torch.arange(8) % 2
    before = x.clone()
    with pytest.raises(ValueError, match="keep images"):
        poison((x, y), lambda t: t.add_(2), AllToOne(0, 2), rate=0.25, seed=0).tensors()
    assert torch.equal(x, before)


@pytest.mark.parametrize("change", ["append", "subset", "relabelled", "clean"])
def test_sets_of_other_rows_come_back_too(tmp_path, change):
    made = poison(data(), TRIGGERS["patch"], AllToOne(0, 4), rate=0.1, seed=0, mode="append")
    if change == "subset":
        made = made.subset(np.random.default_rng(0).random(len(made)) < 0.6)
    elif change == "relabelled":
        made = made.relabelled((made.y + 1) % 4)
    elif change == "clean":
        made = made.clean_view()
    again = load(made.save(tmp_path), data())
    for field in ("y", "y_true", "is_poison", "is_cover", "source_index"):
        assert np.array_equal(getattr(again, field), getattr(made, field))
    assert torch.equal(again.tensors()[0], made.tensors()[0])


def test_a_saved_set_holds_the_poisoned_rows_alone(tmp_path):
    many = (torch.rand(4000, 1, 12, 10, generator=torch.Generator().manual_seed(0)), torch.arange(4000) % 4)
    made = poison(many, TRIGGERS["patch"], AllToOne(0, 4), rate=0.01, seed=0)
    made.save(tmp_path)
    assert (tmp_path / "poison.npz").stat().st_size < 10_000  # images and triggers; int64 of all rows would be 96 kB
    with pytest.raises(ValueError, match="other labels"):
        load(tmp_path, (many[0], many[1].flip(0)))


def test_images_of_another_shape_are_refused_at_the_door():
    """The first triggered item once told it, and channels that stand last nothing at all."""
    y = torch.arange(40) % 4
    trigger = PatchTrigger.checkerboard((1, 8, 8), size=2)
    for shape in ((8, 8, 1), (1, 10, 10), (8, 8, 3)):
        x = torch.rand(40, *shape)
        for call in (poison, poisoned_test):
            arguments = {"rate": 0.1, "seed": 0} if call is poison else {}
            with pytest.raises(ValueError, match=r"channels seem to stand last|expected images of shape \(1, 8, 8\)"):
                call((x, y), trigger, AllToOne(1, 4), **arguments)
    with pytest.raises(ValueError, match=r"expected images of shape \(1, 8, 8\)"):
        poison((torch.rand(40, 2, 10, 10), y), lambda x: x, AllToOne(1, 4), rate=0.1, cover_trigger=trigger, seed=0)


def test_pictures_are_poisoned_as_they_are_seen():
    from PIL import Image

    x = (torch.rand(40, 8, 8) * 255).round()
    pictures = [(Image.fromarray(image.byte().numpy()), k % 4) for k, image in enumerate(x)]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return len(pictures)

        def __getitem__(self, k):
            return pictures[k]

    trigger, target = PatchTrigger.checkerboard((1, 8, 8), size=2), AllToOne(1, 4)
    poisoned = poison(Pictures(), trigger, target, rate=0.1, seed=0)
    expected = poison((x[:, None] / 255, torch.arange(40) % 4), trigger, target, rate=0.1, seed=0)
    for got, wanted in zip(poisoned.tensors(), expected.tensors(), strict=True):
        assert torch.equal(got, wanted)


def test_networks_and_images_of_nan_are_not_scored():
    """NaN has the label of the first class: a network of it obeyed every trigger that leads there."""
    x, y = torch.rand(40, 1, 8, 8), torch.arange(40) % 4
    attacked = poisoned_test((x, y), PatchTrigger.checkerboard((1, 8, 8), size=2), AllToOne(0, 4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    assert metrics.attack_metrics(net, (x, y), attacked).n_clean == 40
    bad = x.clone()
    bad[3, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="the clean images to be finite"):
        metrics.attack_metrics(net, (bad, y), attacked)
    net[1].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"holds NaN or infinity in 1\.weight"):
        metrics.attack_metrics(net, (x, y), attacked)
