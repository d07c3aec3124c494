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

import copy
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from torchfolio import checks
from torchfolio.data.examples import Examples
from torchfolio.efficiency.compression import Compression, Phase, own_group
from torchfolio.engine import LearningRule
from torchfolio.engine.modes import evaluating
from torchfolio.engine.rules import Batch, Loss, default_loss
from torchfolio.measure import count_flops
from torchfolio.models import replace_layers

__all__ = [
    "FTWT",
    "CompactConv",
    "DynamicPruning",
    "Flops",
    "GatedConv",
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

LEAST = 1e-5
"""A share of the heat below which a filter does not fire; also the tolerance of the sum of shares."""

Pool = Literal["max", "avg"]
Criterion = Literal["mass", "uniform"]


def mass_mask(heat: Tensor, r: float) -> Tensor:
    """The strongest filters whose shares of the heat sum to at most `r`.

    The filter that crosses `r` is dropped, and so are those with a share of $10^{-5}$ or less; the strongest stays
    always. `r` = 1 drops only what fires nowhere.

    Args:
        heat: scores of filters, not negative, `[B, C]`.
        r: in (0, 1].

    Returns:
        What to keep, bool `[B, C]`.

    Reference:
        Elkerdawy et al., CVPR 2022, section 3.2. That the strongest always stays is ours.
    """
    shares = heat / heat.sum(1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    keep = shares > LEAST
    ranked, order = torch.sort(shares, dim=1, descending=True, stable=True)
    if r < 1:
        total = ranked.double().cumsum(1)
        keep &= torch.zeros_like(keep).scatter_(1, order, total <= r + LEAST)
    return keep.scatter_(1, order[:, :1], True)


def uniform_mask(heat: Tensor, r: float) -> Tensor:
    """All filters but the $\\lfloor r C \\rfloor$ weakest, and those that fire nowhere: the ablation; see `mass_mask`."""
    shares = heat / heat.sum(1, keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny)
    order = torch.sort(shares, dim=1, descending=True, stable=True).indices
    keep = torch.zeros_like(shares, dtype=torch.bool)
    keep.scatter_(1, order[:, : heat.shape[1] - math.floor(r * heat.shape[1])], True)
    return (keep & (shares > LEAST)).scatter_(1, order[:, :1], True)


_CRITERIA: dict[str, Callable[[Tensor, float], Tensor]] = {"mass": mass_mask, "uniform": uniform_mask}


class MaskPredictor(nn.Module):
    """The gate of a layer: pooled input, softmax over channels, linear.

    Args:
        in_channels: channels of the layer's input.
        out_channels: its filters.
        pool: `"max"` or `"avg"`, over all positions.
        softmax: normalise the pooled input. Without it the gates follow the budget more closely and cost more accuracy.

    Shapes:
        `[B, in_channels, H, W]` to logits `[B, out_channels]`.

    Reference:
        Elkerdawy et al., CVPR 2022, figure 3 (max pooling; the released code pools by the mean).
    """

    def __init__(self, in_channels: int, out_channels: int, pool: Pool = "max", softmax: bool = True) -> None:
        super().__init__()
        self.pool, self.softmax = checks.one_of("pool", pool, ("max", "avg")), softmax
        self.linear = nn.Linear(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        return self.linear(pooled.softmax(1) if self.softmax else pooled)

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, softmax={self.softmax}"


def open_gates(logits: Tensor) -> Tensor:
    """$\\sigma(P) > 1/2$, and always the largest."""
    return (logits > 0).scatter_(1, logits.argmax(1, keepdim=True), True)


class Gates(NamedTuple):
    """What the gates of a layer did in the last pass.

    Attributes:
        logits: of the predictor `[B, C]`; with their graph while a rule trains them.
        target: bool `[B, C]`, or `None` where nothing asked for it.
        mask: bool `[B, C]`, what was used.
    """

    logits: Tensor
    target: Tensor | None
    mask: Tensor


class GatedConv(nn.Module):
    """A convolution, its norm and its activation, of which a gate picks the filters.

    $$O = \\operatorname{act}(\\operatorname{norm}(W * I)), \\qquad y = O \\odot M, \\qquad
    M = \\mathbf 1[\\text{predictor}(I) > 0].$$

    All filters are computed here, so that norms see all channels in training; `compact` skips the closed ones.

    Args:
        conv: the convolution.
        norm: its batch norm, or `None`.
        activation: such as `nn.ReLU`, or `None` (before an addition; filters are then scored by the size of the norm's
            output).
        predictor: the gate.
        r: share of the heat to keep, in (0, 1].
        criterion: `"mass"` or `"uniform"`.

    Attributes:
        last: `Gates` of the last pass.
        joint: whether the loss of the masks reaches the layers before.
        learning: whether targets are computed.
        oracle: whether targets are used in place of predictions.

    Shapes:
        As the convolution.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.Module | None,
        activation: nn.Module | None,
        predictor: MaskPredictor,
        r: float,
        criterion: Criterion = "mass",
    ) -> None:
        super().__init__()
        self.r = checks.between("r", r, 0, 1, inclusive=(False, True))
        self.criterion = checks.one_of("criterion", criterion, tuple(_CRITERIA))
        self.conv, self.norm, self.activation, self.predictor = conv, norm, activation, predictor
        self.joint = self.learning = self.oracle = self.counting = False
        self.last: Gates | None = None
        self.macs: Tensor | None = None

    def dense(self, x: Tensor) -> Tensor:
        """The output without a mask."""
        out = self.conv(x)
        out = out if self.norm is None else self.norm(out)
        return out if self.activation is None else self.activation(out)

    def gates(self, x: Tensor, out: Tensor) -> Gates:
        """Predictions, targets where they are needed, and the mask; no loss but that of the masks reaches them."""
        logits = self.predictor(x if self.joint else x.detach())
        target = None
        if self.learning or self.oracle:
            target = _CRITERIA[self.criterion](out.detach().abs().amax((2, 3)), self.r)
        mask = target if self.oracle and target is not None else open_gates(logits.detach())
        return Gates(logits if self.learning else logits.detach(), target, mask)

    def forward(self, x: Tensor) -> Tensor:
        out = self.dense(x)
        self.last = self.gates(x, out)
        if self.counting:
            self.macs = _macs(self.conv, x, out, self.last.mask)
        return out * self.last.mask[:, :, None, None].to(out.dtype)

    def mask_loss(self) -> Tensor:
        """Binary cross-entropy of the last predictions, summed over filters, a mean over the batch."""
        if self.last is None or self.last.target is None:
            raise RuntimeError("there are no targets; a rule sets learning before the forward pass")
        target = self.last.target.to(self.last.logits.dtype)
        return F.binary_cross_entropy_with_logits(self.last.logits, target, reduction="sum") / len(target)

    def extra_repr(self) -> str:
        return f"r={self.r:g}, criterion={self.criterion!r}"


def _macs(conv: nn.Conv2d, x: Tensor, out: Tensor, mask: Tensor) -> Tensor:
    """Multiply-adds of every sample: open filters times channels that hold anything, times window and positions."""
    window = math.prod(conv.kernel_size) * math.prod(out.shape[2:])
    filters = mask.sum(1).double()
    if conv.groups == conv.in_channels:  # depthwise: every filter reads one channel
        return filters * window
    return filters * (x != 0).flatten(2).any(2).sum(1) / conv.groups * window


# Finding layers in somebody's own network


def attach_gates(
    model: nn.Module,
    r: float,
    *,
    skip: Sequence[str] = (),
    pool: Pool = "max",
    softmax: bool = True,
    criterion: Criterion = "mass",
) -> nn.Module:
    """A copy of a trained network with a gate beside every convolution that has its place in a known pattern.

    These are convolution, batch norm (or none) and ReLU in a row, as modules or functions; a convolution and norm before
    an addition or another convolution are gated after the norm. Convolutions on shortcuts, whose input goes elsewhere
    too before an addition, and those that run twice are left alone: `gated_layers` tells which have gates.

    Args:
        model: the trained network, which can be traced by `torch.fx`.
        r: share of the heat to keep, in (0, 1]; see `choose_r`.
        skip: names of convolutions to leave alone.
        pool: of the gates; see `MaskPredictor`.
        softmax: likewise.
        criterion: of the targets.

    Raises:
        ValueError: if the network cannot be traced, has gates already or nothing to gate, or a name is unknown.
    """
    if any(isinstance(m, GatedConv | CompactConv) for m in model.modules()):
        raise ValueError("the network has gates already")
    if unknown := sorted(set(skip) - {n for n, _ in model.named_modules()}):
        raise ValueError(f"the network has no module {unknown[0]!r} to skip")
    net = copy.deepcopy(model)
    chains = {name: chain for name, chain in _chains(net).items() if name not in skip}
    if not chains:
        raise ValueError("expected a convolution that is followed by a norm and a ReLU to gate, found none")
    for name, (norm, activation) in chains.items():
        conv = net.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        predictor = MaskPredictor(conv.in_channels, conv.out_channels, pool, softmax).to(conv.weight)
        # The network's own ReLU stays where it is: a second one changes nothing.
        gated = GatedConv(conv, net.get_submodule(norm) if norm else None, activation, predictor, r, criterion)
        _set(net, name, gated.train(conv.training))
        if norm:
            _set(net, norm, nn.Identity())
    return net


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _chains(model: nn.Module) -> dict[str, tuple[str | None, nn.Module | None]]:
    """Names of convolutions to gate, each with the name of its norm and its activation."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:  # a network that cannot be traced, for any of many reasons
        raise ValueError(f"the network cannot be traced to find its convolutions: {error}") from error
    modules = dict(model.named_modules())
    calls: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    chains: dict[str, tuple[str | None, nn.Module | None]] = {}
    for node in graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.Conv2d or calls[str(node.target)] > 1:
            continue
        follower, norm = _only_user(node), None
        after = modules.get(str(follower.target)) if follower is not None and follower.op == "call_module" else None
        if follower is not None and type(after) is nn.BatchNorm2d and calls[str(follower.target)] == 1:
            norm, follower = str(follower.target), _only_user(follower)
        if follower is None:
            continue
        activation = _relu(follower, modules)
        source = node.args[0]
        shortcut = isinstance(source, fx.Node) and len(source.users) > 1
        linear = norm is not None and ((_is_sum(follower) and not shortcut) or _is_conv(follower, modules))
        if activation is not None or linear:
            chains[str(node.target)] = (norm, activation)
    return chains


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """A ReLU like the one of a node, if it is one."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    if type(module) is nn.ReLU or node.target in (F.relu, torch.relu, "relu", "relu_", F.relu_, torch.relu_):
        return nn.ReLU()
    return nn.ReLU6() if type(module) is nn.ReLU6 or node.target is F.relu6 else None


def _is_sum(node: fx.Node) -> bool:
    return node.target in (operator.add, operator.iadd, torch.add, "add", "add_")


def _is_conv(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(modules.get(str(node.target)), nn.Conv2d)


def gated_layers(model: nn.Module) -> dict[str, GatedConv]:
    """The gated convolutions of a network by name.

    Raises:
        ValueError: if there is none.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, GatedConv)}
    if not layers:
        raise ValueError("the network has no gates; attach them first")
    return layers


# Operations, before and after training


@dataclass(frozen=True)
class Flops:
    """Operations of a network whose gates are closed sample by sample, two for a multiply-add.

    Attributes:
        dense: without gates, of one sample.
        per_sample: with gates `[N]`, those of the gates not counted.
        gates: of all gates together, of one sample.
    """

    dense: int
    per_sample: Tensor
    gates: int

    @property
    def reductions(self) -> Tensor:
        """The share that is saved `[N]`."""
        return 1 - self.per_sample / self.dense

    @property
    def reduction(self) -> float:
        """The mean share that is saved."""
        return float(self.reductions.mean())

    @property
    def reduction_with_gates(self) -> float:
        """The mean share that is saved when the gates' own operations count."""
        return self.reduction - self.gates / self.dense


@torch.no_grad()
def measure_flops(model: nn.Module, data: Any, *, batch_size: int = 256) -> Flops:
    """Operations on every sample, by the gates that open and the channels that reach each layer.

    Args:
        model: of `attach_gates`; mode and statistics are left as they are.
        data: inputs, a data set or a loader; see `torchfolio.data.Examples`.
        batch_size: samples at a time.

    Raises:
        ValueError: if there are no gates, or no samples.
    """
    layers, rows = gated_layers(model), []
    sizes: dict[str, int] = {}
    like = next(model.parameters())
    first: Tensor | None = None
    try:
        for layer in layers.values():
            layer.counting = True
        with evaluating(model):
            for x, *_ in Examples(data).batches(batch_size):
                x = x.to(like.device, like.dtype)
                first = x[:1] if first is None else first
                model(x)
                # A layer that did not run has no counts.
                macs = {n: m.macs for n, m in layers.items() if m.macs is not None}
                rows.append(torch.stack(list(macs.values())).sum(0).cpu())
            assert first is not None
            handles = [m.conv.register_forward_hook(partial(_count_dense, sizes, n)) for n, m in layers.items()]
            try:
                gates = 2 * sum(m.predictor.linear.weight.numel() for m in layers.values())
                whole = count_flops(model, first) - gates
            finally:
                for handle in handles:
                    handle.remove()
    finally:
        for layer in layers.values():
            layer.counting, layer.macs = False, None
    return Flops(whole, whole - 2 * sum(sizes.values()) + 2 * torch.cat(rows), gates)


def _count_dense(sizes: dict[str, int], name: str, conv: nn.Module, inputs: Any, output: Tensor) -> None:
    assert isinstance(conv, nn.Conv2d)
    sizes[name] = math.prod(output.shape[2:]) * conv.weight.numel()


def estimate_flops(model: nn.Module, data: Any, r: float, *, criterion: Criterion = "mass") -> Flops:
    """Operations with gates that hit their targets exactly, known before any gate is trained.

    Args:
        model: the trained network, with gates or without.
        data: inputs like those of training.
        r: share of the heat.
        criterion: of the targets.

    Raises:
        ValueError: as `attach_gates` and `measure_flops`.
    """
    checks.between("r", r, 0, 1, inclusive=(False, True))
    gated = any(isinstance(m, GatedConv) for m in model.modules())
    net = copy.deepcopy(model) if gated else attach_gates(model, r, criterion=criterion)
    with _oracle(net, r):
        return measure_flops(net, data)


@contextmanager
def _oracle(model: nn.Module, r: float) -> Iterator[None]:
    layers = gated_layers(model).values()
    before = [(layer.oracle, layer.r) for layer in layers]
    try:
        for layer in layers:
            layer.oracle, layer.r = True, r
        yield
    finally:
        for layer, (oracle, own) in zip(layers, before, strict=True):
            layer.oracle, layer.r = oracle, own


def choose_r(model: nn.Module, data: Any, reduction: float, *, tolerance: float = 0.005) -> float:
    """The share of the heat at which the estimated saving is as wanted, by bisection.

    Args:
        model: the trained network, without gates.
        data: inputs like those of training, some hundreds.
        reduction: share of the operations to save, such as 0.4.
        tolerance: of the saving.

    Raises:
        ValueError: if no share gives it; the range that can be reached is named.
    """
    checks.between("reduction", reduction, 0, 1, inclusive=False)
    net = attach_gates(model, 1.0)

    def saved(r: float) -> float:
        with _oracle(net, r):
            return measure_flops(net, data).reduction

    low, high = 1e-6, 1.0
    most, least = saved(low), saved(high)
    if not least - tolerance <= reduction <= most + tolerance:
        raise ValueError(
            f"expected a reduction between {least:.3f} and {most:.3f}, which r = 1 and r near 0 give, got {reduction}"
        )
    for _ in range(20):
        middle = (low + high) / 2
        value = saved(middle)
        if abs(value - reduction) <= tolerance:
            return middle
        low, high = (middle, high) if value > reduction else (low, middle)
    return (low + high) / 2


@torch.no_grad()
def gates_open(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Which filters open for every input, bool `[B, C]` by name of the layer, in evaluation mode."""
    layers = gated_layers(model)
    with evaluating(model):
        model(x)
    return {name: layer.last.mask for name, layer in layers.items() if layer.last is not None}


# Training


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
            kept = {n: m.last.mask.float().mean() for n, m in self.layers.items() if m.last is not None}
            masks = torch.stack([m.mask_loss() for m in self.layers.values()]).mean() if learning else None
            backward(task if masks is None else task + masks)
        finally:
            for layer in self.layers.values():
                layer.learning = layer.joint = False
                layer.last = None
        scalars = {"loss": task.detach(), "open": torch.stack(list(kept.values())).mean()}
        return scalars if masks is None else {**scalars, "mask_loss": masks.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])


# Inference


class CompactConv(nn.Module):
    """A gated convolution with its norm folded in, which computes only the open filters of a single image.

    They read only the channels that hold anything. Batches of several images, and convolutions in groups that are not
    depthwise, compute all filters and mask them.

    Args:
        gated: in evaluation mode; copied.

    Shapes:
        As the convolution.
    """

    def __init__(self, gated: GatedConv) -> None:
        super().__init__()
        self.predictor, self.activation = copy.deepcopy(gated.predictor), copy.deepcopy(gated.activation)
        self.conv = copy.deepcopy(gated.conv)
        weight, bias = _folded(gated)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        mask = open_gates(self.predictor(x))
        conv = self.conv
        if len(x) > 1 or (conv.groups > 1 and conv.groups != conv.in_channels) or conv.padding_mode != "zeros":
            return self._activated(conv(x)) * mask[:, :, None, None].to(x.dtype)
        assert conv.bias is not None
        kept = mask[0].nonzero()[:, 0]
        weight, bias, groups = conv.weight.index_select(0, kept), conv.bias.index_select(0, kept), 1
        if conv.groups > 1:  # depthwise; a filter may be one of several of a channel
            x, groups = x.index_select(1, kept // (conv.out_channels // conv.groups)), len(kept)
        else:
            active = (x[0] != 0).flatten(1).any(1).nonzero()[:, 0]
            if 0 < len(active) < x.shape[1]:
                x, weight = x.index_select(1, active), weight.index_select(1, active)
        part = self._activated(F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups))
        whole = part.new_zeros(1, conv.out_channels, *part.shape[2:])
        return whole.index_copy_(1, kept, part)

    def _activated(self, out: Tensor) -> Tensor:
        return out if self.activation is None else self.activation(out)


def _folded(gated: GatedConv) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its batch norm in them."""
    conv, norm = gated.conv, gated.norm
    bias = conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach()
    if norm is None:
        return conv.weight.detach().clone(), bias.clone()
    assert isinstance(norm, nn.BatchNorm2d)
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("expected batch norms with running statistics to compact, got one without")
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.detach()
    shift = 0 if norm.bias is None else norm.bias.detach()
    return conv.weight.detach() * scale[:, None, None, None], (bias - norm.running_mean) * scale + shift


def compact(model: nn.Module) -> nn.Module:
    """A copy for inference that skips closed filters, so that single images take less time where layers are wide.

    Outputs are those of the masked network up to rounding.

    Args:
        model: of `attach_gates`, trained.

    Raises:
        ValueError: if there are no gates.
    """
    gated_layers(model)
    net = copy.deepcopy(model).eval()
    return replace_layers(net, GatedConv, lambda gated: CompactConv(gated))  # pyright: ignore[reportArgumentType]


def compact_gated(
    model: nn.Module,
    r: float = 0.9,
    skip: Sequence[str] = (),
    pool: Pool = "max",
    softmax: bool = True,
) -> nn.Module:
    """The structure of a compact network, into which its state dict is loaded: what a bundle builds.

    Args:
        model: the network without gates.
        r: see `attach_gates`.
        skip: likewise.
        pool: likewise.
        softmax: likewise.
    """
    return compact(attach_gates(model, r, skip=skip, pool=pool, softmax=softmax))


class DynamicPruning(Compression):
    """FTWT as a way to make a trained network cheaper: gates, training, compact form.

    Args:
        r: share of the heat to keep, in (0, 1]; `choose_r` finds one for a budget.
        skip: names of convolutions to leave alone.
        pool: see `MaskPredictor`.
        softmax: likewise.
        mode: see `FTWT`.
        cooldown: likewise.
        gate_lr: likewise.

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
