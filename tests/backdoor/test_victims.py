"""Victims are reproducible, and what is stored of one brings it back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchfolio.backdoor import AllToOne, PatchTrigger
from torchfolio.backdoor.victims import Victim, default_net, victim
from torchfolio.data import load
from torchfolio.runs.store import write_result


def test_victims(tmp_path):
    data = load("digits", normalize=False, val=0)
    trigger, labels = PatchTrigger.checkerboard(data.shape, size=2, margin=0), AllToOne(0, 10)
    before = torch.get_rng_state()
    bad = victim(data, trigger, labels, rate=0.1, epochs=6, lr=0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert bad.metrics.acc > 0.85
    assert bad.metrics.asr > 0.9
    clean = victim(data, trigger, labels, rate=0, epochs=6, lr=0.1, seed=0)
    assert clean.metrics.asr < 0.1
    x = data.test.tensors[0]
    once, again = (victim(data, trigger, labels, rate=0.1, epochs=1, seed=0).model(x) for _ in range(2))
    assert torch.equal(again, once)
    restored = Victim.restored(default_net(data), write_result(tmp_path / "arm.json", bad.stored()))
    assert torch.equal(restored.model(x), bad.model(x))
    assert restored.metrics == bad.metrics
    assert not restored.model.training
    own = victim(
        data, trigger, labels, rate=0.1, epochs=1, seed=0, net=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    )
    assert isinstance(own.model[1], nn.Linear)  # pyright: ignore[reportIndexIssue]


def test_normalised_images_are_refused():
    with pytest.raises(ValueError, match="normalize=False"):
        victim(load("digits"), PatchTrigger.checkerboard((1, 8, 8), 2), AllToOne(0, 10), rate=0.1, epochs=1, seed=0)
