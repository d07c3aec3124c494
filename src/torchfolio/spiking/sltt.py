"""SLTT: training spiking networks at the memory of a single time step.

Qingyan Meng, Mingqing Xiao, Shen Yan, Yisen Wang, Zhouchen Lin, Zhi-Quan Luo, "Towards Memory- and Time-Efficient
Backpropagation for Training Spiking Neural Networks", ICCV 2023, https://arxiv.org/abs/2302.14311.

Backpropagation through time keeps the graph of all T steps. Where neurons leak fast, hardly any gradient flows from
step to step: a route of lag $k$ carries at most $\\lambda^k$ with $\\lambda = 1 - 1/\\tau$. SLTT cuts those routes.
Each step then has a gradient of its own, which is taken at once, and its graph is dropped. SLTT-K goes backward at
K random steps only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio import measure
from torchfolio.checks import whole
from torchfolio.engine import seeded
from torchfolio.spiking.bptt import BPTT, Loss, SequenceRule
from torchfolio.spiking.encoders import Encode
from torchfolio.spiking.losses import SLTTLoss
from torchfolio.spiking.neurons import LIF
from torchfolio.spiking.state import cut, state_modules

__all__ = ["BPTT", "SLTT", "SLTTLoss", "gradient_agreement"]


class SLTT(SequenceRule):
    """Spatial learning through time: gradients through layers, none through time.

    With $o[t]$ the outputs, $u^l[t]$ the potentials and $s^l[t]$ the spikes of layer $l$,

    $$e^L[t] = \\frac{1}{T} \\frac{\\partial \\ell(o[t], y)}{\\partial o[t]}, \\qquad
      e^l[t] = \\bigl(W^{l+1\\top} e^{l+1}[t]\\bigr) \\odot \\sigma'(u^l[t] - V_{th}), \\qquad
      \\nabla W^l = \\sum_t e^l[t]\\, s^{l-1}[t]^\\top .$$

    It is the gradient of `BPTT` less every route from one step to another: equal at T = 1 or $\\tau$ = 1, and for the
    read-out layer always. Memory is that of one step, whatever T. The loss must be a mean of losses of single
    steps: with a loss of the mean output nothing could be sent back before the sequence ends.

    Args:
        loss: criterion $\\ell$ of one step's output and the target, a mean over the batch; `None` takes `SLTTLoss()`.
        timesteps: $T \\ge 1$.
        k: SLTT-K: go backward at so many random steps of each sequence, forward alone at the others; `None` takes
            all T.
        rescale: weigh the K steps by $1/K$, which makes the gradient unbiased. By default they keep $1/T$, as in the
            released code, and the expected gradient is $K/T$ of SLTT's: raise the learning rate then.
        encode: `"repeat"`, `"poisson"`, `"latency"`, `"frames"` (for data sets of recordings `[B, T, ...]`), a callable
            `(x, T) -> [T, B, ...]`, or `None` for batches that are `[T, B, ...]`.
        generator: source of the random steps (on the CPU) and of `encode="poisson"`; torch's global one by default.

    Shapes:
        batches (x, y), x of `[B, ...]` (or `[T, B, ...]` with `encode=None`), y `[B]` labels; the model maps one
        step `[B, ...]` to `[B, C]`.

    Raises:
        ValueError: if `k` is not in 1..T; if the network has no spiking neuron; if a sequence is not T long; if
            the loss of one step is not a scalar that requires a gradient.

    Note:
        `prepare` sets `detach_state` on every neuron of the network and `release` puts it back. Modules of your own
        that carry state (lateral connections) must be `Stateful` or have `v` and `reset()`, or "backward through
        the graph a second time" will be the answer. Clipping and the optimizer's step come after all T steps. Batch
        norm sees T batches a step, also at steps without backward.

    Example:
        >>> net = to_spiking(vgg11(), partial(LIF, tau=1.1), average_pool=True)
        >>> rule = SLTT(timesteps=6)
        >>> fit(net, train, val=val, rule=rule, epochs=100)
        >>> labels = rule.predictor(net)(x).argmax(-1)

    Reference:
        Meng et al., ICCV 2023, sections 4.2 and 4.3; details as in the released code.
    """

    detach = True

    def __init__(
        self,
        loss: Loss | None = None,
        *,
        timesteps: int,
        k: int | None = None,
        rescale: bool = False,
        encode: Encode = "repeat",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(loss, timesteps=timesteps, encode=encode, generator=generator)
        self.k = None if k is None else whole("k", k, 1, timesteps)
        self.rescale = rescale

    def draw_steps(self) -> set[int]:
        """The steps of one sequence to go backward at."""
        if self.k is None or self.k == self.timesteps:
            return set(range(self.timesteps))
        return set(torch.randperm(self.timesteps, generator=self.generator)[: self.k].tolist())

    def learn(
        self, model: nn.Module, x_seq: Tensor, y: Tensor, backward: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor, int]:
        chosen = self.draw_steps()
        weight = 1 / (len(chosen) if self.rescale else self.timesteps)
        others = [m for m in state_modules(model) if not isinstance(m, LIF)]
        losses, total = [], None
        for t, x in enumerate(x_seq):
            for module in others:  # they have no detach_state
                cut(module)
            if t in chosen:
                output = model(x)
                loss = self.step_loss(output, y)
                backward(loss * weight)
                losses.append(loss.detach())
            else:
                with torch.no_grad():
                    output = model(x)
            output = output.detach()
            total = output if total is None else total + output
        assert total is not None
        return torch.stack(losses).mean(), total, len(chosen)


def gradient_agreement(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    timesteps: int,
    loss: Loss | None = None,
    encode: Encode = "repeat",
    seed: int = 0,
) -> dict[str, object]:
    """How far the gradient of SLTT agrees with that of BPTT on a batch: whether a network suits the rule.

    The model is copied; its gradients, running statistics and state stay as they are.

    Args:
        model: single-step spiking network.
        x: inputs, see `SLTT`.
        y: targets.
        timesteps: T.
        loss: loss, as in `SLTT`.
        encode: encoding of inputs as sequences, as in `SLTT`.
        seed: seed of dropout and random coding, the same for both.

    Returns:
        `cosine`, `sltt_norm`, `bptt_norm` of all parameters together, and `parameters`, the same three by name.
        A cosine is NaN where one of the gradients is zero.

    Example:
        >>> gradient_agreement(net, x, y, timesteps=6)["cosine"]
    """
    found = []
    for rule in (SLTT(loss, timesteps=timesteps, encode=encode), BPTT(loss, timesteps=timesteps, encode=encode)):
        copied = copy.deepcopy(model)
        copied.zero_grad(set_to_none=True)
        rule.prepare(copied, (x, y))
        with seeded(seed):
            rule.step((x, y), Tensor.backward)
        found.append(measure.gradient_dict(copied))
    sltt, bptt = found
    agreement = measure.gradient_agreement(sltt, bptt)
    cosines = agreement.by_parameter["cosine"].to_dict()
    by_name = {
        name: {"cosine": cosines[name], "sltt_norm": float(sltt[name].norm()), "bptt_norm": float(bptt[name].norm())}
        for name in sltt
    }
    return {
        "cosine": agreement.cosine,
        "sltt_norm": sum(p["sltt_norm"] ** 2 for p in by_name.values()) ** 0.5,
        "bptt_norm": sum(p["bptt_norm"] ** 2 for p in by_name.values()) ** 0.5,
        "parameters": by_name,
    }
