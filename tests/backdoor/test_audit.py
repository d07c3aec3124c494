"""What is said of false positives is exact, and a verdict on a network keeps its rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from torchfolio.backdoor.audit import chance, false_positives, p_values
from torchfolio.backdoor.concentration import ExpertConcentration, concentration, judge
from torchfolio.backdoor.detectors import ModelDetector


def test_the_share_of_false_positives_is_beta():
    found = false_positives(torch.arange(10.0), 8.0)
    assert (found.n, found.above) == (10, 1)
    assert found.expected == pytest.approx(2 / 11)
    # Above the largest of n scores: Beta(1, n), whose quantiles are 1 - (1 - q)^(1/n).
    top = false_positives(torch.arange(10.0), 9.0)
    assert top.low == pytest.approx(1 - 0.975**0.1)
    assert top.high == pytest.approx(1 - 0.025**0.1)
    assert false_positives(torch.ones(4), -math.inf).expected == 1.0
    with pytest.raises(ValueError, match="NaN"):
        false_positives(torch.tensor([math.nan]), 0.0)
    with pytest.raises(ValueError, match="level"):
        false_positives(torch.ones(4), 0.0, level=1.0)


def test_the_interval_covers_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        scores = torch.rand(60, generator=generator, dtype=torch.float64)
        threshold = float(scores.sort().values[-4])
        found = false_positives(scores, threshold)
        inside += found.low <= 1 - threshold <= found.high
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


def test_p_values_and_chance():
    calibration = torch.tensor([1.0, 2.0, 3.0, 3.0])
    p = p_values(calibration, torch.tensor([4.0, 3.0, 1.5, 0.0]))
    torch.testing.assert_close(p, torch.tensor([1, 3, 4, 5], dtype=torch.float64) / 5)
    # A single input lies above the largest of four scores once in five times.
    assert chance(calibration, 3.0, 1, 1) == pytest.approx(1 / 5)
    assert chance(calibration, 3.0, 5, 0) == 1.0
    with pytest.raises(ValueError, match="rejected"):
        chance(calibration, 3.0, 1, 2)


def test_a_network_is_judged_by_its_rank():
    def shares(top):
        return torch.tensor([top, 1 - top])

    references = [shares(0.5 + k / 100) for k in range(19)]
    assert judge(shares(0.69), references, 0.05).is_backdoored
    assert not judge(shares(0.68), references, 0.05).is_backdoored  # as high as the highest
    assert not judge(shares(0.99), references[:18], 0.05).is_backdoored
    assert judge(shares(0.69), references, 0.05).pairs == ((1, 0),)
    assert judge(shares(0.69), references, 0.05).evidence["p_value"] == pytest.approx(1 / 20)
    assert ExpertConcentration([], 0.05).needed == 19
    assert ExpertConcentration([], 0.1).needed == 9


def test_clean_networks_are_seldom_called_suspicious():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(500, 20, 2, generator=generator)
    called = [judge(d[0], list(d[1:]), 0.05).is_backdoored for d in draws]
    assert sum(called) / 500 == pytest.approx(0.05, abs=0.03)


def test_networks_on_tables_are_scanned():
    torch.manual_seed(0)
    x = torch.randn(200, 4)
    y = (x[:, 0] > 0).long()
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[-4.0, 0, 0, 0], [4.0, 0, 0, 0]]))
    scan = ExpertConcentration([net], 0.5, unlearn_lr=0.3, unlearn_batch=20, unlearn_epochs=8)
    assert isinstance(scan, ModelDetector)
    before = net.weight.clone()
    verdict = scan.scan(net, (x, y), seed=1)
    assert not verdict.is_backdoored
    assert verdict.score == verdict.threshold
    assert torch.equal(net.weight, before)
    assert float(concentration(net, x).sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="clean examples"):
        scan.scan(net)
    with pytest.raises(ValueError, match="alpha"):
        ExpertConcentration([], 1.0)
