"""What every learning rule keeps to: `check_rule(make_rule, model, batch)` in one line of its test."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.engine import LearningRule, evaluate, fit
from torchfolio.engine.modes import random_state


def check_rule(
    make_rule: Callable[..., LearningRule],
    model: nn.Module,
    batch: Sequence[Tensor],
    *,
    untrained: Sequence[str] = (),
    regression: nn.Module | None = None,
    batch_size: int = 5,
) -> None:
    """The contract of `LearningRule`.

    Args:
        make_rule: makes a fresh rule; where it takes an argument, that is the network it is for.
        model: a small network; copied.
        batch: (x, y) with labels, of 12 examples or more that the network can tell apart a little.
        untrained: names of parameters that the rule leaves alone by nature.
        regression: a network of one output for the same inputs; without it the network itself regresses to as many
            outputs as it has.
        batch_size: examples of a step; the last of 12 in such batches should be partial.
    """
    x, y = batch[0][:12], batch[-1][:12]
    _prepares(make_rule, model, (x, y), untrained)
    _trains(make_rule, model, (x, y), batch_size)
    _resumes(make_rule, model, (x, y), batch_size)
    _autocast(make_rule, model, (x, y), batch_size)
    _regresses(make_rule, regression or model, x, batch_size)


def _rule(make_rule: Callable[..., LearningRule], net: nn.Module) -> LearningRule:
    needed = [p for p in inspect.signature(make_rule).parameters.values() if p.default is p.empty]
    return make_rule(net) if needed else make_rule()


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def _fit(make_rule: Callable[..., LearningRule], net: nn.Module, data: Any, **arguments: Any) -> LearningRule:
    rule = _rule(make_rule, net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is plain backprop")
        settings = {"optimizer": _sgd, "device": "cpu", "progress": False, **arguments}
        fit(net, data, rule=rule, **settings)
    return rule


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _prepares(make_rule: Any, model: nn.Module, batch: tuple[Tensor, Tensor], untrained: Sequence[str]) -> None:
    """`prepare` leaves modes, weights and statistics; `step` gives every parameter a gradient and leaves the modes."""
    net = copy.deepcopy(model).train()
    modes = {name: m.training for name, m in net.named_modules()}
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    rule = _rule(make_rule, net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is plain backprop")
        module = rule.prepare(net, batch)
    assert {name: m.training for name, m in net.named_modules()} == modes, "prepare changes modes"
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items()), "prepare changes the network"
    trained = [id(p) for p in module.parameters() if p.requires_grad]
    own = {name: p for name, p in net.named_parameters() if p.requires_grad}
    missing = [name for name, p in own.items() if trained.count(id(p)) != 1 and name not in untrained]
    assert not missing, f"not among the trained parameters once: {missing}"
    scalars = rule.step(batch, Tensor.backward)
    assert "loss" in scalars
    for name, value in scalars.items():
        assert not (isinstance(value, Tensor) and value.requires_grad), f"{name} is not detached"
        assert torch.isfinite(torch.as_tensor(float(value))), f"{name} is {value}"
    without = [name for name, p in own.items() if p.grad is None and name not in untrained]
    assert not without, f"without a gradient after a step: {without}"
    assert {name: m.training for name, m in net.named_modules()} == modes, "step changes modes"
    rule.release()


def _trains(make_rule: Any, model: nn.Module, batch: tuple[Tensor, Tensor], size: int) -> None:
    """`fit` moves the weights, takes partial last batches, leaves generators; scores do not depend on the batch."""
    net = copy.deepcopy(model)
    before = random_state()
    rule = _fit(make_rule, net, batch, batch_size=size, val=(batch[0][:7], batch[1][:7]), epochs=2)
    assert _same(random_state(), before), "fit moves the global generators"
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), model.parameters(), strict=True)), (
        "nothing moves"
    )
    scores = [evaluate(net, batch, rule=rule, batch_size=rows)["loss"] for rows in (12, 5)]
    assert abs(scores[0] - scores[1]) <= 1e-4 * max(1, abs(scores[0])), f"the loss depends on the batch size: {scores}"


def _resumes(make_rule: Any, model: nn.Module, batch: tuple[Tensor, Tensor], size: int) -> None:
    """Two epochs, then two more by fresh objects, end where four end, to the bit."""
    whole = copy.deepcopy(model)
    _fit(make_rule, whole, batch, batch_size=size, epochs=4)
    with tempfile.TemporaryDirectory() as folder:
        for epochs in (2, 4):
            net = copy.deepcopy(model)
            _fit(make_rule, net, batch, batch_size=size, epochs=epochs, checkpoint=folder)
    odd = [name for name, value in net.state_dict().items() if not torch.equal(value, whole.state_dict()[name])]
    assert not odd, f"other bits after resuming: {odd}"


def _autocast(make_rule: Any, model: nn.Module, batch: tuple[Tensor, Tensor], size: int) -> None:
    net = copy.deepcopy(model)
    _fit(make_rule, net, batch, batch_size=size, epochs=1, precision="bf16-mixed")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in net.parameters() if p.is_floating_point())


def _regresses(make_rule: Any, model: nn.Module, x: Tensor, size: int) -> None:
    """Float targets are learnt or refused in a sentence; nothing silent."""
    net = copy.deepcopy(model)
    with torch.no_grad():
        width = _rule(make_rule, net).predictor(net)(x).shape[1:]
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(len(x), *width, generator=generator, dtype=x.dtype if x.is_floating_point() else None)
    try:
        _fit(make_rule, net, (x, y), batch_size=size, epochs=2)
    except (ValueError, TypeError):
        return
    moved = [not torch.equal(a, b) for a, b in zip(net.parameters(), model.parameters(), strict=True)]
    assert any(moved), "float targets train nothing, and nothing is said"
