"""The estimators on layers whose information is known, the recorder, and the task of the icosahedron."""

from __future__ import annotations

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from torchfolio.data import load
from torchfolio.engine import fit
from torchfolio.insight.adaptive_mi import (
    AdaptiveBinning,
    AdaptiveKDE,
    FixedBinning,
    InformationPlaneRecorder,
    discrete_mi,
    information_plane,
    joint_entropy,
    kde_information,
    log_spaced,
    permuted_label_information,
)
from torchfolio.models import MLP, ConvNet

EVERY = [
    AdaptiveBinning(8),
    FixedBinning(8, -3, 3),
    AdaptiveKDE(),
    AdaptiveKDE(bound="lower"),
    AdaptiveKDE(scaling="variance"),
]


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="almost all")
        yield


def layer(n=300, d=3, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=dtype)


def patterns():
    data = load("szt", normalize=False, val=0)
    x, y = (torch.cat([a, b]) for a, b in zip(data.train.tensors, data.test.tensors, strict=True))
    order = (x @ (2.0 ** torch.arange(11, -1, -1))).long().argsort()
    return x[order].long(), y[order]


def test_the_task_of_the_icosahedron():
    x, y = patterns()
    assert x.shape == (4096, 12)
    assert int(y.sum()) == 2118
    assert x[1].tolist() == [0] * 11 + [1]
    # The shift by six places is a symmetry, and so is the whole group: classes of orbits are constant.
    place = (x.roll(6, 1) @ (2 ** torch.arange(11, -1, -1))).long()
    assert torch.equal(y[place], y)
    p = float(y.double().mean())
    assert -(p * math.log2(p) + (1 - p) * math.log2(1 - p)) == pytest.approx(0.99916, abs=1e-5)


def test_the_rule_and_the_table_agree():
    from torchfolio.data.embedded import _ANTIPODES, _EDGES, _pairs

    x, y = patterns()
    ones, edges, antipodes = x.sum(1), _pairs(x, _EDGES), _pairs(x, _ANTIPODES)
    seven = (ones == 7) & ~((edges == 8) & (antipodes == 2))
    six = (ones == 6) & ((edges >= 7) | ((edges == 6) & (antipodes == 0)))
    table = (ones >= 8) | seven | six | ((ones == 5) & (edges == 7))
    assert torch.equal(table.long(), y)


def test_symmetries_of_the_solid_are_symmetries_of_the_task():
    """Every relabelling of vertices that keeps edges keeps classes; a few are found by search."""
    from torchfolio.data.embedded import _EDGES

    x, y = patterns()
    near = np.zeros((12, 12), bool)
    for i, j in _EDGES:
        near[i, j] = near[j, i] = True
    assert (near.sum(0) == 5).all()

    def grow(image):
        v = len(image)
        if v == 12:
            yield list(image)
            return
        for w in set(range(12)) - set(image):
            if all(near[v, u] == near[w, image[u]] for u in range(v)):
                yield from grow([*image, w])

    found = list(grow([]))
    assert len(found) == 120
    for image in found[::17]:
        moved = torch.zeros_like(x)
        moved[:, image] = x
        place = (moved @ (2 ** torch.arange(11, -1, -1))).long()
        assert torch.equal(y[place], y)


def test_entropy_of_rows():
    codes = torch.tensor([[0, 1], [0, 1], [1, 1], [2, 5]])
    assert joint_entropy(codes) == pytest.approx(1.5)
    wide = torch.randint(0, 50, (64, 200), generator=torch.Generator().manual_seed(0))
    assert joint_entropy(wide) == pytest.approx(6)
    assert joint_entropy(torch.zeros(5, 3, dtype=torch.long)) == 0
    assert discrete_mi(codes, torch.tensor([0, 0, 1, 1])) == pytest.approx(1)
    with pytest.raises(ValueError, match="integer codes"):
        joint_entropy(torch.rand(3, 2))


