"""Backpropagation through time, the reference that rules for spiking networks are measured against.

Its loss is the mean over time of the losses of the single steps, so that rules that go backward step by step
descend on the very same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from torchfolio.checks import whole
from torchfolio.engine import LearningRule, evaluate
from torchfolio.spiking.encoders import Encode, check_encode, encode_input
from torchfolio.spiking.losses import SLTTLoss
from torchfolio.spiking.neurons import LIF, find_neurons
from torchfolio.spiking.sequence import Unrolled
from torchfolio.spiking.state import reset_state

__all__ = ["BPTT", "SequenceRule"]

Loss = Callable[[Tensor, Tensor], Tensor]


class SequenceRule(LearningRule):
    """What rules that train a single-step spiking network over a sequence share.

    A subclass says in `learn` how a sequence becomes gradients.

    Args:
        loss: criterion of one step's output and the target, a mean over the batch; `None` takes `SLTTLoss()`.
        timesteps: $T \\ge 1$.
        encode: encoding of an input as a sequence, see `encode_input`.
        generator: source of random choices; torch's global one by default.

    Raises:
        ValueError: if `timesteps` is below 1; in `prepare`, if the network has no spiking neuron; in the first
            `step`, if one runs at two places; in `step`, if a sequence has another length, or the loss of one step is not a scalar that requires a gradient.
    """

    detach = False  # what the rule needs of its neurons' detach_state

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        timesteps: int,
        encode: Encode = "repeat",
        generator: torch.Generator | None = None,
    ) -> None:
        whole("timesteps", timesteps, 1)
        check_encode(encode)
        self.loss: Loss = loss if loss is not None else SLTTLoss()
        self.timesteps = timesteps
        self.encode: Encode = encode
        self.generator = generator
        self.model: nn.Module | None = None
        self._flags: list[tuple[LIF, bool]] = []
        self._seen: list[RemovableHandle] = []

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        self.release()
        neurons = find_neurons(model)
        self._seen = _refuse_second_places(model, neurons)
        self._flags = [(n, n.detach_state) for n in neurons if isinstance(n, LIF)]
        for neuron, _ in self._flags:
            neuron.detach_state = self.detach
        self.model = model
        return model

    def release(self) -> None:
        """Give the neurons back the `detach_state` they had before `prepare`, and the model its freedom."""
        for neuron, flag in self._flags:
            neuron.detach_state = flag
        self._flags, self.model = [], None
        self._look_no_more()

    def _look_no_more(self) -> None:
        for handle in self._seen:
            handle.remove()
        self._seen = []

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x, y = batch
        x_seq = encode_input(x, self.timesteps, self.encode, self.generator)
        reset_state(self.model)
        try:
            loss, total, steps = self.learn(self.model, x_seq, y, backward)
        finally:
            reset_state(self.model)  # the last graph goes, and an evaluation starts afresh
            self._look_no_more()
        scalars: dict[str, Tensor | float] = {"loss": loss, "backward_steps": float(steps)}
        if not y.is_floating_point() and total.dim() == y.dim() + 1:
            scalars["accuracy"] = (total.argmax(-1) == y).float().mean()
        return scalars

    def learn(
        self, model: nn.Module, x_seq: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, int]:
        """Run the sequence and call `backward`.

        Returns:
            The loss and the sum of outputs over time, detached, and the number of steps gone backward.
        """
        raise NotImplementedError

    def predictor(self, model: nn.Module) -> Unrolled:
        """The network over time: the mean of its outputs. Random codes are drawn from torch's global generator."""
        return Unrolled(model, self.timesteps, self.encode)

    def evaluate(self, model: nn.Module, data: object) -> dict[str, float]:
        """Loss and accuracy of the mean output over time."""
        return evaluate(self.predictor(model), data)  # pyright: ignore[reportArgumentType]

    def step_loss(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of one step, checked."""
        loss = self.loss(output, y)
        if not isinstance(loss, Tensor) or loss.dim() or not loss.requires_grad:
            got = f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}" if isinstance(loss, Tensor) else loss
            raise ValueError(
                f"expected the loss of one time step to be a scalar that requires a gradient, got {got}; losses of "
                "the whole sequence (such as of the mean output) cannot be used here"
            )
        return loss

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if self.generator is not None and "generator" in state:
            self.generator.set_state(state["generator"])


def _refuse_second_places(model: nn.Module, neurons: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Hooks that stop the network when it runs a neuron twice in one step."""
    names = {module: name for name, module in model.named_modules()}
    ran: set[nn.Module] = set()

    def begin(module: nn.Module, inputs: object) -> None:
        ran.clear()

    def once(module: nn.Module, inputs: object) -> None:
        if module in ran:
            raise ValueError(
                f"the spiking neuron {names.get(module, '')!r} runs at two places of the network and would carry the "
                "potential of one to the other; give each place a neuron of its own"
            )
        ran.add(module)

    return [model.register_forward_pre_hook(begin), *(n.register_forward_pre_hook(once) for n in neurons)]


class BPTT(SequenceRule):
    """Backpropagation through time with surrogate gradients.

    $$L = \\frac{1}{T} \\sum_{t=1}^{T} \\ell(o[t], y),$$

    differentiated through layers and through time. Memory grows as T times the activations of a step.

    Args:
        loss: criterion $\\ell$ of one step's output and the target; `None` takes `SLTTLoss()`.
        timesteps: $T \\ge 1$.
        encode: encoding of an input as a sequence, see `encode_input`.
        generator: source of the spikes of `encode="poisson"`; torch's global one by default.

    Shapes:
        batches (x, y), x of `[B, ...]` (or `[T, B, ...]` with `encode=None`), y `[B]` labels.

    Raises:
        ValueError: see `SequenceRule`.

    Example:
        >>> rule = BPTT(timesteps=6)
        >>> fit(net, train, val=val, rule=rule, epochs=10)
        >>> evaluate(net, test, rule=rule)
    """

    def learn(
        self, model: nn.Module, x_seq: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, int]:
        outputs = [model(x) for x in x_seq]
        loss = torch.stack([self.step_loss(output, y) for output in outputs]).mean()
        backward(loss)
        return loss.detach(), torch.stack([o.detach() for o in outputs]).sum(0), self.timesteps
