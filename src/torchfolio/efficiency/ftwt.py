"""Fire Together Wire Together: for every input, compute only the filters that will fire.

Sara Elkerdawy, Mostafa Elhoushi, Hong Zhang, Nilanjan Ray, "Fire Together Wire Together: A Dynamic Pruning Approach with
Self-Supervised Mask Prediction", CVPR 2022, https://arxiv.org/abs/2110.08232.

Beside every convolution stands a gate, a linear layer on the pooled input, that predicts which filters carry most of
the output's heat. Its targets come from the network itself: the strongest filters, up to a share $r$ of the total.
No sparsity penalty is tuned, and what is saved can be read off the trained network before the gates are trained.

    r = choose_r(net, images, reduction=0.4)
    net = attach_gates(net, r)
    fit(net, train, rule=FTWT(), optimizer=sgd(0.01, weight_decay=5e-4), epochs=8)
    measure_flops(net, test).reduction
    net = compact(net)                        # skips the filters of single images

`torchfolio compress net/ --method ftwt --data cifar10 --set r=0.9 -o small/` does the same for a network on disk.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchfolio import checks
from torchfolio.efficiency.compact_conv import CompactConv, compact
from torchfolio.efficiency.compression import Compression, Phase, own_group
from torchfolio.efficiency.gate_flops import Flops, choose_r, estimate_flops, gates_open, measure_flops
from torchfolio.efficiency.gate_placement import attach_gates
from torchfolio.efficiency.gated_conv import (
    GatedConv,
    Gates,
    MaskPredictor,
    Pool,
    gated_layers,
    mass_mask,
    uniform_mask,
)
from torchfolio.engine import LearningRule
from torchfolio.engine.rules import Batch, Loss, default_loss

__all__ = [
    "FTWT",
    "CompactConv",
    "DynamicPruning",
    "Flops",
    "GatedConv",
    "Gates",
    "MaskPredictor",
    "attach_gates",
    "choose_r",
    "compact",
    "compact_gated",
    "estimate_flops",
    "gated_layers",
    "gates_open",
    "mass_mask",
    "measure_flops",
    "uniform_mask",
]


class FTWT(LearningRule):
    """Trains gates and network together: the task's loss for the network under its masks, their targets for the gates.

    $$L = L_\\text{task} + w \\operatorname{mean}_l \\mathrm{BCE}(P_l, g_l), \\qquad
    w = 1 \\text{ until cooldown, then } 0,$$

    so that in the second half the gates stand still and the network adapts to them. The task's loss never reaches a gate.

    Args:
        loss: criterion on (output, target); by default cross-entropy for labels, else the mean squared error.
        cooldown: share of the training after which the gates stand still, in (0, 1].
        mode: `"decoupled"`, or `"joint"` to let the loss of the masks shape the layers before.
        gate_lr: learning rate of the gates, constant and without decay. 0.1 is for SGD; take about 0.01 with Adam.

    Raises:
        ValueError: if a setting is out of range.

    Note:
        Where each filter fires for fewer than half of the inputs, a gate that cannot tell inputs apart shuts them all: a
        warning names the layer when the gates come to a stand. `softmax=False` then keeps the accuracy.

    Reference:
        Elkerdawy et al., CVPR 2022, section 3.
    """

    def __init__(
        self,
        loss: Loss | None = None,
        cooldown: float = 0.5,
        mode: Literal["decoupled", "joint"] = "decoupled",
        gate_lr: float = 0.1,
    ) -> None:
        self.loss = loss or default_loss
        self.cooldown = checks.between("cooldown", cooldown, 0, 1, inclusive=(False, True))
        self.mode = checks.one_of("mode", mode, ("decoupled", "joint"))
        self.gate_lr = checks.positive("gate_lr", gate_lr)
        self.model: nn.Module | None = None
        self.layers: dict[str, GatedConv] = {}
        self.optimizer: Optimizer | None = None
        self.steps, self.last_step = 0, math.inf

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        self.layers, self.model = gated_layers(model), model
        self.optimizer, self.steps, self.last_step = None, 0, math.inf
        return model

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        gates = [p for m in self.layers.values() for p in m.predictor.parameters() if p.requires_grad]
        if gates:
            own_group(optimizer, gates, lr=self.gate_lr, weight_decay=0.0)
            self.optimizer = optimizer
        if self.cooldown < 1:
            if total_steps is None:
                raise ValueError("cooldown is a share of the training, whose length is not known; give max_steps")
            self.last_step = round(self.cooldown * total_steps)

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        if all(p.grad is None for p in self.model.parameters()):  # else this batch is added to the last
            self.steps += 1
        learning = self.steps <= self.last_step
        if self.optimizer is not None:
            self.optimizer.param_groups[-1]["lr"] = self.gate_lr
        *inputs, target = batch
        try:
            for layer in self.layers.values():
                layer.learning, layer.joint = learning, self.mode == "joint"
            task = self.loss(self.model(*inputs), target)
            shares = {n: m.last.mask.float().mean() for n, m in self.layers.items() if m.last is not None}
            masks = torch.stack([m.mask_loss() for m in self.layers.values()]).mean() if learning else None
            backward(task if masks is None else task + masks)
            if self.steps == self.last_step and learning:
                self._tell_shut_gates()
        finally:
            for layer in self.layers.values():
                layer.learning = layer.joint = False
                layer.last = None
        scalars = {"loss": task.detach(), "open": torch.stack(list(shares.values())).mean()}
        return scalars if masks is None else {**scalars, "mask_loss": masks.detach()}

    def _tell_shut_gates(self) -> None:
        """Warn of gates that now stand still and open far less than their targets ask for."""
        for name, layer in self.layers.items():
            if layer.last is None or layer.last.target is None:
                continue
            opened, wanted = (float(t.float().mean()) for t in (layer.last.mask, layer.last.target))
            if opened < wanted / 2:
                warnings.warn(
                    f"the gate of {name} opens {opened:.0%} of the filters where {wanted:.0%} carry the heat: it tells "
                    "inputs too little apart, and accuracy will suffer; try softmax=False, more epochs, or skip the layer",
                    stacklevel=2,
                )

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])


def compact_gated(
    model: nn.Module,
    r: float = 0.9,
    skip: Sequence[str] = (),
    pool: Pool = "max",
    softmax: bool = True,
) -> nn.Module:
    """The structure of a compact network, into which its state dict is loaded: what a bundle builds.

    Args:
        model: network without gates.
        r: share that is kept, see `attach_gates`.
        skip: names, as in `attach_gates`.
        pool: pool, as in `attach_gates`.
        softmax: whether the pooled input is normalised, likewise.
    """
    return compact(attach_gates(model, r, skip=skip, pool=pool, softmax=softmax))


class DynamicPruning(Compression):
    """FTWT as a way to make a trained network cheaper: gates, training, compact form.

    Args:
        r: share of the heat to keep, in (0, 1]; `choose_r` finds one for a budget.
        skip: names of convolutions to leave alone.
        pool: pool, see `MaskPredictor`.
        softmax: whether the pooled input is normalised, likewise.
        mode: mode, see `FTWT`.
        cooldown: share of the training, likewise.
        gate_lr: learning rate of the gates, likewise.

    Raises:
        ValueError: if a setting is out of range.

    Example:
        >>> small = compress(net, DynamicPruning(r=0.9), train, example=x, epochs=4).model  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        r: float = 0.9,
        skip: Sequence[str] = (),
        pool: Pool = "max",
        softmax: bool = True,
        mode: Literal["decoupled", "joint"] = "decoupled",
        cooldown: float = 0.5,
        gate_lr: float = 0.1,
    ) -> None:
        self.r = checks.between("r", r, 0, 1, inclusive=(False, True))
        self.gates: dict[str, Any] = {"skip": list(skip), "pool": pool, "softmax": softmax}
        self.rule = FTWT(cooldown=cooldown, mode=mode, gate_lr=gate_lr)

    def convert(self, model: nn.Module, example: Tensor) -> nn.Module:
        return attach_gates(model, self.r, **self.gates)

    def phases(self, model: nn.Module) -> Iterator[Phase]:
        yield Phase("gates and network", rule=self.rule)

    def finish(self, model: nn.Module) -> nn.Module:
        return compact(model)

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        arguments = {"model": network, "r": self.r, **self.gates}
        return {"build": "torchfolio.efficiency.ftwt:compact_gated", "arguments": arguments}
