"""Scores against scikit-learn, torchmetrics and constructed cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from torchfolio.measure import accuracy, auroc, calibration_error, roc_curve, threshold_at_fpr, tpr_at_fpr


def test_accuracy_by_rank() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [1.0, 3.0, 2.0]])
    y = torch.zeros(4, dtype=torch.long)
    assert accuracy(logits, y) == 0.25
    assert accuracy(logits, y, top=2) == 0.5
    assert accuracy(logits, y, top=3) == 1


def test_calibration_of_a_constructed_case() -> None:
    # Ten examples at confidence 0.8 of which 6 are right, ten at 0.6 of which 7 are: (|.6-.8| + |.7-.6|) / 2.
    confidence = torch.tensor([0.8] * 10 + [0.6] * 10, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    y = torch.tensor([0] * 6 + [1] * 4 + [0] * 7 + [1] * 3)
    assert calibration_error(probabilities, y, bins=10) == pytest.approx(0.15)
    assert calibration_error(probabilities, y, bins=2, adaptive=True) == pytest.approx(0.15)
    assert calibration_error(probabilities, y, bins=1) == pytest.approx(0.05)
    assert calibration_error(probabilities, y, bins=1, adaptive=True) == pytest.approx(0.05)


def test_perfectly_calibrated() -> None:
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    assert calibration_error(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx(0)


def test_calibration_equals_torchmetrics() -> None:
    torch.manual_seed(0)
    probabilities, y = torch.randn(300, 4).mul(2).softmax(1), torch.randint(4, (300,))
    expected = multiclass_calibration_error(probabilities, y, num_classes=4, n_bins=15)
    assert calibration_error(probabilities, y) == pytest.approx(expected.item(), abs=1e-6)


def test_adaptive_bins_have_equal_counts() -> None:
    confidence = torch.linspace(0.5, 1, 100, dtype=torch.float64)
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    correct = (torch.arange(100) % 3 > 0).long()
    groups = np.array_split(np.arange(100), 4)
    gaps = [abs(correct[g].double().mean() - confidence[g].mean()) * 25 for g in groups]
    assert calibration_error(probabilities, 1 - correct, bins=4, adaptive=True) == pytest.approx(float(sum(gaps)) / 100)
    assert calibration_error(probabilities[:2], correct[:2], bins=15, adaptive=True) > 0  # empty bins


@pytest.mark.parametrize("score", [accuracy, calibration_error])
def test_label_errors(score) -> None:
    good = torch.full((3, 2), 0.5)
    with pytest.raises(ValueError, match=r"outputs \[N, C\] and labels \[N\], got \(3, 2\) and \(2,\)"):
        score(good, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="at least one example"):
        score(good[:0], torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="NaN"):
        score(good * torch.nan, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels from 0 to 1, got 0 to 2"):
        score(good, torch.tensor([0, 1, 2]))


def test_other_errors() -> None:
    logits, y = torch.randn(3, 2), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match="apply softmax"):
        calibration_error(logits, y)
    with pytest.raises(ValueError, match="at least one bin"):
        calibration_error(logits.softmax(1), y, bins=0)
    with pytest.raises(ValueError, match="top between 1 and 2, got 3"):
        accuracy(logits, y, top=3)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60))
def test_auroc_equals_sklearn_with_ties(rows: list[tuple[int, bool]]) -> None:
    scores, positive = torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows])
    if positive.all() or not positive.any():
        with pytest.raises(ValueError, match="expected positives and negatives"):
            auroc(scores, positive)
        return
    expected = float(metrics.roc_auc_score(positive.numpy(), scores.numpy()))
    assert abs(auroc(scores, positive) - expected) < 1e-12
    assert abs(auroc(scores.float(), positive.long()) - expected) < 1e-12


def test_auroc_of_known_cases() -> None:
    scores, positive = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 1, 1])
    assert auroc(scores, positive) == 1
    assert auroc(-scores, positive) == 0
    assert auroc(torch.zeros(4), positive) == 0.5
    assert auroc(torch.tensor([-torch.inf, 0.0, 0.0, torch.inf]), positive) == 0.875


def test_roc_curve_equals_sklearn() -> None:
    torch.manual_seed(0)
    scores, positive = torch.randint(8, (200,)).double(), torch.rand(200) < 0.3
    fpr, tpr, thresholds = roc_curve(scores, positive)
    expected = metrics.roc_curve(positive.numpy(), scores.numpy(), drop_intermediate=False)
    np.testing.assert_allclose(fpr, expected[0])
    np.testing.assert_allclose(tpr, expected[1])
    np.testing.assert_allclose(thresholds, expected[2])
    assert torch.trapezoid(tpr, fpr).item() == pytest.approx(auroc(scores, positive), abs=1e-12)


def test_threshold_is_the_smallest_that_keeps_the_rate() -> None:
    negatives = torch.arange(10.0)
    assert threshold_at_fpr(negatives, 0.2) == 7  # 8 and 9 lie above
    assert threshold_at_fpr(negatives, 0.29) == 7
    assert threshold_at_fpr(negatives, 0) == 9
    assert threshold_at_fpr(negatives, 0.95) == 0
    assert threshold_at_fpr(negatives, 1) == -torch.inf


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0, 1))
def test_threshold_never_exceeds_its_rate(scores: list[int], fpr: float) -> None:
    negatives = torch.tensor(scores, dtype=torch.float64)
    threshold = threshold_at_fpr(negatives, fpr)
    assert (negatives > threshold).double().mean() <= fpr
    below = negatives[negatives < threshold]
    if len(below):
        assert (negatives > below.max()).double().mean() > fpr


def test_tpr_at_fpr() -> None:
    scores, positive = torch.arange(20.0), torch.arange(20) >= 8
    assert tpr_at_fpr(scores, positive, 0.25) == 1
    positive = torch.arange(20) % 2 == 1
    assert tpr_at_fpr(scores, positive, 0.1) == pytest.approx(0.2)  # threshold 16: 17 and 19 of ten
    assert tpr_at_fpr(torch.zeros(20), positive, 0.1) == 0


def test_ranking_errors() -> None:
    scores, positive = torch.randn(3), torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match=r"a label for every score, got shapes \(2,\) and \(3,\)"):
        auroc(scores, positive[:2])
    with pytest.raises(ValueError, match="NaN"):
        auroc(scores * torch.nan, positive)
    with pytest.raises(ValueError, match="labels 0 and 1"):
        auroc(scores, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="positives and negatives, got 3 and 0"):
        auroc(scores, torch.ones(3))
    with pytest.raises(ValueError, match="at least one"):
        auroc(Tensor([]), Tensor([]))
    with pytest.raises(ValueError, match="rate between 0 and 1, got 2"):
        threshold_at_fpr(scores, 2)
