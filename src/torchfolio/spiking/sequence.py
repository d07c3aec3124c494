"""Running a network over time: step by step, layer by layer, or as one module with a static input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchfolio.spiking.encoders import Encode, encode_input
from torchfolio.spiking.neurons import find_neurons
from torchfolio.spiking.state import reset_state, state_modules

__all__ = ["Flattened", "Stepped", "Unrolled", "multi_step", "run_sequence"]


def run_sequence(model: nn.Module, x_seq: Tensor) -> Tensor:
    """Run a single-step network over a sequence, going on from the state it is in.

    Args:
        model: takes `[B, ...]`; call `reset_state` on it first for a new sequence.
        x_seq: `[T, B, ...]`.

    Returns:
        Outputs `[T, B, ...]`.
    """
    return torch.stack([model(x) for x in x_seq])


class Flattened(nn.Module):
    """A stateless layer over a whole sequence at once: `[T, B, ...]` as one batch of T·B examples.

    One large matrix product takes the place of T small ones. Batch norm inside normalises over time and batch
    together, where step by step it normalises each step by itself.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        return self.layer(x_seq.flatten(0, 1)).unflatten(0, x_seq.shape[:2])


class Stepped(nn.Module):
    """A single-step layer over a whole sequence, one step after the other."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_seq: Tensor) -> Tensor:
        return run_sequence(self.layer, x_seq)


def multi_step(layer: nn.Module) -> nn.Module:
    """A layer or network of single steps as one that takes `[T, B, ...]`, layer by layer.

    Neighbours without state are flattened together; a sequential network is taken apart; any other module with
    neurons inside runs step by step. Parameters and state are shared with `layer`, which may go on in use.
    Suits training through the whole sequence; rules that go backward at every step need single steps.

    Args:
        layer: takes `[B, ...]`.

    Returns:
        A module from `[T, B, ...]` to `[T, B, ...]`.
    """
    if not state_modules(layer):
        return Flattened(layer)
    if not isinstance(layer, nn.Sequential):
        return Stepped(layer)
    parts: list[nn.Module] = []
    stateless: list[nn.Module] = []
    for child in layer:
        if not state_modules(child):
            stateless.append(child)
            continue
        if stateless:
            parts.append(Flattened(nn.Sequential(*stateless)))
            stateless = []
        parts.append(multi_step(child))
    if stateless:
        parts.append(Flattened(nn.Sequential(*stateless)))
    return nn.Sequential(*parts)


class Unrolled(nn.Module):
    """A spiking network as an ordinary one: `[B, ...]` in, the mean of its outputs over time out.

    Every call is a sequence of its own. For prediction (the largest mean is the largest sum over time), for
    evaluation, and for anything that expects a network of static inputs.

    Args:
        model: single-step network; held, not copied.
        timesteps: $T \\ge 1$.
        encode: encoding of the input as a sequence, see `encode_input`.

    Shapes:
        `[B, ...]` (or `[T, B, ...]` with `encode=None`) to the shape of one step's output.

    Raises:
        ValueError: if the network has no spiking neuron, or `timesteps` is below 1.

    Example:
        >>> predict = Unrolled(net, timesteps=6)
        >>> labels = predict(x).argmax(-1)
    """

    def __init__(self, model: nn.Module, timesteps: int, encode: Encode = "repeat") -> None:
        super().__init__()
        if timesteps < 1:
            raise ValueError(f"expected at least one time step, got {timesteps}")
        find_neurons(model)
        self.model, self.timesteps = model, timesteps
        self.encode: Encode = encode

    def forward(self, x: Tensor) -> Tensor:
        x_seq = encode_input(x, self.timesteps, self.encode)
        reset_state(self.model)
        try:
            total = self._first_step(x_seq[0])
            for x_t in x_seq[1:]:
                total = total + self.model(x_t)
        finally:
            reset_state(self.model)
        return total / self.timesteps

    def _first_step(self, x: Tensor) -> Tensor:
        try:
            return self.model(x)
        except RuntimeError as error:
            recorded = self.encode == "repeat" and x.dim() > 2 and x.shape[1] == self.timesteps
            if not recorded or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"the network cannot take {tuple(x.shape)} at every step; recordings [B, T, ...] are run through time by "
                "encode='frames'"
            ) from error
