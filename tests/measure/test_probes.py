"""Probes on features whose classes are known, and retrieval against a loop."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from torchfolio.measure import knn_accuracy, linear_probe, retrieval


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    features, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    return features[:600], labels[:600], features[600:900], labels[600:900]


def test_linear_probe_equals_sklearn(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, y, test_x, test_y = digits
    mean, std = x.mean(0), x.std(0, correction=0)
    std[std == 0] = 1
    probe = LogisticRegression(max_iter=200).fit(((x - mean) / std).numpy(), y.numpy())
    expected = probe.score(((test_x - mean) / std).numpy(), test_y.numpy())
    assert linear_probe(x, y, test_x, test_y) == pytest.approx(expected, abs=0.01)
    assert linear_probe(x.view(-1, 1, 8, 8), y, test_x.view(-1, 1, 8, 8), test_y) > 0.85


def test_linear_probe_finds_only_what_is_linear() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2)
    line, xor = (x.sum(1) > 0).long(), (x[:, 0] * x[:, 1] > 0).long()
    assert linear_probe(x[:300], line[:300], x[300:], line[300:]) > 0.95
    assert linear_probe(x[:300], xor[:300], x[300:], xor[300:]) < 0.7


def test_knn_equals_sklearn_on_unit_vectors(digits: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, y, test_x, test_y = digits
    neighbours = KNeighborsClassifier(5).fit(F.normalize(x).numpy(), y.numpy())
    expected = neighbours.score(F.normalize(test_x).numpy(), test_y.numpy())
    assert knn_accuracy(x, y, test_x, test_y, k=5) == pytest.approx(expected, abs=0.01)
    assert knn_accuracy(x, y, 7 * test_x, test_y, k=20, temperature=0.1) > 0.85


def test_knn_weights_close_votes_more() -> None:
    train = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    y, test = torch.tensor([1, 0, 0]), torch.tensor([[1.0, 0.1]])
    assert knn_accuracy(train, y, test, torch.tensor([1]), k=3) == 0
    assert knn_accuracy(train, y, test, torch.tensor([1]), k=3, temperature=0.1) == 1
    assert knn_accuracy(train, y, test, torch.tensor([1]), k=3, temperature=1e-4) == 1  # no overflow


def test_probe_errors() -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    for probe in (linear_probe, knn_accuracy):
        with pytest.raises(ValueError, match=r"got \(6, 3\) and \(5,\)"):
            probe(x, y[:5], x, y)
        with pytest.raises(ValueError, match="test features of 3 numbers, got 2"):
            probe(x, y, x[:, :2], y)
        with pytest.raises(ValueError, match="not finite"):
            probe(x, y, x * torch.inf, y)
        with pytest.raises(ValueError, match="at least one example"):
            probe(x, y, x[:0], y[:0])
    with pytest.raises(ValueError, match="at least two classes, got only class 0"):
        linear_probe(x, y * 0, x, y)
    with pytest.raises(ValueError, match="k between 1 and 6, got 20"):
        knn_accuracy(x, y, x, y)


def by_loop(query: Tensor, query_y: Tensor, gallery: Tensor, gallery_y: Tensor, own: bool) -> list[float]:
    rows = []
    for i, q in enumerate(query):
        items = [j for j in range(len(gallery)) if not (own and j == i)]
        order = sorted(items, key=lambda j: -(q @ gallery[j]).item())
        hits = [int(gallery_y[j] == query_y[i]) for j in order]
        if any(hits):
            precision = [sum(hits[: r + 1]) / (r + 1) for r, hit in enumerate(hits) if hit]
            rows.append([hits[0], float(any(hits[:5])), sum(precision) / len(precision)])
    return torch.tensor(rows).mean(0).tolist()


@pytest.mark.parametrize("own", [False, True])
def test_retrieval_equals_a_loop(own: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(40, 6), torch.randint(9, (40,))
    gallery = x if own else torch.randn(40, 6)
    measured = retrieval(x, y, gallery, y, exclude_self=own)
    assert list(measured[:3]) == pytest.approx(by_loop(x, y, gallery, y, own), abs=1e-6)


def test_retrieval_of_known_rankings() -> None:
    gallery = torch.tensor([[3.0], [2.0], [1.0]])
    y = torch.tensor([0, 1, 0])
    measured = retrieval(torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([0, 1, 7]), gallery, y)
    # Label 0 stands at ranks 1 and 3, label 1 at rank 2; label 7 is not in the gallery.
    assert measured.queries == 2
    assert measured.top1 == 0.5
    assert measured.top5 == 1
    assert measured.mean_average_precision == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)


def test_retrieval_compares_the_coordinates_that_both_have() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.randint(4, (20,))
    assert retrieval(x, y, x[:, :3], y) == retrieval(x[:, :3], y, x[:, :3], y)


def test_retrieval_errors() -> None:
    x, y = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="queries to be the gallery, got 3 and 4"):
        retrieval(x[:3], y[:3], x, y, exclude_self=True)
    with pytest.raises(ValueError, match="got none"):
        retrieval(x, y + 5, x, y)
