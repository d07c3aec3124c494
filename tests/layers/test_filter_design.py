"""Filter design: exact banks, folded whitening, initialisers, learners that recover what is known, choice and counts."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from torchfolio.layers import (
    Bank,
    FilterLearner,
    PatchNormConv2d,
    bench,
    dct_bank,
    filter_count,
    filter_size_report,
    gabor_bank,
    init_,
    marchenko_pastur_count,
    random_bank,
    receptive_field,
    redundancy,
    select_filters,
    wavelet_bank,
)
from torchfolio.layers.filter_design import KNOWN_PLANS, METHODS, SCHEMES, encode
from torchfolio.layers.filter_learning import ICA, ConvKMeans, SphericalKMeans
from torchfolio.layers.filter_networks import Hebbian
from torchfolio.layers.patches import draw_patches, normalize_patches


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def digits(n=400):
    X, y = load_digits(return_X_y=True)
    return torch.from_numpy(X[:n]).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(y[:n])


# Banks


@pytest.mark.parametrize(("size", "channels"), [(5, 1), (4, 3)])
def test_dct_is_orthonormal_and_orthogonal_rows_are(size, channels):
    for bank in (dct_bank(size, channels), random_bank(channels * size**2, size, channels, orthogonal=True)):
        flat = bank.filters.flatten(1)
        assert (flat @ flat.mT - torch.eye(len(bank))).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="at most"):
        dct_bank(size, channels, channels * size**2 + 1)


def test_analytic_banks_have_norm_one_and_no_mean():
    for bank in (gabor_bank(5), gabor_bank(6, 3, n_orient=3), wavelet_bank(5, 3), wavelet_bank(4, 1, "gaussian")):
        flat = bank.filters.flatten(1)
        assert torch.allclose(flat.norm(dim=1), torch.ones(len(bank)), atol=1e-5)
        # Opponent colours cancel too, but grey filters have no mean by themselves.
        assert bank.filters.sum((2, 3)).abs().max() < 1e-4
    for kind, count in (("haar", 7), ("db2", 4)):
        flat = wavelet_bank(4, 1, kind).filters.flatten(1)
        assert len(flat) == count
        assert (flat @ flat.mT).abs().fill_diagonal_(0).max() < 0.6
    with pytest.raises(ValueError, match="size of at least 4"):
        wavelet_bank(3, 1, "db2")


@pytest.mark.parametrize(("channels", "stride", "padding"), [(1, 1, 0), (3, 2, 0), (3, 1, 2)])
def test_layers_equal_whitening_and_dot_products_of_unfolded_patches(channels, stride, padding):
    X = torch.rand(40, channels, 12, 11, generator=generator())
    bank = FilterLearner("kmeans", 6, 5, n_patches=2000, random_state=0).fit(X).bank_
    raw = F.unfold(X[:4], 5, padding=padding, stride=stride).mT
    D, own = bank.filters.flatten(1), bank.whitening
    normal = (own(raw) @ D.mT).mT
    plain = (((raw - own.mean) @ own.matrix.mT) @ D.mT).mT
    assert (bank.as_patch_norm_conv(stride, padding)(X[:4]).flatten(2) - normal).abs().max() <= 1e-4
    assert (bank.as_conv(stride, padding)(X[:4]).flatten(2) - plain).abs().max() <= 1e-4


def test_patch_norm_layer_is_a_good_module():
    layer, x = PatchNormConv2d(2, 3, 3, padding=1, contrast=0.1), torch.rand(2, 2, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    double = copy.deepcopy(layer).double()
    assert torch.autograd.gradcheck(double, x.double().requires_grad_())
    assert torch.allclose(torch.compile(layer, backend="eager")(x), layer(x))
    assert copy.deepcopy(layer).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert torch.allclose(layer(3 * x + 0), PatchNormConv2d.forward(layer, 3 * x))
    for bad in ({"groups": 2}, {"padding": "same"}, {"contrast": 0.0}, {"dilation": 2}):
        with pytest.raises(ValueError, match="expected"):
            PatchNormConv2d(2, 2, 3, **bad)


# Initialisation


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_have_their_scale(scheme):
    net = nn.Sequential(nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten())
    x = torch.randn(32, 16, 6, 6, generator=generator())
    assert init_(net, scheme, data=x, generator=generator()) is net
    weight, inputs, outputs = net[0].weight, 144, 576
    std = {"gaussian": 0.01, "lecun_1998": 2.4 / inputs / 3**0.5, "lecun_normal": inputs**-0.5,
           "xavier": (2 / (inputs + outputs)) ** 0.5, "he": (2 / inputs) ** 0.5}.get(scheme)  # fmt: skip
    if std is not None:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    if scheme == "orthogonal":
        flat = net[2].weight.flatten(1)
        assert (flat @ flat.mT - torch.eye(64)).abs().max() < 1e-5
    if scheme == "delta_orthogonal":
        assert torch.allclose(net[2].weight.norm(), net[2].weight[:, :, 1, 1].norm())
    if scheme == "lsuv":
        first = net[0](x)
        assert abs(first.var(correction=0).item() - 1) < 0.05
        assert abs(net[2](first.relu()).var(correction=0).item() - 1) < 0.05
    assert net[0].bias.abs().max() == 0


def test_lsuv_skips_what_a_norm_follows_and_leaves_no_trace():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.Linear(144, 3))
    x = torch.rand(20, 1, 8, 8)
    before = copy.deepcopy(net[1].state_dict())
    init_(net.train(), "lsuv", data=x)
    rows = net[0].weight.flatten(1)
    assert torch.allclose(rows @ rows.mT, torch.eye(4), atol=1e-5)
    assert all(torch.equal(v, net[1].state_dict()[k]) for k, v in before.items())
    assert net.training and not any(m._forward_hooks for m in net.modules())  # noqa: PT018
    with pytest.raises(ValueError, match="constant ones from '5'"):
        init_(net, "lsuv", data=torch.zeros(4, 1, 8, 8))
    assert not any(m._forward_hooks for m in net.modules())
    bank = FilterLearner("pca", 4, 3, random_state=0).fit(x).bank_
    assert torch.allclose(init_(net[0], bank)(x), bank.as_conv()(x))
    net[0].requires_grad_(False)
    for bad in (lambda: init_(net, "lsuv"), lambda: init_(net, "best"), lambda: init_(nn.ReLU(), "he"),
                lambda: init_(net[0], "he"), lambda: init_(nn.Conv2d(1, 5, 3), bank),
                lambda: init_(nn.Conv2d(1, 4, 3, bias=False), bank)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()


# Learning


@pytest.mark.filterwarnings("ignore:FastICA did not converge")
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_repeats(method):
    X, _ = digits(150)
    state = torch.get_rng_state()
    learner, again = (FilterLearner(method, 6, 3, n_patches=1500, random_state=3).fit(X) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert learner.filters_.shape == (6, 1, 3, 3)
    assert np.array_equal(learner.filters_, again.filters_)
    norms = np.linalg.norm(learner.filters_.reshape(6, -1), axis=1)
    assert np.allclose(norms, 1, atol=1e-4)
    assert learner.transform(X[:7]).shape == (7, 48)
    assert clone(learner).get_params() == learner.get_params()


@pytest.mark.parametrize("d", [2, 5, 10])
def test_sanger_rows_are_principal_axes(d):
    scale = torch.linspace(3, 1, d)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator())).Q
    x = torch.randn(4000, d, generator=generator(1)) * scale @ basis.mT
    D = Hebbian(epochs=20).learn(x, min(3, d), generator(2))
    axes = torch.linalg.eigh(torch.cov(x.mT)).eigenvectors.mT.flip(0)[: min(3, d)]
    assert (D * axes).sum(1).abs().min() >= 0.98


def test_ica_recovers_sources_and_refuses_too_many():
    sources = torch.rand(8000, 3, generator=generator()) - 0.5
    mixing = torch.randn(3, 3, generator=generator(1))
    W = ICA().learn(sources @ mixing.mT, 3, generator(2))
    found = F.normalize(W @ mixing, dim=1).abs()
    assert found.amax(1).min() > 0.98
    for method in ("pca", "ica", "hebbian"):
        with pytest.raises(ValueError, match="at most 9 filters"):
            FilterLearner(method, 10, 3).fit(digits()[0])


def test_convolutional_kmeans_finds_atoms_that_shift():
    atoms = F.normalize(torch.randn(4, 25, generator=generator()), dim=1)
    place = torch.randint(0, 36, (2000,), generator=generator(1))
    which = torch.randint(0, 4, (2000,), generator=generator(2))
    windows = torch.zeros(2000, 10, 10)
    for i in range(2000):
        r, c = divmod(int(place[i]), 6)
        windows[i, r : r + 5, c : c + 5] = atoms[which[i]].view(5, 5)
    shifted = F.unfold(windows[:, None], 5).mT
    conv = max((ConvKMeans(30).learn(shifted, 6, generator(s)) @ atoms.mT).abs().amax(0).mean() for s in range(3))
    patches = shifted[torch.arange(2000), torch.randint(0, 36, (2000,), generator=generator(3))]
    plain = max((SphericalKMeans(30).learn(patches, 6, generator(s)) @ atoms.mT).abs().amax(0).mean() for s in range(3))
    assert conv > 0.8
    assert conv > plain + 0.1


def test_blank_patches_are_left_out_and_errors_say_why():
    X, y = digits()
    X = F.pad(X, (6, 6, 6, 6))
    kept, dropped = (draw_patches(X, 3, 5000, drop_blank=drop) for drop in (False, True))
    assert (kept.var(1) < 1e-8).float().mean() > 0.5
    assert dropped.var(1).min() > 0
    nan = X.clone()
    nan[0, 0, 0, 0] = torch.nan
    for bad in (lambda: FilterLearner(size=30).fit(X), lambda: FilterLearner().fit(torch.ones(5, 1, 9, 9)),
                lambda: FilterLearner("lda").fit(X), lambda: FilterLearner(n_filters=0).fit(X),
                lambda: FilterLearner("pca", 4).fit(X[:, 0]), lambda: FilterLearner("rotations", 4, 3).fit(X[:, :, :9]),
                lambda: select_filters(dct_bank(3), X), lambda: select_filters(dct_bank(3), X, y, n=10),
                lambda: select_filters(dct_bank(3), X, y[:5]), lambda: bench([], (X, y), (X, y)),
                lambda: bench(dct_bank(3, 3), (X, y), (X, y)), lambda: Bank(torch.zeros(2, 3)),
                lambda: Bank(torch.full((1, 1, 2, 2), math.nan)), lambda: filter_count(X, 40),
                lambda: receptive_field(nn.Linear(2, 2)), lambda: filter_size_report(X, test_share=1.0)):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()


# Encoding, comparing, choosing, counting


def test_encoders_are_their_formulas():
    X, _ = digits(20)
    bank = FilterLearner("kmeans", 4, 3, n_patches=1000, random_state=0).fit(X).bank_
    s = bank.as_patch_norm_conv()(X).detach()
    split = torch.stack([(s - 0.25).relu(), (-s - 0.25).relu()], 2)
    pooled = F.adaptive_avg_pool2d(split.flatten(1, 2), 2).view(20, 4, 2, 2, 2)
    assert torch.allclose(encode(bank, X), pooled, atol=1e-5)
    x = bank.whitening(F.unfold(X, 3).mT)
    z = torch.cdist(x, bank.filters.flatten(1))
    triangle = (z.mean(2, keepdim=True) - z).relu().mT.view(20, 4, 6, 6)
    assert torch.allclose(encode(bank, X, "triangle")[:, :, 0], F.adaptive_avg_pool2d(triangle, 2), atol=1e-3)
    assert torch.allclose(encode(bank, X, "linear")[:, :, 0], F.adaptive_avg_pool2d(s, 2), atol=1e-5)


def test_the_bench_is_a_table():
    X, y = digits(900)
    parts = (X[:600], y[:600]), (X[600:], y[600:])
    table = bench([random_bank(8, 3, seed=1), dct_bank(3, 1, 8)], *parts)
    assert list(table["bank"]) == ["random", "dct"]
    assert table["accuracy"].min() > 70
    assert table["redundancy"].between(0, 1).all()
    twice = Bank(torch.cat([dct_bank(3).filters[:2]] * 2))
    assert redundancy(twice) == pytest.approx(1)


def test_joint_choice_takes_no_copies():
    X, y = digits(900)
    bank = FilterLearner("kmeans", 8, 3, random_state=0).fit(X).bank_
    double = bank.take([0, 0, 0, *range(8)])
    chosen, gains = select_filters(double, X, y, "joint", 5)
    assert sum(i in (0, 1, 2, 3) for i in chosen) <= 1
    assert gains == sorted(gains, reverse=True)
    few, _ = select_filters(double, X, y, "joint", tol=1e9)
    assert few == []
    for method in ("marginal", "spectral", "redundancy"):
        chosen, scores = select_filters(bank, X, y, method, 4)
        assert len(set(chosen)) == len(scores) == 4


def test_counts_and_reports():
    noise = torch.randn(8000, 75, generator=generator(), dtype=torch.float64)
    assert marchenko_pastur_count(torch.linalg.eigvalsh(torch.cov(noise.mT)), 8000) <= 1
    signal = noise + 3 * noise[:, :1] * torch.linspace(0, 1, 75)
    assert marchenko_pastur_count(torch.linalg.eigvalsh(torch.cov(signal.mT)), 8000) >= 1
    X, y = digits()
    counts = filter_count(X, 3)
    values = np.linalg.eigvalsh(np.cov(normalize_patches(draw_patches(X, 3, 20_000)).T))[::-1]
    assert counts["n_90"] == int(np.searchsorted(np.cumsum(values) / values.sum(), 0.9)) + 1
    assert counts["participation"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-3)
    report = filter_size_report(X, y, (2, 3), n_filters=4)
    assert list(report["size"]) == [2, 3]
    assert {"border", "accuracy", "n_99"} <= set(report)
    net = nn.Sequential(nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, dilation=2))
    assert receptive_field(net) == [("0", 5, 1), ("1", 6, 2), ("2", 14, 2)]
    assert KNOWN_PLANS["AlexNet"][0] == (11, 96)


def test_what_says_nothing_is_refused_in_one_sentence():
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 2
    bank = random_bank(4, 3)
    for call, words in (
        (lambda: FilterLearner(size=3, contrast=-1.0).fit(x), "contrast"),
        (lambda: FilterLearner(size=3, encoder="both").fit(x), "encoder"),  # pyright: ignore[reportArgumentType]
        (lambda: select_filters(bank, x, y, tol=float("nan")), "tol"),
        (lambda: select_filters(bank, x, y * 0), "two classes, got 1"),
        (lambda: select_filters(bank, x[:1], y[:1]), "two images, got 1"),
        (lambda: filter_size_report(x, sizes=()), "at least one size"),
        (lambda: init_(nn.Conv2d(1, 2, 3), "lsuv", data=x * float("nan")), "data to be finite"),
        (lambda: init_(nn.Conv2d(1, 2, 3), "orthogonal", gain=float("nan")), "gain"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(TypeError, match="labels"):
        select_filters(bank, x, ["a", "b"] * 6)  # pyright: ignore[reportArgumentType]
    layer = bank.as_patch_norm_conv(padding=1)
    assert torch.allclose(layer(x[0]), layer(x[:1])[0])


def test_a_transformers_convnet_is_scaled_layer_by_layer():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    torch.manual_seed(0)
    net, x = transformers.ResNetModel(config), torch.rand(4, 3, 32, 32)
    bank = gabor_bank(7, 3, n_orient=2, n_scales=1).take(slice(0, 8))
    init_(init_(net, "lsuv", data=x).embedder.embedder.convolution, bank)  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(net.embedder.embedder.convolution.weight, bank.filters)
    assert net(x).pooler_output.isfinite().all()
    assert receptive_field(net)[0] == ("embedder.embedder.convolution", 7, 2)
