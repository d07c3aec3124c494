"""What every detector of backdoors keeps to: one call each for those of inputs and those of networks."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchfolio.backdoor.detectors import InputDetector, ModelDetector, ModelVerdict


class Left:
    """What a network, its hooks and the global generators were like."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self._look()

    def _look(self) -> tuple[object, ...]:
        net = self.model
        return (
            {k: v.clone() for k, v in net.state_dict().items()},
            [m.training for m in net.modules()],
            [p.requires_grad for p in net.parameters()],
            [p.grad is None for p in net.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()],
            torch.get_rng_state(),
            np.random.get_state(legacy=False)["state"]["key"].tolist(),  # pyright: ignore[reportCallIssue, reportArgumentType]
        )

    def check(self) -> None:
        now = self._look()
        for was, found in zip(self.before, now, strict=True):
            if isinstance(was, dict):
                assert isinstance(found, dict)
                assert all(torch.equal(was[k], found[k]) for k in was)
            elif isinstance(was, Tensor):
                assert torch.equal(was, found)  # pyright: ignore[reportArgumentType]
            else:
                assert was == found


def _odd(model: nn.Module) -> nn.Module:
    """The network in training mode, its first parameter frozen, with a hook: nothing of it may change."""
    net = copy.deepcopy(model).train()
    next(net.parameters()).requires_grad_(False)
    net.register_forward_hook(lambda *_: None)
    return net


def broken(model: nn.Module) -> nn.Module:
    """The network with NaN in its first parameter."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = torch.nan
    return net


def check_input_detector(
    make: Callable[[], InputDetector], model: nn.Module, clean: tuple[Tensor, Tensor], folder: Path
) -> InputDetector:
    """The contract of `InputDetector`, on a network and at least 50 clean examples."""
    net = _odd(model)
    left = Left(net)
    with pytest.raises(RuntimeError, match="fit"):
        make().score(clean[0])
    made = make().fit(net, clean)
    left.check()
    x = clean[0][:20]
    scores = made.score(x)
    assert scores.shape == (20,)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(torch.cat([made.score(one) for one in x.split(1)]), scores, rtol=1e-4, atol=1e-5)
    assert made.score(x[:0]).shape == (0,)
    assert float((made.calibration_ > made.threshold_).double().mean()) <= made.fpr
    assert made.threshold(0.5) <= made.threshold_
    labels, rejected = made.filtered(x)
    assert torch.equal(labels, copy.deepcopy(model).eval()(x).argmax(1))
    assert torch.equal(rejected, made.predict(x))
    assert torch.equal(rejected, made.judge(x).rejected)
    if x.is_floating_point():
        bad = x.clone()
        bad[3].view(-1)[0], bad[7].view(-1)[-1] = torch.nan, torch.inf
        assert made.predict(bad)[[3, 7]].all()
        others = [i for i in range(20) if i not in (3, 7)]
        torch.testing.assert_close(made.score(bad)[others], scores[others], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="NaN"):
            make().fit(net, (clean[0] * torch.nan, clean[1]))
    with pytest.raises(ValueError, match="the network holds NaN"):
        make().fit(broken(net), clean)
    with pytest.raises(ValueError, match="expected inputs"):
        made.score(x[:, :1] if x.dim() > 1 and x.shape[1] > 1 else x[..., :1])
    again = make().fit(net, clean)
    assert torch.equal(again.calibration_, made.calibration_)
    left.check()
    made.save(folder)
    read = type(made).load(folder, net)
    assert torch.equal(read.score(x), scores)
    assert read.threshold_ == made.threshold_
    assert read.input_shape_ == made.input_shape_
    left.check()
    other = copy.deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="another network"):
        type(made).load(folder, other)
    weights = folder / "detector.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01\x02")
    with pytest.raises(ValueError, match="changed"):
        type(made).load(folder, net)
    assert json.loads((folder / "detector.json").read_text())["detector"] == type(made).__name__
    return made


def check_model_detector(
    make: Callable[[], ModelDetector], model: nn.Module, clean: tuple[Tensor, Tensor] | Tensor | None
) -> ModelVerdict:
    """The contract of `ModelDetector`."""
    net = _odd(model)
    left = Left(net)
    verdict = make().scan(net, clean, seed=1)
    left.check()
    assert make().scan(net, clean, seed=1).score == verdict.score
    assert ("not suspicious" in verdict.sentences()[0]) == (not verdict.is_backdoored)
    if make().needs_clean:
        with pytest.raises(ValueError, match="clean examples"):
            make().scan(net)
    if isinstance(clean, tuple) and clean[0].is_floating_point():
        with pytest.raises(ValueError, match="NaN"):
            make().scan(net, (clean[0] * torch.nan, clean[1]))
    with pytest.raises(ValueError, match="the network holds NaN"):
        make().scan(broken(net), clean)
    left.check()
    return verdict