def test_bins_hold_equally_many_values():
    t = torch.randperm(60, generator=torch.Generator().manual_seed(1)).double()[:, None]
    for bins in (4, 30, 60):
        assert AdaptiveBinning(bins)(t).i_xt == pytest.approx(math.log2(bins), abs=1e-12)
    top = AdaptiveBinning(4, official_top_bin=True).codes(t)
    assert (top == 5).sum() == 1
    assert AdaptiveBinning(4, per_neuron=True).codes(torch.cat([t, 1000 + t], 1)).unique().tolist() == [1, 2, 3, 4]


def test_inactive_units_have_a_code_of_their_own():
    t = layer().relu()
    t[0, 0] = -0.0
    codes = AdaptiveBinning(5).codes(t)
    assert torch.equal(codes == 0, t == 0)
    assert set(codes.unique().tolist()) == set(range(6))
    assert (AdaptiveBinning(5, atom=None).codes(t)[t == 0] == 1).all()


def test_adaptive_bins_do_not_change_under_increasing_maps():
    t = layer()
    for made in ((3 * t).exp() + 7, 1000 * t, t.atan()):
        assert torch.equal(AdaptiveBinning().codes(made), AdaptiveBinning().codes(t))
    assert torch.equal(AdaptiveBinning().codes(10 * t.relu()), AdaptiveBinning().codes(t.relu()))


def test_a_fixed_range_mistakes_scale_for_information():
    t = 0.1 * layer().relu()
    assert abs(FixedBinning(30, 0, 1)(10 * t).i_xt - FixedBinning(30, 0, 1)(t).i_xt) >= 1
    assert AdaptiveBinning(30)(10 * t).i_xt == AdaptiveBinning(30)(t).i_xt


def test_kernels_follow_the_scale():
    t = layer()
    for bound in ("upper", "lower"):
        estimator = AdaptiveKDE(bound=bound)
        for factor in (1e-8, 7.0, 1e6):
            assert estimator(factor * t).i_xt == pytest.approx(estimator(t).i_xt, abs=1e-9)
    assert AdaptiveKDE(scaling="none")(t / 50).i_xt < AdaptiveKDE(scaling="none")(t).i_xt - 0.5


def test_bounds_of_the_kernel_estimate():
    t = layer()
    for variance in (1e-4, 1e-2, 1.0):
        low, high = kde_information(t, variance, "lower"), kde_information(t, variance, "upper", chunk=7)
        assert 0 <= low <= high <= math.log2(300) + 1e-12
    assert kde_information(t, 1e-9) == pytest.approx(math.log2(300))
    assert kde_information(t, 1e9) == pytest.approx(0, abs=1e-6)
    far = t + 1e7  # where a product of matrices alone would lose the distances
    assert kde_information(far, 1e-3) == pytest.approx(kde_information(t, 1e-3), rel=1e-5)
    with pytest.raises(ValueError, match="finite"):
        kde_information(t * math.nan, 1.0)


def test_two_points_by_hand():
    t = torch.tensor([[0.0], [2.0]])
    wanted = -math.log2(0.5 * (1 + math.exp(-4 / 2)))
    assert kde_information(t, 1.0) == pytest.approx(wanted)
    assert kde_information(t, 1.0, "lower") == pytest.approx(-math.log2(0.5 * (1 + math.exp(-4 / 8))))


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_information_stays_within_its_bounds(estimator):
    t, y = layer(), torch.arange(300) % 3
    found = estimator(t, y)
    assert 0 <= found.i_ty <= min(math.log2(3), found.i_xt) + 1e-9
    assert found.i_xt <= math.log2(300)
    told = estimator(t + 100.0 * y[:, None] if not isinstance(estimator, FixedBinning) else t, y)
    assert told.i_ty >= found.i_ty - 1e-9


