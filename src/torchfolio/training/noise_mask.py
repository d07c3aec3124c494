"""Noise masks from a policy: pretrain a classifier under masks that a small network draws for every image.

Mehmet Can Yavuz, Yang Yang, "Policy Gradient-Driven Noise Mask", 2024, https://arxiv.org/abs/2406.14568.

Fixed input noise is known to hurt where images of many kinds share one label set. Here a light policy network looks at
each image and draws a multiplicative mask from Beta distributions; classifier and policy are trained together, the
policy by its score function alone. Then the policy is thrown away and the *heated* classifier, the mean of its last
checkpoints, is trained a little more without masks. Nothing changes at inference.

What the paper's text leaves open follows the authors' code; where both leave the reward open there are two objectives,
`Reinforce` and `LogSumExp`, each a few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional as F
from torch.optim import Optimizer

from torchfolio.checks import finite, one_of, positive, whole
from torchfolio.engine import Batch, LearningRule, default_loss
from torchfolio.engine.counting import Counting
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.rules import Loss
from torchfolio.measure import untouched
from torchfolio.shown import Shown
from torchfolio.training.mask_policy import BetaMaskPolicy, default_policy
from torchfolio.training.mask_rendering import render_mask
from torchfolio.training.snapshots import average_checkpoints

__all__ = ["BetaMaskPolicy", "LogSumExp", "NoiseMaskPretraining", "Reinforce", "average_checkpoints", "render_mask"]

EPS = 1e-6  # samples stay this far from 0 and 1
Objective = Callable[[Tensor, Tensor, "Tensor | float"], Tensor]


class Reinforce(Shown):
    """The score-function objective: minimised, the policy's masks lower the expected loss.

    $$\\frac1B \\sum_i \\ell_i + \\frac{s}{B} \\sum_i (\\ell_i - c)\\, \\frac1{g^2} \\sum_j \\log p_{ij},$$

    with $\\ell_i - c$ held constant. The first term reaches the classifier alone, the second the policy alone.

    Args:
        sign: $s$; -1 makes the policy an adversary.

    Raises:
        ValueError: if the sign is neither 1 nor -1.
    """

    def __init__(self, sign: int = 1) -> None:
        self.sign = one_of("sign", sign, (1, -1))

    def __call__(self, losses: Tensor, log_p: Tensor, baseline: Tensor | float) -> Tensor:
        credit = (losses - baseline).detach()
        return losses.mean() + self.sign * (credit * log_p.mean(1)).mean()


class LogSumExp(Shown):
    """The released code's objective, one product through which classifier and policy share a gradient:

    $$\\frac1B \\sum_i \\Bigl[\\log \\sum_j p_{ij}\\Bigr] \\cdot \\frac1B \\sum_i \\ell_i.$$

    The classifier's step is multiplied by the first factor (about $\\log g^2$), which turns it uphill where the factor
    is negative; the policy gets no credit image by image.
    """

    def __call__(self, losses: Tensor, log_p: Tensor, baseline: Tensor | float) -> Tensor:
        return (log_p.logsumexp(1) * losses.mean()).mean()


OBJECTIVES: dict[str, Callable[[], Objective]] = {"reinforce": Reinforce, "lse": LogSumExp}
BASELINES = ("mean", "ema", None)


class NoiseMaskPretraining(LearningRule):
    """Train a classifier under masks that a policy draws, and the policy by how well the classifier does.

    A step: the policy's features once, $m \\sim \\mathrm{Beta}$ without a gradient through the sample, losses
    $\\ell_i$ of the classifier on $x \\odot \\mathrm{mask}(m)$, and one backward pass of the objective. The network is
    evaluated and used without masks. Afterwards train it on by `Backprop` at a small rate: its statistics are those of
    masked inputs until then.

    Args:
        policy: policy, trained in place; by default a small one is made for the shape of the inputs.
        objective: `"reinforce"`, `"lse"` as in the released code, or a function of the losses `[B]`, the log-densities
            `[B, cells]` and the baseline.
        baseline: $c$ of `Reinforce`: `"mean"` of the batch, `"ema"` over batches (decay 0.9), or `None` for 0.
        policy_lr_scale: learning rate of the policy over the classifier's, where `fit` is given `rule.optimizer(…)`; a
            plain optimizer trains both at one rate.
        kernel: width of the masks' blur; see `render_mask`.
        sigma: its deviation.
        loss: criterion with mean reduction; see `Backprop` for the default. It is applied to each example alone.

    Shapes:
        Batches (x, y) with x in floating point: images `[B, C, H, W]` (one mask for all channels) under a grid of two
        sides; rows `[B, F]` or signals `[B, C, L]` under a grid (F,) or (L,), whose cells are the mask.

    Raises:
        ValueError: on settings out of range; in `prepare`, on inputs that do not fit the policy, or a policy that shares
            parameters with the classifier.
        TypeError: in `prepare`, on inputs that are no floating-point numbers, or a policy of another class.

    Example:
        >>> rule, last = NoiseMaskPretraining(), Snapshots(3)
        >>> fit(net, train, rule=rule, optimizer=rule.optimizer(sgd(0.1)), epochs=90, callbacks=[last])
        >>> net.load_state_dict(average_checkpoints(last.states))
        >>> fit(net, train, optimizer=sgd(1e-3), epochs=10)

    Note:
        Every step reports `mask_sd`, the spread of the expected mask over the batch; below 1e-3 the policy has
        collapsed to its base. `log_density` is the mean over images of $\\log \\sum_j p_{ij}$.

    Reference:
        Yavuz, Yang, section 3; the clamps of logits and samples, the baselines and `Reinforce` are this library's.
    """

    def __init__(
        self,
        policy: BetaMaskPolicy | None = None,
        *,
        objective: Literal["reinforce", "lse"] | Objective = "reinforce",
        baseline: Literal["mean", "ema"] | None = "mean",
        policy_lr_scale: float = 0.1,
        kernel: int | None = None,
        sigma: float | None = None,
        loss: Loss | None = None,
    ) -> None:
        if not callable(objective):
            one_of("objective", objective, OBJECTIVES)
        self.policy, self.objective = policy, objective
        self.baseline = one_of("baseline", baseline, BASELINES)
        self.policy_lr_scale = positive("policy_lr_scale", policy_lr_scale)
        if kernel is not None and whole("kernel", kernel, 1) % 2 == 0:
            raise ValueError(f"expected an odd kernel, got {kernel}")
        self.kernel, self.sigma = kernel, None if sigma is None else positive("sigma", sigma)
        self.loss = loss or default_loss
        self._objective: Objective = objective if callable(objective) else OBJECTIVES[objective]()
        self.module: _Pair | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        """Put the policy beside the classifier, after a look at whether it fits the inputs."""
        if len(example) != 2:
            raise ValueError(f"expected batches (x, y), got {len(example)} parts")
        x = example[0]
        if not x.is_floating_point() or x.dim() not in (2, 3, 4):
            raise TypeError(f"expected inputs in floating point with 2 to 4 axes, got {x.dtype}, {tuple(x.shape)}")
        policy = self.policy if self.policy is not None else default_policy(x)
        if not isinstance(policy, BetaMaskPolicy):
            raise TypeError(f"expected a BetaMaskPolicy, got {type(policy).__name__}")
        own = {id(p) for p in model.parameters()}
        if any(id(p) in own for p in policy.parameters()):
            raise ValueError("the policy shares parameters with the classifier; expected networks apart")
        policy = policy.to(x.device, x.dtype)
        with torch.no_grad(), undisturbed(), untouched(policy, training=False):
            try:
                beta = policy(x)
            except (RuntimeError, IndexError) as error:
                raise ValueError(f"the policy cannot take inputs of shape {tuple(x.shape)}: {error}") from error
            self._mask(beta.mean, x, policy)
        self.policy, self.module = policy, _Pair(model, policy.train(model.training))
        return self.module

    def optimizer(self, factory: Callable[..., Optimizer]) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        """A factory for `fit` whose optimizer gives the policy a rate of its own, `policy_lr_scale` times the other."""
        return partial(self._grouped, factory)

    def _grouped(self, factory: Callable[..., Optimizer], parameters: Iterable[nn.Parameter]) -> Optimizer:
        tensors = list(parameters)
        own = {id(p) for p in self._prepared().policy.parameters()}
        rate = factory(tensors).defaults["lr"]
        groups = {False: [p for p in tensors if id(p) not in own], True: [p for p in tensors if id(p) in own]}
        rates = {False: rate, True: rate * self.policy_lr_scale}
        return factory([{"params": groups[key], "lr": rates[key]} for key in groups if groups[key]])

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One batch. `loss` is the mean loss under masks; the other scalars tell what the policy does."""
        pair = self._prepared()
        x, y = batch
        beta = pair.policy(x)
        cells = beta.sample().clamp(EPS, 1 - EPS)
        output, log_p = pair.classifier(x * self._mask(cells, x, pair.policy)), beta.log_prob(cells)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"expected a classifier that gives a tensor, got {type(output).__name__}; wrap it: "
                "torchfolio.models.Logits(model)"
            )
        if (mass := self._mass(y)) is not None and not mass.all():
            masked = mass > 0
            output, y, log_p, mass = output[masked], y[masked], log_p[masked], mass[masked]
        losses = self._losses(output, y)
        losses = losses if mass is None else losses * (mass / mass.mean())
        backward(self._objective(losses, log_p, self._constant(losses.detach())))
        return {"loss": losses.detach().mean(), **_told(beta, log_p.detach(), losses.detach())}

    @torch.no_grad()
    def masks(self, x: Tensor, *, expected: bool = False) -> Tensor:
        """Masks for inputs, drawn or expected: `[B, 1, H, W]` of images, `[B, F]` of rows, `[B, 1, L]` of signals."""
        policy = self._prepared().policy
        with untouched(policy, training=False):
            beta = policy(finite("x", x))
        return self._mask(beta.mean if expected else beta.sample(), x, policy)

    @torch.no_grad()
    def base_mask(self, x: Tensor) -> Tensor:
        """The mask expected of the base alone, for inputs of this shape: one, `[1, …]`."""
        policy = self._prepared().policy
        return self._mask(policy.base_distribution().mean, x[:1], policy)

    def _prepared(self) -> _Pair:
        if self.module is None:
            raise RuntimeError("call prepare(model, example) first")
        return self.module

    def _mask(self, cells: Tensor, x: Tensor, policy: BetaMaskPolicy) -> Tensor:
        cells = cells.to(x.dtype)
        if len(policy.grid) == 2:
            if x.dim() != 4:
                raise ValueError(f"expected images [B, C, H, W] for a grid of {policy.grid}, got {tuple(x.shape)}")
            size = x.shape[-2], x.shape[-1]
            return render_mask(cells.view(-1, *policy.grid), size, kernel=self.kernel, sigma=self.sigma)
        if x.dim() == 4 or x.shape[-1] != policy.grid[0]:
            raise ValueError(f"expected inputs [B, …, {policy.grid[0]}] for a grid of one side, got {tuple(x.shape)}")
        return cells if x.dim() == 2 else cells[:, None]

    def _losses(self, output: Tensor, y: Tensor) -> Tensor:
        """The criterion of every example alone, `[B]`."""
        if self.loss is default_loss and not y.is_floating_point() and output.dim() == 2:
            return F.cross_entropy(output, y, reduction="none")
        return torch.vmap(lambda o, t: self.loss(o[None], t[None]))(output, y)

    def _mass(self, y: Tensor) -> Tensor | None:
        """What every example counts in the criterion's mean: 0 where its labels are passed over; `None` where all are equal."""
        counting = Counting.of(self.loss)
        if y.is_floating_point() or counting == (None, None):
            return None
        counted = torch.ones_like(y, dtype=torch.bool) if counting.ignored is None else y != counting.ignored
        if counting.weight is None:
            return counted.flatten(1).float().mean(1) if y.dim() > 1 else counted.float()
        mass = counting.weight.to(y.device)[y * counted] * counted
        return mass.flatten(1).mean(1) if y.dim() > 1 else mass

    def _constant(self, losses: Tensor) -> Tensor | float:
        """The baseline $c$, before the batch changes it."""
        if self.baseline is None:
            return 0.0
        mean = losses.mean()
        if self.baseline == "mean":
            return mean
        running = self._prepared().running
        before = torch.where(running.isnan(), mean, running)
        running.copy_(before.lerp(mean, 0.1))
        return before


class _Pair(nn.Module):
    """What is trained: the classifier, the policy, and the running baseline."""

    running: Tensor

    def __init__(self, classifier: nn.Module, policy: BetaMaskPolicy) -> None:
        super().__init__()
        self.classifier, self.policy = classifier, policy
        self.register_buffer("running", policy.base.new_full((), math.nan))


@torch.no_grad()
def _told(beta: Beta, log_p: Tensor, losses: Tensor) -> dict[str, Tensor]:
    """Diagnostics of one step."""
    strength = beta.concentration1 + beta.concentration0
    mean = beta.mean
    a, b = log_p.mean(1), losses.to(log_p)
    a, b = a - a.mean(), b - b.mean()
    return {
        "log_density": log_p.logsumexp(1).mean(),
        "concentration": strength.mean(),
        "concentration_max": strength.max(),
        "mask_mean": mean.mean(),
        "mask_sd": mean.std(0, correction=0).mean(),
        "correlation": (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12),
    }
