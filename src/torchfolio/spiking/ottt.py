"""Online training through time: SLTT with traces of spikes as what the weights' gradients see.

Mingqing Xiao, Qingyan Meng, Zongpeng Zhang, Di He, Zhouchen Lin, "Online Training Through Time for Spiking Neural
Networks", NeurIPS 2022, https://arxiv.org/abs/2210.04195.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import between
from torchfolio.spiking.credit import credit_of, weight_layers
from torchfolio.spiking.encoders import Encode
from torchfolio.spiking.neurons import LIF, find_neurons
from torchfolio.spiking.sltt import SLTT, Loss

__all__ = ["OTTT"]


class OTTT(SLTT):
    """Gradients through layers at every step, with traces of the spikes before:

    $$a^l[t] = \\lambda a^l[t-1] + s^l[t], \\qquad \\nabla W^{l+1} = \\sum_t e^{l+1}[t]\\, a^l[t]^\\top,$$

    the errors $e$ as in `SLTT`. Layers that run before any neuron (the first one, on raw input) keep their input.

    Args:
        loss: loss, as in `SLTT`.
        timesteps: $T \\ge 1$.
        trace_decay: $\\lambda$ in [0, 1); the decay of the network's first `LIF` by default. 0 is `SLTT`.
        k: number of steps with a gradient, as in `SLTT`.
        rescale: whether the gradient is scaled up, as in `SLTT`.
        encode: encoding of inputs as sequences, as in `SLTT`.
        generator: source of random numbers, as in `SLTT`.

    Reference:
        Xiao et al., NeurIPS 2022, equations 5 and 6 (OTTT_A, gradients added up over the sequence).
    """

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        timesteps: int,
        trace_decay: float | None = None,
        k: int | None = None,
        rescale: bool = False,
        encode: Encode = "repeat",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(loss, timesteps=timesteps, k=k, rescale=rescale, encode=encode, generator=generator)
        if trace_decay is not None:
            between("trace_decay", trace_decay, 0, 1, inclusive=(True, False))
        self.trace_decay = trace_decay

    def learn(
        self, model: nn.Module, x_seq: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, int]:
        credits, neurons = [credit_of(layer) for layer in weight_layers(model).values()], find_neurons(model)
        decay = self.trace_decay
        if decay is None:
            decay = next((n.decay for n in neurons if isinstance(n, LIF)), 0.5)
        fired: set[bool] = set()  # holds something once a neuron has run in this step
        handles = [model.register_forward_pre_hook(lambda *_: fired.clear())]
        handles += [neuron.register_forward_hook(lambda *_: fired.add(True)) for neuron in neurons]
        before = [credit.activity for credit in credits]
        for credit in credits:
            credit.activity = _trace(decay, fired)
        try:
            return super().learn(model, x_seq, y, backward)
        finally:
            for credit, activity in zip(credits, before, strict=True):
                credit.activity = activity
                credit.release()
            for handle in handles:
                handle.remove()


def _trace(decay: float, fired: set[bool]) -> Callable[[Tensor], Tensor]:
    """From spikes to their trace, from call to call."""
    last: list[Any] = [None]

    def trace(x: Tensor) -> Tensor:
        if not fired:
            return x
        last[0] = x.detach().clone() if last[0] is None else torch.add(x.detach(), last[0], alpha=decay)
        return last[0]

    return trace
