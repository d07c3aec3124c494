"""Slow training of memory networks that learn fast within a sequence, over many episodes.

Tharindu Fernando, Simon Denman, Sridha Sridharan, Clinton Fookes, "Fast & Slow Learning: Incorporating Synthetic
Gradients in Neural Memory Controllers", 2020, https://arxiv.org/abs/2011.05438. Our reconstruction, see
`torchfolio.training.memory_network`: the paper's code is not public, and we built what its abstract names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.engine import LearningRule
from torchfolio.training.memory_network import Context, FastSlowMemoryNetwork, FastState, Trace
from torchfolio.training.plastic import PlasticLinear
from torchfolio.training.stream_estimator import FastSlowEstimator
from torchfolio.training.synthetic_gradients import FeedbackPath, SyntheticGradient

__all__ = [
    "FastSlowEstimator",
    "FastSlowMemoryNetwork",
    "FastSlowTraining",
    "FastState",
    "FeedbackPath",
    "true_gradients",
]


class FastSlowTraining(LearningRule):
    """Trains the slow weights of memory networks on episodes, their feedback path included.

    $$L = \\frac{1}{T} \\sum_t \\ell(\\hat y_t, y_t) + \\lambda_{sg}\\, \\frac{1}{T} \\sum_t \\lVert \\hat\\delta_t -
    \\delta_t \\rVert^2,$$

    backward through the whole episode, fast weights and memory; the true gradients $\\delta_t$ of one step's loss
    are computed in closed form and reach the feedback path alone.

    Decoupled, nothing goes backward from step to step: every controller's slow weights follow the synthetic gradient of
    its own output, and the feedback path follows the true ones, those of the write controller from the loss of the next
    step. Memory does not grow with T, and accuracy is lower; rates and decays of fast weights and the first memory stay as
    they are, since they act over several steps only.

    Args:
        backprop_through_time: whether to go backward through the episode; `False` is decoupled.

    Shapes:
        batches (x, y) of episodes as `FastSlowMemoryNetwork` takes. For an `nn.ModuleList` of networks (which may share
        a feedback path) batches (x1, y1, x2, y2, …); their losses are averaged.

    Raises:
        TypeError: in `prepare`, on another module.
        ValueError: in `prepare`, if a batch has not x and y for every network; decoupled, if one has no fast path.

    Note:
        Networks that share a feedback path and are trained by turns need nothing special: fit one, then the other.
        Freeze a path by `feedback.requires_grad_(False)`. Clip the gradients: fast weights can explode early on.
        To validate or evaluate, give episodes as (x, y, y): what the network sees, and what it is compared with.

    Example:
        >>> net = FastSlowMemoryNetwork(nn.Sequential(nn.Linear(1, 40), nn.ReLU()), 1)
        >>> fit(net, sine_episodes(20000), rule=FastSlowTraining(), optimizer=adam(2e-3), batch_size=32, clip_norm=5.0)

    Reference:
        Fernando et al., 2020, abstract; Jaderberg et al., ICML 2017, equations 1 to 3 for decoupled training.
    """

    def __init__(self, backprop_through_time: bool = True) -> None:
        self.backprop_through_time = bool(backprop_through_time)
        self.networks: list[FastSlowMemoryNetwork] = []

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        """Check networks and batch."""
        networks = list(model) if isinstance(model, nn.ModuleList) else [model]
        for net in networks:
            if not isinstance(net, FastSlowMemoryNetwork):
                raise TypeError(
                    f"expected a FastSlowMemoryNetwork, or an nn.ModuleList of them, got {type(net).__name__}"
                )
            if net.feedback is None and not self.backprop_through_time:
                raise ValueError("decoupled training follows synthetic gradients; expected networks with a fast path")
        if not networks or len(example) != 2 * len(networks):
            raise ValueError(
                f"expected x and y for each of {len(networks)} networks in a batch, got {len(example)} tensors"
            )
        self.networks = networks  # pyright: ignore
        return model

    def predictor(self, model: nn.Module) -> nn.Module:
        """The network on whole episodes (x, y); for classes its outputs `[B, out, T]`, as cross-entropy wants them."""
        return _Validated(model) if isinstance(model, FastSlowMemoryNetwork) else model

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if not self.networks:
            raise RuntimeError("call prepare(model, example) before step")
        learn = self._through_time if self.backprop_through_time else self._decoupled
        share = 1 / len(self.networks)
        scalars: dict[str, Tensor] = {}
        for net, x, y in zip(self.networks, batch[::2], batch[1::2], strict=True):
            for name, value in learn(net, x, y, lambda loss: backward(loss * share)).items():
                scalars[name] = scalars.get(name, torch.zeros_like(value)) + value * share
        return scalars

    def _through_time(
        self, net: FastSlowMemoryNetwork, x: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        trace = net.trace(x, y)
        loss = episode_loss(net, trace.output, net.targets(y, len(x)))
        scalars = {"loss": loss.detach()}
        if net.feedback is not None:
            k, h = net.memory.width, net.hidden
            true_query, true_before = true_gradients(net, trace)
            gap = SyntheticGradient.loss(trace.signals[..., : k + h], torch.cat((true_query, true_before), -1))
            scalars["synthetic"] = gap.detach()
            loss = loss + net.lambda_sg * gap if net.lambda_sg else loss
        backward(loss)
        return scalars

    def _decoupled(
        self, net: FastSlowMemoryNetwork, x: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> dict[str, Tensor]:
        batch, steps = y.shape[:2]
        target, state = net.targets(y, batch), net.init_state(batch).detach()
        losses, gaps = [], []
        written = pending = known = None
        for t in range(steps):
            output, context = net.step(state, x[:, t])
            # Gradients of this step's loss by what the controllers gave out now, and by what was written before.
            sources = [context.query, context.before, output, *([] if written is None else [written])]
            true = torch.autograd.grad(_half_summed(net, output, target[:, t]), sources)
            if pending is not None and known is not None:
                gaps.append(_regress(pending, (*known, true[3]), steps, backward))
            fixed = Context(*(value.detach() for value in context))
            with torch.no_grad():
                learned = net.learned(state, fixed, target[:, t])
            signals = net.signals(fixed.query, fixed.spikes, learned.written, fixed.output, target[:, t])
            ahead, middle, after, correction = signals
            pending, known = (ahead, middle, correction, after), true[:3]
            backward(_followed(net, state.detach(), context, target[:, t], pending) / steps)
            losses.append(episode_loss(net, fixed.output.unsqueeze(1), target[:, t : t + 1]))
            # The next step's loss tells what this one should have written.
            written = learned.written.requires_grad_()
            state = replace(learned.state, memory=net.rewritten(state.memory.detach(), written))
        assert pending is not None
        assert known is not None
        gaps.append(_regress(pending[:3], known, steps, backward))
        return {"loss": torch.stack(losses).mean(), "synthetic": torch.stack(gaps).mean()}


class _Validated(nn.Module):
    """Whole episodes, scored against their targets."""

    def __init__(self, network: FastSlowMemoryNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            raise ValueError("a memory network answers within episodes; expected (x, y, y) to evaluate on, got (x, y)")
        output = self.network(x, y)
        return output.mT if self.network.task == "classification" else output


def episode_loss(net: FastSlowMemoryNetwork, output: Tensor, target: Tensor) -> Tensor:
    """The mean loss of all steps.

    Args:
        net: network whose task decides.
        output: `[B, T, out]`.
        target: `[B, T, out]`, as `FastSlowMemoryNetwork.targets` gives.
    """
    if net.task == "regression":
        return F.mse_loss(output, target)
    return F.cross_entropy(output.flatten(0, 1), target.flatten(0, 1))


@torch.no_grad()
def true_gradients(net: FastSlowMemoryNetwork, trace: Trace) -> tuple[Tensor, Tensor]:
    """The gradients of every step's loss by that step's query and hidden layer, in closed form.

    $$\\delta_p = (W_2 + F_2)^\\top \\varepsilon \\odot 1[p > 0], \\qquad \\delta_m = (W_1 + F_1)_m^\\top \\delta_p, \\qquad
      \\delta_q = \\tfrac{\\beta}{\\sqrt k}\\, M^\\top (\\mathrm{diag}(a) - a a^\\top)\\, M \\delta_m,$$

    the loss being half the squared error, or the cross-entropy, of one example.

    Args:
        net: network with a fast path.
        trace: trace of its `trace`.

    Returns:
        `[B, T, k]` and `[B, T, h]`.
    """
    hidden, readout = net.hidden_layer, net.readout
    assert isinstance(hidden, PlasticLinear)
    assert isinstance(readout, PlasticLinear)
    steps, k, h = trace.error.shape[1], net.memory.width, net.hidden
    deltas = trace.signals[..., k : k + h]
    fast = (trace.error @ trace.correction.mT * readout.kernel(steps)) @ trace.hidden
    before = (trace.error @ readout.weight + fast) * (trace.hidden > 0)
    read = before @ hidden.weight[:, h:] + (before @ deltas.mT * hidden.kernel(steps)) @ trace.read
    attended = (trace.memory @ read.unsqueeze(3)).squeeze(3)
    attended = trace.attention * (attended - (trace.attention * attended).sum(2, keepdim=True))
    query = (attended.unsqueeze(2) @ trace.memory).squeeze(2) * (net.memory.sharpness / math.sqrt(k))
    return query, before


def _half_summed(net: FastSlowMemoryNetwork, output: Tensor, target: Tensor) -> Tensor:
    """The loss of one step, summed: its gradients are those of single examples, the error at the output."""
    if net.task == "regression":
        return F.mse_loss(output, target, reduction="sum") / 2
    return F.cross_entropy(output, target, reduction="sum")


def _followed(
    net: FastSlowMemoryNetwork, state: FastState, context: Context, target: Tensor, deltas: Sequence[Tensor]
) -> Tensor:
    """A term whose gradient by every controller's output is its synthetic gradient, and that ends there."""
    code, read = context.code, context.joint[:, net.hidden :].detach()
    inputs = (code, torch.cat((code, read), 1), context.spikes.detach(), torch.cat((code, target), 1))
    layers = (
        (net.read, state.read),
        (net.hidden_layer, state.hidden),
        (net.readout, state.readout),
        (net.write, state.write),
    )
    outputs = [layer(x, fast) for (layer, fast), x in zip(layers, inputs, strict=True)]
    return torch.stack([(d.detach() * o).sum(1).mean() for d, o in zip(deltas, outputs, strict=True)]).sum()


def _regress(
    synthetic: Sequence[Tensor], true: Sequence[Tensor], steps: int, backward: Callable[[Tensor], None]
) -> Tensor:
    gap = SyntheticGradient.loss(torch.cat(tuple(synthetic), 1), torch.cat(tuple(true), 1))
    if gap.requires_grad:  # a frozen feedback path has nothing to learn
        backward(gap / steps)
    return gap.detach()
