"""Measuring a network without leaving a trace on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from torchfolio.models.stateful import reset_state, state_modules


@contextmanager
def untouched(model: nn.Module, *, training: bool | None = None) -> Iterator[None]:
    """Restore buffers (running statistics, counters), the mode of every submodule and the `requires_grad` of every
    parameter on leaving, also after an error. Modules with state (spiking neurons) start every call of the network afresh.

    Args:
        model: network.
        training: mode of the whole network inside; `None` leaves it as it is.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    if training is not None:
        model.train(training)
    hooks = [model.register_forward_pre_hook(_afresh)] if state_modules(model) else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
            reset_state(model)
        for module, mode in modes:
            module.training = mode
        for p, flag in flags:
            if p.requires_grad != flag:
                p.requires_grad_(flag)
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a module may have put another tensor in its place


def _afresh(module: nn.Module, inputs: object) -> None:
    reset_state(module)
