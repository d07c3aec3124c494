"""Differentiation on spike representation: backward through firing rates, not through time.

Qingyan Meng, Mingqing Xiao, Shen Yan, Yisen Wang, Zhouchen Lin, Zhi-Quan Luo, "Training High-Performance Low-Latency
Spiking Neural Networks by Differentiation on Spike Representation", CVPR 2022, https://arxiv.org/abs/2205.00459.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.spiking.bptt import SequenceRule
from torchfolio.spiking.encoders import Encode, encode_input
from torchfolio.spiking.neurons import LIF, find_neurons
from torchfolio.spiking.state import reset_state, state_modules

__all__ = ["DSR", "RateUnrolled", "weighted_rate"]


def weighted_rate(x_seq: Tensor, decay: float) -> Tensor:
    """$r(x) = \\sum_t \\lambda^{T-t} x[t] / \\sum_t \\lambda^{T-t}$ of a sequence `[T, ...]`: recent steps count more."""
    return torch.tensordot(_weights(x_seq, decay), x_seq, 1)


def _weights(x_seq: Tensor, decay: float) -> Tensor:
    weights = decay ** torch.arange(len(x_seq) - 1, -1, -1, device=x_seq.device, dtype=x_seq.dtype)
    return weights / weights.sum()


class DSR(SequenceRule):
    """Runs the network layer by layer over the whole sequence and differentiates between weighted firing rates.

    A soft-reset neuron that leaks by $\\lambda$ turns an input current of weighted rate $r(I)$ into spikes of rate
    about $\\mathrm{clip}(r(I) / V_{th}, 0, 1)$, whose derivative stands for the neuron's:

    $$\\frac{\\partial L}{\\partial I[t]} = \\frac{\\lambda^{T-t}}{\\sum_t \\lambda^{T-t}}\\, \\frac{1}{V_{th}}\\,
      1[0 < r(I) < V_{th}] \\sum_t \\frac{\\partial L}{\\partial s[t]},$$

    so that weights get $\\partial L / \\partial r(I)\\; r(s)^\\top$, the gradient of the network of rates at the rates
    that the spikes have. The loss is one of the weighted rate of the outputs.

    Args:
        loss: criterion of the output and the target; `None` takes `SLTTLoss()`.
        timesteps: $T \\ge 1$; rates are multiples of about 1/T: take 10 or more, and neurons that leak slowly.
        encode: encoding of inputs as sequences, as in `SLTT`.
        generator: source of random numbers, as in `SLTT`.

    Raises:
        ValueError: in `prepare`, if neurons are no soft-reset `LIF`, or stand in another module than an
            `nn.Sequential`, which cannot be run layer by layer; otherwise as `SequenceRule`.

    Note:
        Thresholds are not trained, and neurons fire at the threshold that they subtract; the paper's code trains it and
        fires at a part of it.

    Reference:
        Meng et al., CVPR 2022, equations 4, 8 and 9.
    """

    detach = True

    def prepare(self, model: nn.Module, example: Any) -> nn.Module:
        """Check the network as well."""
        _decay(model)
        _check_layers(model)
        return super().prepare(model, example)

    def learn(
        self, model: nn.Module, x_seq: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, int]:
        output = weighted_rate(_by_layers(model, x_seq), _decay(model))
        loss = self.step_loss(output, y)
        backward(loss)
        return loss.detach(), output.detach(), 1

    def predictor(self, model: nn.Module) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The network over time: the weighted rate of its outputs."""
        return RateUnrolled(model, self.timesteps, self.encode)

    def presynaptic(self, x: Tensor) -> Tensor:
        """The rate `[B, ...]` of a layer's input `[T B, ...]`, which is what its weights' gradients see."""
        assert self.model is not None
        return weighted_rate(x.unflatten(0, (self.timesteps, -1)), _decay(self.model))


class RateUnrolled(nn.Module):
    """A spiking network as an ordinary one: `[B, ...]` in, the weighted rate of its outputs out.

    Args:
        model: soft-reset `LIF` in sequential modules.
        timesteps: $T \\ge 1$.
        encode: encoding of inputs as sequences, as in `SLTT`.
    """

    def __init__(self, model: nn.Module, timesteps: int, encode: Encode = "repeat") -> None:
        super().__init__()
        self.model, self.timesteps = model, timesteps
        self.encode: Encode = encode

    def forward(self, x: Tensor) -> Tensor:
        x_seq = encode_input(x, self.timesteps, self.encode)
        return weighted_rate(_by_layers(self.model, x_seq), _decay(self.model))


def _decay(model: nn.Module) -> float:
    """The leak of the last neurons."""
    neurons = find_neurons(model)
    for neuron in neurons:
        if not isinstance(neuron, LIF) or neuron.v_reset is not None:
            raise ValueError(f"expected LIF neurons with soft reset, whose rates are known, got {neuron}")
    return neurons[-1].decay  # pyright: ignore


def _check_layers(model: nn.Module) -> None:
    if isinstance(model, nn.Sequential):
        for child in model:
            _check_layers(child)
    elif state_modules(model) and not isinstance(model, LIF):
        raise ValueError(f"expected neurons inside nn.Sequential only, got {type(model).__name__}, which holds some")


def _by_layers(layer: nn.Module, x_seq: Tensor) -> Tensor:
    """`[T, B, ...]` to `[T, B, ...]`, each layer over the whole sequence before the next."""
    if isinstance(layer, LIF):
        return _Spikes.apply(x_seq, layer)  # pyright: ignore[reportReturnType]
    if isinstance(layer, nn.Sequential) and state_modules(layer):
        for child in layer:
            x_seq = _by_layers(child, x_seq)
        return x_seq
    return layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class _Spikes(torch.autograd.Function):
    """A layer of neurons over a sequence, backward by rates."""

    @staticmethod
    def forward(ctx: Any, current: Tensor, neuron: LIF) -> Tensor:
        reset_state(neuron)
        # Without hooks: the sequence is one run of this layer, whatever watches single steps.
        spikes = torch.stack([neuron.forward(step) for step in current])
        reset_state(neuron)
        rate = weighted_rate(current, neuron.decay)
        ctx.save_for_backward((rate > 0) & (rate < neuron.v_threshold))
        ctx.neuron = neuron
        return spikes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (g,), (inside,) = gradients, ctx.saved_tensors
        shared = g.sum(0) * inside / ctx.neuron.v_threshold
        weights = _weights(g, ctx.neuron.decay)
        return weights.view(-1, *[1] * shared.dim()) * shared, None
