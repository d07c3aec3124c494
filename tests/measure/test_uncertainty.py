"""Errors and intervals against formulas and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from torchfolio.measure import bootstrap_interval, confidence_interval, standard_error


def test_standard_error_by_formula() -> None:
    assert standard_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((5 / 3 / 4) ** 0.5)
    assert standard_error(np.array([2.0, 2.0])) == 0


def test_student_interval_equals_scipy() -> None:
    values = [0.61, 0.58, 0.64]
    expected = stats.t.interval(0.9, 2, np.mean(values), stats.sem(values))
    assert confidence_interval(values, level=0.9) == pytest.approx(expected)


def test_student_interval_covers() -> None:
    rng = np.random.default_rng(0)
    intervals = [confidence_interval(row) for row in rng.normal(size=(1000, 4))]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_bootstrap_of_a_mean_is_close_to_normal() -> None:
    sample = np.random.default_rng(0).normal(3, 1, 200)
    low, high = bootstrap_interval(sample, resamples=2000)
    assert (low, high) == pytest.approx(confidence_interval(sample), abs=0.02)
    assert bootstrap_interval(sample, resamples=2000) == (low, high)


def test_bootstrap_of_paired_samples() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=100)
    b = a + 0.5 * rng.normal(size=100)
    low, high = bootstrap_interval(a, b, statistic=lambda x, y: np.corrcoef(x, y)[0, 1], resamples=1000)
    assert low < np.corrcoef(a, b)[0, 1] < high
    assert low > 0.7
    with pytest.raises(ValueError, match=r"one length, got \[100, 99\]"):
        bootstrap_interval(a, b[:99])


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least two values"):
        standard_error([1.0])
    with pytest.raises(ValueError, match="not all finite"):
        standard_error([1.0, float("nan")])
    with pytest.raises(ValueError, match=r"level in \(0, 1\), got 95"):
        confidence_interval([1.0, 2.0], level=95)


def test_tensors_of_any_type():
    values = torch.arange(20) / 8
    expected = bootstrap_interval(values.numpy(), resamples=200)
    assert bootstrap_interval(values.bfloat16(), resamples=200) == expected
    assert bootstrap_interval(values.requires_grad_(), resamples=200) == expected
