"""Which training samples look poisoned: those that a training which ascends on easy samples has learned nonetheless."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from torchfolio import checks
from torchfolio.engine.fit import fit
from torchfolio.engine.modes import seeded
from torchfolio.engine.rules import Backprop
from torchfolio.measure import outputs, untouched
from torchfolio.models.device import device_of
from torchfolio.shown import Shown

__all__ = ["Isolator", "LGAIsolator", "PrecomputedIsolator", "cosine_tail", "flooding"]

Pair = tuple[Tensor, Tensor]
Factory = Callable[[], nn.Module]


def flooding(loss: Tensor, gamma: float) -> Tensor:
    """$|L - \\gamma| + \\gamma$: descends above $\\gamma$ and ascends below, where only samples of unusual ease go.

    Its gradient is that of $\\operatorname{sign}(L - \\gamma) L$, local gradient ascent (LGA) of Li et al., "Anti-Backdoor
    Learning", NeurIPS 2021.
    """
    return (loss - gamma).abs() + gamma


def cosine_tail(epochs: int, tail: int) -> Callable[[int], float]:
    """Factor on the learning rate at epoch $e$, $\\frac12 (1 + \\cos \\frac{\\pi e}{E + \\text{tail}})$, which does not reach 0."""
    return partial(_cosine_tail, length=epochs + tail)


def _cosine_tail(epoch: int, length: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * epoch / length))


class Isolator(Protocol):
    """Says how suspicious training samples are: from (data, seed) to scores `[N]`, or a mask `[N]`."""

    def __call__(self, data: Pair, *, seed: int) -> Tensor: ...


class LGAIsolator(Shown):
    """Isolates samples of least loss in a short training with local gradient ascent.

    A network is trained on the batch loss $|L - \\gamma| + \\gamma$; what it has learned nonetheless is easy, as
    triggers are. A sample is the more suspicious the lower its cross-entropy $\\ell$.

    When to measure is the difficulty. Around $\\gamma$ the training swings between descent and ascent, the lowest losses
    belong to the poison at one moment and to an easy class at another, and clean samples follow sooner or later.
    Three remedies, none of which knows what is poisoned:

    - `choose`: the losses are measured `looks` times an epoch, and those of one moment count. `"log_gap"` takes that
      with the largest difference between the mean of $\\log \\ell$ over the `ratio` of least loss and over as many that
      follow; `"gap"` does so with $\\ell$ itself; `"last"` takes the end. Losses of clean samples spread by as much as
      they are large, those of the poison fall by orders of magnitude, so their logarithms tell them apart and
      their differences do not.
    - `statistics`: with `"batch"` batch norm normalises by random batches of the data; its running averages lag behind
      a training of few steps, and `"running"` measures a network that was never trained.
    - `restarts`: that many trainings of new networks, whose losses are averaged geometrically. An easy class sinks in
      one, the poison in all.

    The authors' form is one training, measured once: `epochs=20, choose="last", statistics="running", restarts=1`.

    Args:
        model_fn: makes a new network, for restarts another each time.
        gamma: $\\gamma$; 0.5.
        epochs: number of epochs of a training; 4. 20 in the authors' code, on CIFAR-10.
        lr: learning rate of SGD with momentum 0.9; 0.1, by `cosine_tail(epochs, 80)`.
        choose: moment whose losses count, `"log_gap"`, `"gap"` or `"last"`.
        looks: measurements an epoch, evenly spaced; 4. The last is at its end.
        statistics: statistics of batch norm when losses are measured, `"batch"` or `"running"`.
        restarts: trainings; 4.
        batch_size: 64.
        weight_decay: 1e-4.
        ratio: $\\mu$ of `choose`.
        device: device of the training.

    Attributes:
        gaps_: values that `choose` goes by (for `"last"` the gap), per restart and look.
        epochs_: chosen moment of every restart, in epochs.

    Raises:
        ValueError: on a setting out of range.

    Reference:
        Li et al., "Anti-Backdoor Learning: Training Clean Models on Poisoned Data", NeurIPS 2021; settings as in the
        authors' code of NAB. `choose`, `looks`, `statistics="batch"` and `restarts` are not in either paper.
    """

    def __init__(
        self,
        model_fn: Factory,
        gamma: float = 0.5,
        epochs: int = 4,
        lr: float = 0.1,
        *,
        choose: Literal["log_gap", "gap", "last"] = "log_gap",
        looks: int = 4,
        statistics: Literal["batch", "running"] = "batch",
        restarts: int = 4,
        batch_size: int = 64,
        weight_decay: float = 1e-4,
        ratio: float = 0.05,
        device: str | torch.device = "auto",
    ) -> None:
        for name, value in {"epochs": epochs, "looks": looks, "restarts": restarts, "batch_size": batch_size}.items():
            checks.whole(name, value, 1)
        checks.positive("lr", lr)
        for name, value in {"gamma": gamma, "weight_decay": weight_decay}.items():
            checks.at_least(name, value, 0)
        checks.between("ratio", ratio, 0, 0.5, inclusive=(False, True))
        checks.one_of("choose", choose, ("log_gap", "gap", "last"))
        checks.one_of("statistics", statistics, ("batch", "running"))
        self.model_fn, self.gamma, self.epochs, self.lr = model_fn, gamma, epochs, lr
        self.choose, self.looks, self.statistics, self.restarts = choose, looks, statistics, restarts
        self.batch_size, self.weight_decay, self.ratio, self.device = batch_size, weight_decay, ratio, device

    def __call__(self, data: Pair, *, seed: int) -> Tensor:
        self.gaps_: list[list[float]] = []
        self.epochs_: list[float] = []
        chosen = [self._restart(data, (seed + 1_000_003 * k) % 2**63) for k in range(self.restarts)]
        # Their geometric mean; of one training these are the losses.
        return -torch.stack(chosen).clamp_min(1e-12).log().mean(0).exp()

    def _restart(self, data: Pair, seed: int) -> Tensor:
        """The losses `[N]` of one training at its chosen moment."""
        drop = len(data[0]) % self.batch_size == 1
        steps = max(1, len(data[0]) // self.batch_size if drop else -(-len(data[0]) // self.batch_size))
        moments = {round(steps * look / self.looks) for look in range(1, self.looks + 1)}
        gaps: list[float] = []
        best = (-math.inf, torch.empty(0), 0.0)

        def look(state: Any) -> None:
            nonlocal best
            step = (state.step - 1) % steps + 1
            # Called at the end of an epoch too, after its last step.
            if state.epoch_end or step not in moments:
                return
            losses = _losses(state.model, data, self.statistics == "batch", self.batch_size, seed)
            gaps.append(_gap(losses, self.ratio, logarithms=self.choose == "log_gap"))
            if self.choose == "last" or gaps[-1] > best[0]:
                best = (gaps[-1], losses, state.step / steps)

        with seeded(seed):
            net = self.model_fn()
        sgd = partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)
        fit(
            net, data, rule=Backprop(partial(_flooded, gamma=self.gamma)), optimizer=sgd,
            scheduler=partial(LambdaLR, lr_lambda=cosine_tail(self.epochs, 80)), schedule="epoch", epochs=self.epochs,
            batch_size=self.batch_size, drop_last=drop, callbacks=[look], seed=seed, device=self.device, progress=False,
        )  # fmt: skip
        self.gaps_.append(gaps)
        self.epochs_.append(best[2])
        return best[1]


def _flooded(output: Tensor, target: Tensor, gamma: float) -> Tensor:
    return flooding(F.cross_entropy(output, target), gamma)


def _losses(net: nn.Module, data: Pair, batch_statistics: bool, batch_size: int, seed: int) -> Tensor:
    """Cross-entropy of every sample `[N]`, in evaluation mode but, if wanted, batch norm by statistics of random batches."""
    x, y = data[0], data[1].cpu()
    if not batch_statistics:
        return F.cross_entropy(outputs(net, x).double(), y, reduction="none")
    device = device_of(net, x)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    losses = torch.empty(len(x), dtype=torch.float64)
    with torch.no_grad(), untouched(net, training=False):
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        # Batches of equal size, as a last small one would have statistics of its own.
        for rows in order.tensor_split(max(1, len(x) // max(256, batch_size))):
            out = net(x[rows.to(x.device)].to(device)).cpu().double()
            losses[rows] = F.cross_entropy(out, y[rows], reduction="none")
    return losses


def _gap(losses: Tensor, ratio: float, logarithms: bool) -> float:
    count = max(1, int(ratio * len(losses)))
    ordered = losses.sort().values
    ordered = ordered.clamp_min(1e-12).log() if logarithms else ordered
    return float(ordered[count : 2 * count].mean() - ordered[:count].mean())


class PrecomputedIsolator(Shown):
    """A mask `[N]` of suspicious samples, or scores `[N]`, from elsewhere."""

    def __init__(self, mask: Tensor | np.ndarray | Sequence[bool] | Sequence[float]) -> None:
        self.mask = torch.as_tensor(mask)
        if not (self.mask.dtype == torch.bool or self.mask.is_floating_point()):
            raise ValueError(
                f"expected a boolean mask or scores of floating point, got {self.mask.dtype}: call .bool() on a mask"
            )

    def __call__(self, data: Pair, *, seed: int) -> Tensor:
        return self.mask
