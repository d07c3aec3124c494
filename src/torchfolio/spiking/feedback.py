"""Errors sent down by other weights than the forward ones: random fixed ones, or their signs. Put on any rule.

Timothy P. Lillicrap, Daniel Cownden, Douglas B. Tweed, Colin J. Akerman, "Random Synaptic Feedback Weights Support Error
Backpropagation for Deep Learning", Nature Communications 2016; Will Xiao, Honglin Chen, Qianli Liao, Tomaso Poggio,
"Biologically-Plausible Learning Algorithms Can Scale to Large Datasets", ICLR 2019, for signs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.engine import Backprop, LearningRule, evaluate, seeded
from torchfolio.spiking.credit import WeightLayer, credit_of, fan_in, weight_layers

__all__ = ["FeedbackAlignment", "SignSymmetric"]


class ErrorTransport(LearningRule):
    """A rule whose errors go down through weights of a subclass's choice, in linear and ungrouped convolution layers.

    Args:
        rule: learning rule of the gradients; `Backprop()` by default.
    """

    def __init__(self, rule: LearningRule | None = None) -> None:
        self.rule = rule or Backprop()
        self.layers: dict[str, WeightLayer] = {}

    @property
    def loss(self) -> Any:
        """The criterion of the rule, where it has one."""
        return self.rule.loss  # pyright: ignore[reportAttributeAccessIssue]

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        """Prepare the rule, and find the layers."""
        self.layers = weight_layers(model)
        return self.rule.prepare(model, example)

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        credits = {name: credit_of(layer) for name, layer in self.layers.items()}
        for name, credit in credits.items():
            credit.transport = self.weights(name, self.layers[name])
        try:
            return self.rule.step(batch, backward)
        finally:
            for credit in credits.values():
                credit.transport = None
                credit.release()

    @abstractmethod
    def weights(self, name: str, layer: WeightLayer) -> Tensor:
        """What errors go down through in place of the layer's weights, of their shape."""

    def configure(self, optimizer: Any, total_steps: int | None) -> None:
        self.rule.configure(optimizer, total_steps)

    def predictor(self, model: nn.Module) -> nn.Module:
        return self.rule.predictor(model)

    def evaluate(self, model: nn.Module, data: Any) -> dict[str, float]:
        """Scores of the network as the rule runs it."""
        return evaluate(self.predictor(model), data)

    def release(self) -> None:
        self.rule.release()

    def state_dict(self) -> dict[str, Any]:
        return {"rule": self.rule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rule.load_state_dict(state["rule"])


class FeedbackAlignment(ErrorTransport):
    """Errors go down through fixed random weights (Kaiming-uniform, as a layer's own at the start).

    Args:
        rule: learning rule of the gradients; `Backprop()` by default.
        seed: seed of the random weights.

    Example:
        >>> fit(net, train, rule=FeedbackAlignment(BPTT(timesteps=6)))
    """

    def __init__(self, rule: LearningRule | None = None, seed: int = 0) -> None:
        super().__init__(rule)
        self.seed = whole("seed", seed)
        self.sent: dict[str, Tensor] = {}

    def weights(self, name: str, layer: WeightLayer) -> Tensor:
        if name not in self.sent:
            with seeded(self.seed + 7919 * list(self.layers).index(name)):
                self.sent[name] = nn.init.kaiming_uniform_(torch.empty(layer.weight.shape), a=math.sqrt(5))
        self.sent[name] = self.sent[name].to(layer.weight)
        return self.sent[name]


class SignSymmetric(ErrorTransport):
    """Errors go down through the signs of the forward weights, scaled: $1/\\sqrt n$ for linear layers of n inputs,
    $\\sqrt{2 / (k^2 \\mathrm{out})}$ for convolutions.

    Args:
        rule: learning rule of the gradients; `Backprop()` by default.
    """

    def weights(self, name: str, layer: WeightLayer) -> Tensor:
        if isinstance(layer, nn.Linear):
            scale = fan_in(layer) ** -0.5
        else:
            scale = math.sqrt(2 / (layer.weight[0, 0].numel() * layer.out_channels))
        return layer.weight.detach().sign() * scale