@pytest.mark.parametrize("estimator", EVERY, ids=repr)
def test_a_dead_layer_carries_nothing(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert estimator(torch.zeros(50, 4), torch.arange(50) % 2) == (0, 0)


def test_repeated_inputs_are_counted_once():
    x = torch.arange(8).repeat(4)[:, None].double()
    noise = torch.arange(32)[:, None].double()
    assert AdaptiveBinning(8)(x, inputs=x).i_xt == pytest.approx(3)
    assert AdaptiveBinning(32)(noise, inputs=x).i_xt == pytest.approx(3)


def test_shuffled_labels_carry_the_bias_alone():
    t, y = layer(1000), torch.arange(1000) % 2
    mean, std = permuted_label_information(AdaptiveBinning(3), t, y)
    assert abs(AdaptiveBinning(3)(t, y).i_ty - mean) < 5 * std
    symbols = len(np.unique(AdaptiveBinning(3).codes(t).numpy(), axis=0))
    assert 0 < mean < 2 * (symbols - 1) / (2 * 1000 * math.log(2))


def test_saturated_estimates_say_so():
    with pytest.warns(UserWarning, match="says nothing"):
        AdaptiveBinning(30)(layer(d=20))


def test_the_plane_of_a_network():
    net, x, y = MLP(4, 3, (6, 5)), torch.rand(200, 4), torch.arange(200) % 3
    net.train()
    plane = information_plane(net, ["layer1", net.layer2], x, y, output=True)
    assert plane.layers == ("layer1", "layer2", "output")
    assert plane.to_frame().shape == (3, 4)
    assert net.training
    assert plane.plot().axes
    with torch.no_grad():
        net.layer2[0].weight.zero_()
        net.layer2[0].bias.fill_(-1)
    dead = information_plane(net, ["layer2"], x, y).to_frame().loc["layer2"]
    assert (dead["i_xt"], dead["dead"]) == (0, 1)


def test_saturated_moments_are_hollow_and_marked():
    """A wide layer beside a narrow one: each input has a pattern of its own in the wide one."""
    torch.manual_seed(0)
    net, x, y = MLP(4, 3, (40, 2)), torch.rand(100, 4), torch.arange(100) % 3
    recorder = InformationPlaneRecorder(net, ["layer1", "layer2"], x, y, AdaptiveBinning(4))
    recorder.step(0)
    recorder.step(5)
    frame = recorder.frame()
    assert frame["saturated"].tolist() == [True, False, True, False]
    assert recorder.compression()["saturated"].tolist() == [True, False]
    for figure, moments in ((recorder.plot(), 2), (recorder.planes[0].plot(), 1)):
        wide, narrow = figure.axes[0].collections[:2]
        assert wide.get_facecolor().size == 0 or (wide.get_facecolor()[:, 3] == 0).all()
        assert (narrow.get_facecolor()[:, 3] > 0).all()
        assert len(wide.get_edgecolor()) == len(narrow.get_facecolor()) == moments


def test_maps_need_to_be_reduced():
    net, x, y = ConvNet(3, 1, (4, 6)), torch.rand(60, 1, 8, 8), torch.arange(60) % 3
    names = [n for n, _ in net.named_children()][:1]
    with pytest.raises(ValueError, match="reduce="):
        information_plane(net, names, x, y)
    mean = information_plane(net, names, x, y, AdaptiveBinning(2), reduce="mean")
    flat = information_plane(net, names, x, y, AdaptiveBinning(2), reduce="flatten")
    assert mean.i_xt[0] <= flat.i_xt[0]
    assert flat.saturated[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdaptiveBinning(1), "n_bins to be a whole number of at least 2"),
        (lambda: FixedBinning(4, 1, 0), "low < high"),
        (lambda: AdaptiveKDE(0), "positive"),
        (lambda: AdaptiveKDE(bound="middle"), "middle"),  # pyright: ignore
        (lambda: AdaptiveBinning()(torch.rand(1, 3)), "at least 2 inputs"),
        (lambda: AdaptiveBinning()(torch.full((4, 2), torch.nan)), "NaN"),
        (lambda: AdaptiveBinning()(torch.rand(4, 2), torch.zeros(3, dtype=torch.long)), r"labels \[4\]"),
        (lambda: AdaptiveKDE()(torch.rand(4, 2, 2)), r"\[N, d\]"),
        (lambda: log_spaced(1, 5), "moments"),
        (lambda: information_plane(MLP(2, 2), ["nothing"], torch.rand(4, 2), torch.arange(4)), "no layer"),
        (
            lambda: information_plane(MLP(2, 2, (3,)), ["layer1"], torch.full((4, 2), torch.nan), torch.arange(4)),
            "of layer1 hold NaN",
        ),
        (
            lambda: information_plane(MLP(2, 2, (3,)), ["layer1"], torch.rand(4, 2).double(), torch.arange(4)),
            r"weights are torch.float32\) .* \(4, 2\) torch.float64",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_moments_are_log_spaced():
    moments = log_spaced(10, 1000)
    assert moments[0] == 0
    assert moments[-1] == 1000
    assert list(moments) == sorted(set(moments))


def test_the_recorder_in_a_loop_and_in_fit():
    torch.manual_seed(0)
    x, y = torch.rand(120, 4), torch.arange(120) % 2
    net = MLP(4, 2, (5,))
    by_hand = InformationPlaneRecorder(net, ["layer1"], x, y, AdaptiveBinning(5), when=(0, 2))
    assert by_hand.step(1) is None
    assert len(by_hand.frame()) == 0
    with pytest.raises(ValueError, match="nothing"):
        by_hand.compression()
    recorder = InformationPlaneRecorder(net, ["layer1"], x, y, AdaptiveKDE(), when=(0, 1, 3), output=True)
    fit(net, (x, y), epochs=3, callbacks=[recorder], progress=False)
    frame = recorder.frame()
    assert frame.index.get_level_values("epoch").unique().tolist() == [0, 1, 3]
    summary = recorder.compression()
    assert set(summary.index) == {"layer1", "output"}
    values = frame.xs("layer1", level="layer")["i_xt"]
    assert summary.loc["layer1", "compression"] == pytest.approx(values.max() - values.iloc[-1])
    assert recorder.plot().axes
    again = InformationPlaneRecorder(net, ["layer1"], x, y)
    again.load_state_dict(copy.deepcopy(dict(recorder.state_dict())))
    assert again.frame().equals(frame)


def test_other_tables_and_dtypes_work():
    wine = load("wine")
    x, y = wine.train.tensors
    net = nn.Sequential(nn.Linear(13, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    plane = information_plane(net, ["1"], x.double(), y, AdaptiveKDE())
    assert 0 < plane.i_ty[0] <= math.log2(3)


def test_bfloat16_and_arrays():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(60, 6), torch.randint(3, (60,))
    plain = information_plane(net, ["1"], x, y)
    assert information_plane(net, ["1"], x.numpy(), y.numpy()) == plain
    halved = information_plane(net.bfloat16(), ["1"], x.bfloat16(), y)
    assert abs(halved.i_ty[0] - plain.i_ty[0]) < 0.5


def test_estimators_take_arrays():
    generator = torch.Generator().manual_seed(0)
    t, y = torch.randn(40, 2, generator=generator).round(), torch.randint(3, (40,), generator=generator)
    for estimator in (AdaptiveBinning(4), FixedBinning(4, -4, 4), AdaptiveKDE()):
        assert estimator(t.numpy(), y.numpy()) == estimator(t, y)
    assert discrete_mi(t.long().numpy(), y.numpy()) == discrete_mi(t.long(), y)
    assert joint_entropy(t.long().numpy()) == joint_entropy(t.long())
    wanted = kde_information(t, 0.1)
    assert 0 < wanted == kde_information(t.numpy(), 0.1) == kde_information(t.bfloat16(), 0.1)  # whole numbers
    assert permuted_label_information(AdaptiveKDE(), t.numpy(), y.numpy(), 2) == permuted_label_information(
        AdaptiveKDE(), t, y, 2
    )
    for bad in (t[0], t[:1], t * torch.nan):
        with pytest.raises(ValueError, match=r"expected|NaN"):
            kde_information(bad, 0.1)
    with pytest.raises(ValueError, match="bound"):
        kde_information(t, 0.1, "both")  # pyright: ignore[reportArgumentType]
