"""What a rule's gradients hold of those through time: their direction by leak, and a loss that comes after its cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.spiking.bptt import SequenceRule
from torchfolio.spiking.sequence import run_sequence
from torchfolio.spiking.sltt import gradient_agreement
from torchfolio.spiking.state import reset_state

__all__ = ["cosines_by_tau", "gradients_of_a_late_loss"]


def cosines_by_tau(
    make: Callable[[float | None], nn.Module], taus: Sequence[float], batch: tuple[Tensor, Tensor], timesteps: int
) -> dict[str, object]:
    """Cosine of SLTT's and BPTT's gradients at initialisation, for every time constant on the same weights.

    Args:
        make: makes a network with a time constant; with that of the experiment for `None`.
        taus: time constants.
        batch: inputs and labels.
        timesteps: number of steps.
    """
    weights = make(None).state_dict()
    cosines = []
    for tau in taus:
        net = make(tau)
        net.load_state_dict(weights)
        cosines.append(gradient_agreement(net, *batch, timesteps=timesteps)["cosine"])
    return {"cosine": cosines}


def gradients_of_a_late_loss(
    net: nn.Module, batch: tuple[Tensor, Tensor], rules: Mapping[str, SequenceRule], timesteps: int
) -> dict[str, float]:
    """Largest gradient of the first layer's weights when the input comes at the first step, the loss at the last.

    Args:
        net: spiking network.
        batch: inputs and labels.
        rules: rules by name; each prepares the network for itself.
        timesteps: number of steps.
    """
    x, y = batch
    cue = torch.zeros(timesteps, *x.shape, device=x.device)
    cue[0] = x
    first, found = next(net.parameters()), {}
    for name, rule in rules.items():
        rule.prepare(net, (x, y))
        reset_state(net)
        net.zero_grad(set_to_none=True)
        F.cross_entropy(run_sequence(net, cue)[-1], y).backward()
        found[name] = 0.0 if first.grad is None else float(first.grad.abs().max())
        rule.release()
    return found
