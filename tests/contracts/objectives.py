"""What every added objective keeps to: `check_objective(make, model, batch)` in one line of its test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.contracts.rules import check_rule
from torchfolio.engine import Backprop, Objective, seeded
from torchfolio.local import AugLocal

HOSTS: tuple[Callable[[], Any], ...] = (Backprop, partial(AugLocal, 1))


def check_objective(
    make_objective: Callable[[nn.Module], Objective],
    model: nn.Module,
    batch: Sequence[Tensor],
    *,
    random: bool = False,
    batch_size: int = 5,
) -> None:
    """The contract of `Objective`: on two rules it is a learning rule, and it adds its own gradient.

    Args:
        make_objective: makes a fresh objective for the network that it is given.
        model: a small network in more than one block; copied.
        batch: (x, y) with labels, of 12 examples or more.
        random: whether the term draws at random, so that two of its values differ.
        batch_size: examples of a step.
    """
    for host in HOSTS:
        check_rule(lambda net, host=host: make_objective(net).on(host()), model, batch, batch_size=batch_size)
    _adds(make_objective, model, batch, random)


def _adds(make_objective: Any, model: nn.Module, batch: Sequence[Tensor], random: bool) -> None:
    """With backprop, the gradient is that of the loss plus that of the term."""
    net = copy.deepcopy(model).train()
    gradients = []
    for parts in ((True, True), (True, False), (False, True)):
        copied = copy.deepcopy(net)
        with seeded(0):
            objective = make_objective(copied)
            rule = objective.on(Backprop()) if parts[1] else Backprop()
            rule.prepare(copied, batch)
        with seeded(1):
            if all(parts) or parts[0]:
                scalars = rule.step(batch, Tensor.backward)
            else:
                with objective.watching(copied):
                    copied(*batch[:-1])
                    term = objective.term(copied, batch)
                assert term.dim() == 0, f"the term has shape {tuple(term.shape)}"
                assert term.isfinite(), f"the term is {term.item()}"
                term.backward()
        assert "loss" in scalars
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in copied.parameters()])
        rule.release()
    both, loss, own = gradients
    assert any(g.any() for g in own), "the term has no gradient in the network"
    if not random:
        for a, b, c in zip(both, loss, own, strict=True):
            torch.testing.assert_close(a, b + c, rtol=1e-4, atol=1e-6)
