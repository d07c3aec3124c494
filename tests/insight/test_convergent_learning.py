"""Convergent learning: the statistics against numpy, matching of permuted copies, the lasso's conditions."""

from __future__ import annotations

import copy
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.insight.convergent_learning import (
    ActivationStatistics,
    ConvergenceReport,
    PairStatistics,
    bipartite_match,
    correlation_blocks,
    mi_matrix,
    mutual_information,
    normalized_laplacian,
    plot_filter_pairs,
    semi_match,
    sparse_prediction,
    spectral_clusters,
)
from torchfolio.insight.convergent_learning.prediction import lasso, violation
from torchfolio.models import MLP


def conv_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU()),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(32, 4)),
    )


def images(n: int = 200) -> torch.Tensor:
    return torch.randn(n, 1, 7, 7, generator=torch.Generator().manual_seed(9))


def mixed(n: int = 4000, units: int = 8, seed: int = 0) -> torch.Tensor:
    """Correlated rectified activations."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(n, units, generator=g) @ torch.randn(units, units, generator=g) / units**0.5).relu()


def test_statistics_over_uneven_batches_are_those_of_numpy():
    a, b = mixed(seed=1) + 1000, mixed(units=5, seed=2)
    statistics = PairStatistics()
    for x, y in zip(a.split([1, 1000, 3, 2996]), b.split([1, 1000, 3, 2996]), strict=True):
        statistics.add(x, y)
    blocks = statistics.finalize()
    expected = np.corrcoef(np.concatenate([a.double(), b.double()], 1).T)
    np.testing.assert_allclose(blocks.joint().numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(blocks.mean[:8].numpy(), a.double().mean(0).numpy(), rtol=1e-9)
    assert blocks.count == 4000
    assert blocks.sizes == (8, 5)
    for half, rows in zip(blocks.halves, (slice(0, None, 2), slice(1, None, 2)), strict=True):
        expected = np.corrcoef(np.concatenate([a[rows].double(), b[rows].double()], 1).T)
        np.testing.assert_allclose(half.joint().numpy(), expected, atol=1e-6)


def test_positions_are_samples():
    maps = torch.randn(6, 4, 3, 5)
    flat = maps.permute(0, 2, 3, 1).reshape(-1, 4)
    with pytest.warns(UserWarning, match="noisy"):
        tokens = correlation_blocks(torch.randn(1, 7, 4), torch.randn(1, 7, 4))
    assert tokens.count == 7
    blocks = correlation_blocks(maps, maps.flip(1))
    np.testing.assert_allclose(blocks.within_a.numpy(), np.corrcoef(flat.T), atol=1e-6)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(correlation_blocks(tokens, tokens).within_a, blocks.within_a)
    torch.testing.assert_close(
        correlation_blocks(maps.flatten(2), maps.flatten(2), unit_dim=1).within_a, blocks.within_a
    )
    assert PairStatistics(every=4).add(maps, maps).finalize().count == 6 * 4


def test_activation_statistics_run_the_layers():
    net, other = conv_net(0), conv_net(1)
    net.train()
    statistics = ActivationStatistics(net, "0", other, other[0])
    for x in images().split(70):
        statistics.update(x)
    blocks = statistics.finalize()
    torch.testing.assert_close(blocks.between, correlation_blocks(net[0](images()), other[0](images())).between)
    assert net.training
    torch.testing.assert_close(blocks.swapped().between, blocks.between.T)
    torch.testing.assert_close(blocks.swapped().joint()[:6, :6], blocks.within_b)


def test_permutation_of_the_living_units_is_recovered():
    a = mixed(units=12)
    a[:, [3, 7]] = 0.5
    permutation = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    blocks = correlation_blocks(a, 3 * a[:, permutation] + 1)
    assert blocks.dead == (2, 2)
    match = bipartite_match(blocks.between)
    assert len(match) == 10
    assert torch.equal(permutation[match.col], match.row)
    assert match.value.min() >= 1 - 1e-6
    assert match.shared == 0
    prediction = sparse_prediction(blocks, [1e-3, 1e-2])
    alive = blocks.alive_b
    assert (prediction.nonzeros[:, alive] == 1).all()
    assert prediction.loss[:, ~alive].isnan().all()
    assert (spectral_clusters(blocks, 3).labels_a[[3, 7]] == -1).all()


def test_rectangular_and_semi_matching():
    c = torch.tensor([[0.9, 0.8, 0.1], [0.85, 0.2, 0.1]])
    match, semi = bipartite_match(c), semi_match(c)
    assert match.col.tolist() == [1, 0]
    assert semi.col.tolist() == [0, 0]
    assert semi.shared == 2
    assert semi.mean > match.mean
    assert match.above(0.82) == 0.5
    assert len(bipartite_match(c.T)) == 2
    negative = torch.tensor([[-0.9, 0.1], [0.2, 0.3]])
    assert bipartite_match(negative, absolute=True).value.tolist() == pytest.approx([-0.9, 0.3])
    assert bipartite_match(negative).col.tolist() == [1, 0]
    assert match.to_frame().shape == (2, 3)
    assert match.sorted().value.tolist() == pytest.approx([0.85, 0.8])


def test_matching_within_a_network_leaves_the_diagonal_out():
    within = torch.eye(4) + 0.01
    for i, j, value in ((0, 2, 0.9), (1, 3, 0.8)):
        within[i, j] = within[j, i] = value
    for match in (semi_match(within, exclude_diagonal=True), bipartite_match(within, exclude_diagonal=True)):
        assert match.col.tolist() == [2, 3, 0, 1]
        assert match.cycles().tolist() == [0, 2, 1, 3]
    with pytest.raises(ValueError, match="square"):
        bipartite_match(torch.ones(2, 3), exclude_diagonal=True)


def test_an_invertible_map_is_predicted_without_loss():
    a = mixed(units=10)
    q = torch.randn(10, 10, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    prediction = sparse_prediction(correlation_blocks(a, a.double() @ q), [0.0])
    assert prediction.loss.max() < 1e-8


@pytest.mark.parametrize("alpha", [1e-3, 1e-2, 1e-1])
def test_lasso_meets_its_conditions(alpha):
    blocks = correlation_blocks(mixed(units=20, seed=1), mixed(units=15, seed=1)[:, :15].cumsum(1))
    w = lasso(blocks.within_a, blocks.between, alpha, torch.zeros(20, 15, dtype=torch.float64))
    assert violation(blocks.within_a, blocks.between, alpha, w) < 1e-5
    from sklearn.linear_model import lars_path_gram

    path = lars_path_gram(
        Xy=blocks.between[:, 3].numpy(), Gram=blocks.within_a.numpy(), n_samples=1, method="lasso", alpha_min=alpha
    )
    np.testing.assert_allclose(w[:, 3].numpy(), path[2][:, -1], atol=1e-4)


def test_penalty_beyond_every_correlation_predicts_the_mean():
    blocks = correlation_blocks(mixed(seed=1), mixed(seed=2))
    prediction = sparse_prediction(blocks, [1.0, 0.0])
    assert prediction.alphas.tolist() == [0, 1]
    assert (prediction.nonzeros[1] == 0).all()
    assert (prediction.loss[1] - 0.5).abs().max() < 0.05  # the variance of one half over that of the other
    everywhere = sparse_prediction(blocks, [1.0], validate=False)
    torch.testing.assert_close(everywhere.loss[0], torch.full((8,), 0.5, dtype=torch.float64))
    assert list(prediction.curve()) == ["alpha", "loss", "nonzeros"]
    assert prediction.fewest() == 0  # independent layers: nothing helps


def test_held_out_loss_is_that_of_the_rows():
    a, b = mixed(seed=1).double(), mixed(seed=1).double().cumsum(1)
    prediction = sparse_prediction(correlation_blocks(a, b), [1e-2])
    (fit_a, held_a), (fit_b, held_b) = (a[::2], a[1::2]), (b[::2], b[1::2])
    x = (held_a - fit_a.mean(0)) / fit_a.std(0)
    y = (held_b - fit_b.mean(0)) / fit_b.std(0)
    expected = 0.5 * (x @ prediction.weights[0] - y).square().mean(0)
    torch.testing.assert_close(prediction.loss[0], expected, rtol=1e-3, atol=0)


def test_laplacian_and_planted_clusters():
    g = torch.Generator().manual_seed(6)
    sources = torch.randn(3000, 3, generator=g)
    a = sources[:, [0, 0, 1, 1, 2]] + 0.3 * torch.randn(3000, 5, generator=g)
    b = sources[:, [2, 1, 0, 1]] + 0.3 * torch.randn(3000, 4, generator=g)
    blocks = correlation_blocks(a, b)
    affinity = blocks.joint().abs().fill_diagonal_(0)
    assert abs(float(torch.linalg.eigvalsh(normalized_laplacian(affinity))[0])) < 1e-8
    for hierarchical in (False, True):
        clusters = spectral_clusters(blocks, 3, hierarchical=hierarchical)
        truth = torch.tensor([0, 0, 1, 1, 2, 2, 1, 0, 1])
        same = truth[:, None] == truth
        assert torch.equal(clusters.labels[:, None] == clusters.labels, same)
        assert clusters.order.sort().values.tolist() == list(range(9))
        assert len(torch.unique_consecutive(clusters.labels[clusters.order])) == 3
        assert clusters.mixed == 1
        assert clusters.contrast() > 5
        assert clusters.contrast(seed=0) < 3
        assert (
            list(clusters.to_frame()["size_a"] + clusters.to_frame()["size_b"])
            == torch.bincount(clusters.labels).tolist()
        )
    again = spectral_clusters(blocks, 3)
    assert torch.equal(again.labels, spectral_clusters(blocks, 3).labels)
    with pytest.raises(ValueError, match="between 2 and 9"):
        spectral_clusters(blocks, 10)


def test_isolated_unit_has_a_laplacian():
    affinity = torch.zeros(3, 3, dtype=torch.float64)
    affinity[0, 1] = affinity[1, 0] = 0.5
    assert torch.equal(normalized_laplacian(affinity).isfinite().all(), torch.tensor(True))


def test_mutual_information():
    g = torch.Generator().manual_seed(7)
    a = torch.rand(20_000, generator=g)
    assert mutual_information(a, a, bias="none") == pytest.approx(np.log(10), abs=1e-3)
    assert abs(mutual_information(a, torch.rand(20_000, generator=g))) < 2e-3
    assert mutual_information(a, (a - 0.5).abs()) > 0.8  # no linear dependence
    zeros = torch.where(a < 0.5, 0.0, a)
    codes = mutual_information(zeros, zeros, bins=5, bias="none")
    assert codes == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(10), abs=1e-3)
    assert mutual_information(a, a, bias="none") - mutual_information(a, a) == pytest.approx(81 / 40_000)
    assert mutual_information(a, a, bias="none") - mutual_information(a, a, bias="official") == pytest.approx(
        100 / (40_000 * np.log(2))
    )
    layer = mixed(units=6)
    permutation = torch.tensor([3, 1, 0, 5, 4, 2])
    matrix = mi_matrix(layer, layer[:, permutation])
    assert torch.equal(permutation[bipartite_match(matrix).col], torch.arange(6))
    assert float(matrix[0, 2]) == pytest.approx(mutual_information(layer[:, 0], layer[:, 0]))


def test_shuffled_samples_leave_nothing():
    a, b = mixed(20_000, seed=1), mixed(20_000, seed=1)[:, [2, 0, 1]]
    shuffled = b[torch.randperm(len(b), generator=torch.Generator().manual_seed(0))]
    blocks = correlation_blocks(a, shuffled)
    assert bipartite_match(blocks.between).mean < 0.1
    assert abs(float(sparse_prediction(blocks, [3e-2]).loss.mean()) - 0.5) < 0.01


def test_report_of_two_networks():
    net, other = conv_net(0), conv_net(1)
    report = ConvergenceReport.from_modules(net, other, TensorDataset(images(), torch.zeros(200)), batch_size=64)
    frame = report.to_frame()
    assert list(frame["layer_a"]) == ["0", "1"]
    assert (frame["semi"] >= frame["bipartite"]).all()
    assert (frame["dense_loss"] <= frame["one_to_one_loss"] + 0.02).all()
    assert len(report.units()) == 6 + 8
    assert frame.to_json()
    loader = DataLoader(images(), 50)
    same = ConvergenceReport.from_modules(net, other, loader, layers=["0", "1"]).to_frame()
    np.testing.assert_allclose(same["bipartite"], frame["bipartite"])
    figure = report.plot()
    filters = plot_filter_pairs(net[0][0].weight, other[0][0].weight, report["0"].match)
    figure.canvas.draw()
    filters.canvas.draw()
    plt.close("all")
    assert pickle.loads(pickle.dumps(copy.deepcopy(report))).to_frame().equals(frame)


def test_report_across_architectures_and_dtypes():
    torch.manual_seed(0)
    a, b = MLP(10, 3, hidden=(12, 9)), MLP(10, 3, hidden=(20,)).double()
    x = torch.randn(300, 10)
    report = ConvergenceReport.from_modules(
        a, nn.Sequential(Cast(), b), x, layers=[("layer2", "1.layer1"), (a.layer1, b.layer1)]
    )
    assert [one.blocks.sizes for one in report.layers] == [(9, 20), (12, 20)]
    tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    report = ConvergenceReport.from_modules(tokens, tokens, torch.randn(30, 5, 8), layers=["norm2"])
    assert report.layers[0].match.value.min() > 1 - 1e-6
    assert report.layers[0].blocks.count == 150
    report.plot()
    plt.close("all")


class Cast(nn.Module):
    def forward(self, x):
        return x.double()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: correlation_blocks(torch.ones(4, 2), torch.ones(5, 2)), "4 examples.*5 examples"),
        (lambda: correlation_blocks(torch.randn(4, 2, 3, 3), torch.randn(4, 2, 2, 2)), "9 positions.*4 positions"),
        (lambda: correlation_blocks(torch.randn(40, 2), torch.ones(40, 2)), "second layer are constant"),
        (lambda: correlation_blocks(torch.full((4, 2), torch.nan), torch.randn(4, 2)), "first layer hold NaN"),
        (lambda: correlation_blocks(torch.randn(4), torch.randn(4)), "shape"),
        (lambda: correlation_blocks(torch.randn(4, 2), torch.randn(4, 2), unit_dim=0), "unit_dim"),
        (lambda: PairStatistics().finalize(), "at least one batch"),
        (lambda: bipartite_match(torch.full((2, 2), torch.nan)), "at least one unit"),
        (lambda: bipartite_match(torch.tensor([[1.0, torch.nan], [0.2, 0.3]])), "single similarities"),
        (lambda: sparse_prediction(correlation_blocks(mixed(), mixed()), [-1.0]), "penalties"),
        (lambda: mi_matrix(torch.ones(3, 2), torch.ones(4, 2)), "same M samples"),
        (lambda: mutual_information(torch.rand(9), torch.rand(9), bins=1), "2 bins"),
        (lambda: mutual_information(torch.rand(9), torch.rand(9), bias="x"), "bias"),  # pyright: ignore
        (lambda: ActivationStatistics(conv_net(), "9", conv_net(), "0"), "no layer '9'; its layers are 0, 0.0"),
        (lambda: ActivationStatistics(conv_net(), nn.ReLU(), conv_net(), "0"), "no layer this ReLU"),
        (lambda: ConvergenceReport.from_modules(conv_net(), conv_net(), images(), [("0", "1")]), "layers '0' and '1'"),
        (lambda: ConvergenceReport.from_modules(conv_net(), nn.Linear(1, 1), images()), "name the layers"),
        (lambda: ConvergenceReport.from_modules(conv_net(), conv_net(), images(0)), "at least one example"),
        (lambda: plot_filter_pairs(torch.ones(2, 2), torch.ones(2, 2), bipartite_match(torch.eye(2))), "filters"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
