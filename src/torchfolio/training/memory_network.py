"""A memory network whose controllers learn while it is used, by synthetic gradients on a feedback path.

Tharindu Fernando, Simon Denman, Sridha Sridharan, Clinton Fookes, "Fast & Slow Learning: Incorporating Synthetic
Gradients in Neural Memory Controllers", 2020, https://arxiv.org/abs/2011.05438.

This is our reconstruction: the authors published no code, and the abstract fixes the ingredients but not their form.
There are an external memory with controllers that read, answer and write; fast weights in every controller; a feedback
path that turns errors and labels into gradients, and can be shared by several networks. Sizes and constants are ours.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, finite, one_of, whole
from torchfolio.training.external_memory import ExternalMemory
from torchfolio.training.fast_state import Context, FastState, Learned, Trace, targets
from torchfolio.training.plastic import PlasticLinear
from torchfolio.training.synthetic_gradients import FeedbackPath

__all__ = ["FastSlowMemoryNetwork", "FastState", "Trace"]


class FastSlowMemoryNetwork(nn.Module):
    """A memory network with slow weights, trained over episodes, and fast ones that move within each.

    At a step it answers from $x_t$, then sees $y_t$. With $c = e(x_t)$, fast matrices $F$ in every controller:

    $$q = W_r c + F_r^\\top c, \\quad m = \\mathrm{read}(M, q), \\quad p = W_1 [c; m] + F_1^\\top [c; m], \\quad
      s = \\mathrm{relu}(p), \\quad \\hat y = W_2 s + F_2^\\top s,$$

    and after $y_t$, with the error $\\varepsilon = \\hat y - y$ (softmax less one-hot for classes) and $o = W_w [c; y] +
    F_w^\\top [c; y]$, which gives value, erasure and place of what is written:

    $$(\\hat\\delta_q, \\hat\\delta_p, \\hat\\delta_o) = G(q, s, o, \\varepsilon, y), \\qquad
      F \\leftarrow \\lambda F - \\tfrac{\\alpha}{n}\\, \\mathrm{input} \\otimes \\hat\\delta, \\qquad M \\leftarrow
      \\mathrm{write}(M, o),$$

    $\\hat\\delta_p$ cut where $p \\le 0$. Nothing goes backward, so `step` and `observe` learn under `torch.no_grad` too.
    `forward` runs whole episodes: what does not wait for the step before is computed at once, and fast matrices are
    never built but replaced by attention over the episode's past, which is faster while T is below the width.

    Args:
        encoder: module from inputs `[N, ...]` to codes `[N, hidden]`.
        out_dim: width of targets, or number of classes.
        task: `"regression"` (squared error) or `"classification"` (cross-entropy).
        slots: rows of the memory S.
        width: width of a row k.
        hidden: width h of codes and of the hidden layer.
        fast: whether there is a fast path; without it the memory alone adapts.
        feedback: feedback path that another network uses already; a new one by default.
        lambda_sg: weight $\\ge 0$ of the regression of synthetic on true gradients in slow training.

    Shapes:
        x `[B, T, ...]`, y `[B, T]` labels (int64), or `[B, T, out]` (`[B, T]` for one) in floating point; outputs
        `[B, T, out]`, the t-th of which depends on $x_1, …, x_t$ and $y_1, …, y_{t-1}$.

    Raises:
        ValueError: on settings out of range, a feedback path of other sizes, codes of another width, labels out of
            range, empty episodes, or NaN.
        TypeError: if labels are not whole numbers, or targets of a regression not in floating point.

    Note:
        An encoder that mixes its batch (batch norm in training mode) sees later inputs of an episode with the earlier.

    Example:
        >>> net = FastSlowMemoryNetwork(nn.Sequential(nn.Linear(1, 40), nn.ReLU()), 1)
        >>> state = net.init_state(1)
        >>> for x, y in stream:
        ...     prediction, context = net.step(state, x)
        ...     state = net.observe(state, context, y)

    Reference:
        Fernando et al., 2020, abstract; Munkhdalai and Yu, 2017, for the memory; Jaderberg et al., 2017, for the
        regression.
    """

    def __init__(
        self,
        encoder: nn.Module,
        out_dim: int,
        *,
        task: Literal["regression", "classification"] = "regression",
        slots: int = 16,
        width: int = 20,
        hidden: int = 40,
        fast: bool = True,
        feedback: FeedbackPath | None = None,
        lambda_sg: float = 0.1,
    ) -> None:
        super().__init__()
        self.out_dim, self.hidden = whole("out_dim", out_dim, 1), whole("hidden", hidden, 1)
        self.task, self.fast = one_of("task", task, ("regression", "classification")), bool(fast)
        self.lambda_sg = float(at_least("lambda_sg", lambda_sg, 0))
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"expected a module as encoder, got {type(encoder).__name__}")
        self.encoder, self.memory = encoder, ExternalMemory(slots, width)

        def layer(inputs: int, outputs: int, scale: float) -> nn.Linear:
            return PlasticLinear(inputs, outputs, scale=scale) if fast else nn.Linear(inputs, outputs)

        self.read = layer(hidden, width, 8.0)
        self.hidden_layer = layer(hidden + width, hidden, 8.0)
        self.readout = layer(hidden, out_dim, 1.0)
        self.write = layer(hidden + out_dim, 3 * width, 8.0)
        sizes = (width, hidden, 3 * width)
        if not fast and feedback is not None:
            raise ValueError("a network without a fast path uses no feedback; expected feedback=None, got one")
        if feedback is not None and (feedback.sizes, feedback.out_dim) != (sizes, out_dim):
            raise ValueError(
                f"expected a feedback path for controllers of widths {sizes} and {out_dim} outputs, got one for "
                f"{feedback.sizes} and {feedback.out_dim}; networks that share it need equal slots' width, hidden, out_dim"
            )
        self.feedback = (feedback or FeedbackPath(sizes, out_dim)) if fast else None

    # One step at a time

    def init_state(self, batch_size: int = 1) -> FastState:
        """The state before the first step of so many sequences."""
        memory = self.memory.init_state(whole("batch_size", batch_size, 1))
        names = {"read": self.read, "hidden": self.hidden_layer, "readout": self.readout, "write": self.write}
        plastic = {n: m.init_state(batch_size) for n, m in names.items() if isinstance(m, PlasticLinear)}
        return FastState(memory, **plastic)

    def step(self, state: FastState, x: Tensor) -> tuple[Tensor, Context]:
        """Answer one input of every sequence.

        Args:
            state: state of the sequences.
            x: inputs `[B, ...]`.

        Returns:
            Outputs `[B, out]`, and what `observe` needs.
        """
        if len(x) != len(state.memory):
            raise ValueError(f"expected an input for each of {len(state.memory)} sequences of the state, got {len(x)}")
        code = self._encode(finite("x", x))
        query = _apply(self.read, code, state.read)
        attention = self.memory.attend(state.memory, query.unsqueeze(1))
        joint = torch.cat((code, (attention @ state.memory).squeeze(1)), 1)
        before = _apply(self.hidden_layer, joint, state.hidden)
        spikes = before.relu()
        output = _apply(self.readout, spikes, state.readout)
        return output, Context(code, query, joint, before, spikes, output)

    def observe(self, state: FastState, context: Context, y: Tensor) -> FastState:
        """Learn from the targets of a step: fast weights by synthetic gradients, then the memory.

        Args:
            state: state that `step` was given.
            context: context that `step` returned.
            y: labels `[B]`, or targets `[B, out]` (`[B]` for one).

        Returns:
            The next state.
        """
        return self.learned(state, context, self.targets(y.unsqueeze(1), len(context.output))[:, 0]).state

    def learned(self, state: FastState, context: Context, target: Tensor) -> Learned:
        """`observe` of checked targets, with what it went through."""
        written = _apply(self.write, seen := torch.cat((context.code, target), 1), state.write)
        if self.feedback is None:
            return Learned(FastState(self.rewritten(state.memory, written)), seen, written)
        signals = self.signals(context.query, context.spikes, written, context.output, target)
        ahead, middle, after, correction = signals
        moved = {
            name: layer.update(getattr(state, name), inputs, delta)  # pyright: ignore
            for name, layer, inputs, delta in (
                ("read", self.read, context.code, ahead),
                ("hidden", self.hidden_layer, context.joint, middle),
                ("readout", self.readout, context.spikes, correction),
                ("write", self.write, seen, after),
            )
        }
        return Learned(FastState(self.rewritten(state.memory, written), **moved), seen, written, signals)

    def error(self, output: Tensor, target: Tensor) -> Tensor:
        """$\\varepsilon$, the gradient of an example's loss by the output."""
        return (output.softmax(-1) if self.task == "classification" else output) - target

    def signals(
        self, query: Tensor, spikes: Tensor, written: Tensor, output: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Synthetic gradients of query, hidden layer (before the ReLU), write controller and read-out."""
        assert self.feedback is not None
        signal, correction = self.feedback((query, spikes, written), output, self.error(output, target), target)
        ahead, middle, after = signal.split(self.feedback.sizes, 1)
        return ahead, middle * (spikes > 0), after, correction

    def rewritten(self, memory: Tensor, written: Tensor, attention: Tensor | None = None) -> Tensor:
        """The memory after the write controller's output `[B, 3k]`: value, erasure, and query of the place."""
        value, erase, query = written.chunk(3, 1)
        if attention is None:
            attention = self.memory.attend(memory, query.unsqueeze(1)).squeeze(1)
        return self.memory.write(memory, attention, value.tanh(), erase.sigmoid())

    def _encode(self, x: Tensor) -> Tensor:
        code = self.encoder(x)
        if not isinstance(code, Tensor):
            raise TypeError(f"expected codes [N, {self.hidden}] of the encoder, got {type(code).__name__}")
        if code.dim() != 2 or code.shape[1] != self.hidden:
            raise ValueError(f"expected codes [N, {self.hidden}] of the encoder, got shape {tuple(code.shape)}")
        return code

    def targets(self, y: Tensor, batch_size: int) -> Tensor:
        """Targets `[B, T, out]` in floating point, one-hot for classes; checked."""
        return targets(y, self.task, self.out_dim, batch_size).to(self.readout.weight.dtype)

    # Whole episodes

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The outputs of whole episodes, the t-th before $y_t$ is seen."""
        return self.trace(x, y).output

    def trace(self, x: Tensor, y: Tensor) -> Trace:
        """Run whole episodes from fresh states, fast weights as attention over the past."""
        if x.dim() < 2 or y.dim() < 2 or x.shape[:2] != y.shape[:2] or not x.shape[0] * x.shape[1]:
            raise ValueError(
                f"expected episodes x [B, T, ...] and y [B, T], T >= 1, got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        finite("x", x)
        batch, steps = x.shape[:2]
        target = self.targets(y, batch)
        code = self._encode(x.flatten(0, 1)).unflatten(0, (batch, steps))
        return _Episode(self, code, target).run()


class _Episode:
    """One run of `FastSlowMemoryNetwork.trace`: what no step waits for first, then step after step.

    Sequences are cut into steps `[B, 1, ...]` once: a slice at every step would cost a backward over all of them.
    """

    def __init__(self, net: FastSlowMemoryNetwork, code: Tensor, target: Tensor) -> None:
        self.net, self.target, self.steps = net, target, code.shape[1]
        k, h, seen = net.memory.width, net.hidden, torch.cat((code, target), 2)
        self.widths = (k, h, 3 * k, h, k, net.out_dim)
        self.asked, self.written = _slow(net.read, code).split(1, 1), _slow(net.write, seen).split(1, 1)
        weight, self.weight_m = net.hidden_layer.weight.split((h, k), 1)
        self.before = F.linear(code, weight, net.hidden_layer.bias).unbind(1)
        self.past: Tensor | None = None  # signals, s, m and corrections of the steps until now `[B, t, ...]`
        if net.fast:
            kernels = [layer.kernel(self.steps) for layer in (net.read, net.write, net.hidden_layer, net.readout)]  # pyright: ignore
            gram = code @ code.mT
            self.recall_q, self.recall_p = ((gram * kernels[k]).split(1, 1) for k in (0, 2))
            self.recall_o = (seen @ seen.mT * kernels[1]).split(1, 1)
            self.kernel_p, self.kernel_y = (kernels[k].split(1, 0) for k in (2, 3))

    def run(self) -> Trace:
        net, rows = self.net, []
        memory = net.memory.init_state(len(self.target))
        for t, target in enumerate(self.target.unbind(1)):
            past = None if self.past is None else self.past.split(self.widths, 2)
            query, written = self.asked[t], self.written[t]
            if past is not None:
                query = torch.baddbmm(query, self.recall_q[t][:, :, :t], past[0])
                written = torch.baddbmm(written, self.recall_o[t][:, :, :t], past[2])
            both = torch.cat((query, written[:, :, -net.memory.width :]), 1)
            asking, writing = net.memory.attend(memory, both).split(1, 1)
            read = torch.bmm(asking, memory)
            spikes, output = self._answered(t, read, past)
            query, written, read = query.squeeze(1), written.squeeze(1), read.squeeze(1)
            row = [output, spikes, read, memory, asking.squeeze(1)]
            if net.fast:
                signals = net.signals(query, spikes, written, output, target)
                new = torch.cat((*signals[:3], spikes, read, signals[3]), 1).unsqueeze(1)
                self.past = new if self.past is None else torch.cat((self.past, new), 1)
            rows.append(row)
            if t + 1 < self.steps:
                memory = net.rewritten(memory, written, writing.squeeze(1))
        output, hidden, read, memories, attention = (torch.stack(part, 1) for part in zip(*rows, strict=True))
        window = self.past if self.past is not None else output[..., :0]
        signals, correction = window[..., : sum(self.widths[:3])], window[..., -net.out_dim :]
        return Trace(output, net.error(output, self.target), signals, correction, hidden, read, memories, attention)

    def _answered(self, t: int, read: Tensor, past: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """Spikes and output of a step."""
        readout = self.net.readout
        before = torch.addmm(self.before[t], read.squeeze(1), self.weight_m.mT)
        if past is None:
            return (spikes := before.relu()), _slow(readout, spikes)
        _, deltas, _, hidden, reads, corrections = past
        recall = torch.addcmul(self.recall_p[t][:, :, :t], torch.bmm(read, reads.mT), self.kernel_p[t][:, :t])
        spikes = torch.baddbmm(before.unsqueeze(1), recall, deltas).relu()
        recall = torch.bmm(spikes, hidden.mT) * self.kernel_y[t][:, :t]
        spikes = spikes.squeeze(1)
        output = torch.baddbmm(_slow(readout, spikes).unsqueeze(1), recall, corrections)
        return spikes, output.squeeze(1)


def _slow(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def _apply(layer: nn.Linear, x: Tensor, fast: Tensor | None) -> Tensor:
    return layer(x, fast) if fast is not None else layer(x)
