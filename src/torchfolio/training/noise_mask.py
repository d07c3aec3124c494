"""Noise masks from a policy: pretrain a classifier under masks that a small network draws for every image.

Mehmet Can Yavuz, Yang Yang, "Policy Gradient-Driven Noise Mask", 2024, https://arxiv.org/abs/2406.14568.

Fixed input noise is known to hurt where images of many kinds share one label set. Here a light policy network looks at
each image and draws a multiplicative mask from Beta distributions; classifier and policy are trained together, the
policy by its score function alone. Then the policy is thrown away and the *heated* classifier, the mean of its last
checkpoints, is trained a little more without masks. Nothing changes at inference.

What the paper's text leaves open follows the authors' code; where both leave the reward open there are two objectives,
`Reinforce` and `LogSumExp`, each a few lines. Policy, objectives and rule make this file longer than most.
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

from torchfolio.checks import between, one_of, positive, whole
from torchfolio.engine import Batch, LearningRule, default_loss
from torchfolio.engine.counting import IGNORED
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.rules import Loss
from torchfolio.measure import untouched
from torchfolio.training.mask_rendering import render_mask
from torchfolio.training.snapshots import average_checkpoints

__all__ = ["BetaMaskPolicy", "LogSumExp", "NoiseMaskPretraining", "Reinforce", "average_checkpoints", "render_mask"]

LOGITS = (-4.0, 6.0)  # concentrations beyond them give samples of 0 and 1, and infinite densities
EPS = 1e-6  # samples stay this far from 0 and 1
Objective = Callable[[Tensor, Tensor, "Tensor | float"], Tensor]


class BetaMaskPolicy(nn.Module):
    """A network from an example to a Beta distribution for each cell of its mask.

    $$A = \\mu\\,\\bar a + (1 - \\mu)\\,a(e(x)), \\qquad B = \\mu\\,\\bar b + (1 - \\mu)\\,b(e(x)), \\qquad
      m \\sim \\mathrm{Beta}(e^A, e^B),$$

    with features $e$, two heads $a, b$ and running base logits $\\bar a, \\bar b$. In training mode the base then moves,
    without a gradient: $\\bar a \\leftarrow \\rho\\,\\bar a + (1 - \\rho)\\,\\mathrm{mean}_{\\text{batch}}\\, a(e(x))$. The
    features are computed once a call.

    Args:
        features: network from the inputs to features `[B, feature_dim]`.
        feature_dim: width of the features.
        grid: cells of the mask: side of a square grid, or (rows, columns); for inputs without a picture (rows of a
            table, signals `[B, C, L]`) the length of their last axis as a tuple of one.
        hidden_layers: linear layers with batch norm and ReLU in each head, before the last.
        mix: share $\\mu$ of the base in the logits, in [0, 1].
        ema: decay $\\rho$ of the base, in [0, 1].

    Shapes:
        Inputs as `features` takes them; the distribution's are `[B, cells]`.

    Raises:
        ValueError: on settings out of range; in the call, if the features have another shape, or on one example in
            training mode, of which batch norm knows no variance.

    Reference:
        Section 3 of the paper; sizes and decays are the released code's.
    """

    base: Tensor

    def __init__(
        self,
        features: nn.Module,
        feature_dim: int,
        grid: int | tuple[int, ...],
        *,
        hidden_layers: int = 2,
        mix: float = 0.9,
        ema: float = 0.99,
    ) -> None:
        super().__init__()
        sides = (grid, grid) if isinstance(grid, int) else tuple(grid)
        if len(sides) not in (1, 2):
            raise ValueError(f"expected a grid of one or two sides, got {grid!r}")
        self.grid = tuple(whole("a side of the grid", side, 1) for side in sides)
        self.features, self.feature_dim = features, whole("feature_dim", feature_dim, 1)
        self.mix, self.ema = between("mix", mix, 0, 1), between("ema", ema, 0, 1)
        whole("hidden_layers", hidden_layers, 0)
        cells = math.prod(self.grid)
        self.a = _head(feature_dim, cells, hidden_layers)
        self.b = _head(feature_dim, cells, hidden_layers)
        self.register_buffer("base", torch.rand(2, cells))

    def forward(self, x: Tensor) -> Beta:
        """The distribution of the cells of every example's mask."""
        features = self.features(x)
        if features.shape != (len(x), self.feature_dim):
            raise ValueError(
                f"expected features of shape {(len(x), self.feature_dim)}, got {tuple(features.shape)}; pool or "
                "flatten them, or give their feature_dim"
            )
        if self.training and len(x) < 2 and any(isinstance(m, nn.BatchNorm1d) for m in self.a):
            raise ValueError("expected a batch of at least two examples, as the heads have batch norm, got 1")
        logits = torch.stack([self.a(features), self.b(features)], dim=1)
        # Densities and their gradients need single precision whatever the network has.
        logits = logits if logits.dtype == torch.float64 else logits.float()
        mixed = self.mix * self.base.to(logits) + (1 - self.mix) * logits
        if self.training:
            with torch.no_grad():
                self.base.lerp_(logits.mean(0).to(self.base), 1 - self.ema)
        return _beta(mixed)

    def base_distribution(self) -> Beta:
        """What the policy would draw of the base alone, `[1, cells]`."""
        return _beta(self.base[None] if self.base.dtype == torch.float64 else self.base[None].float())

    def extra_repr(self) -> str:
        return f"grid={self.grid}, mix={self.mix}, ema={self.ema}"


def _head(width: int, cells: int, hidden: int) -> nn.Sequential:
    layers = [part for _ in range(hidden) for part in (nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, cells))


def _beta(logits: Tensor) -> Beta:
    a, b = logits.clamp(*LOGITS).exp().unbind(1)
    return Beta(a, b, validate_args=False)


class Reinforce:
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


class LogSumExp:
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
        policy: the policy, trained in place; by default a small one is made for the shape of the inputs.
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
        TypeError: in `prepare`, on inputs that are no floating-point numbers.

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
        own = {id(p) for p in model.parameters()}
        if any(id(p) in own for p in policy.parameters()):
            raise ValueError("the policy shares parameters with the classifier; expected networks apart")
        policy = policy.to(x.device, x.dtype)
        with torch.no_grad(), undisturbed(), untouched(policy, training=False):
            self._mask(policy(x).mean, x, policy)
        self.policy, self.module = policy, _Pair(model, policy.train(model.training))
        return self.module

    def optimizer(self, factory: Callable[..., Optimizer]) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
        """A factory for `fit` whose optimizer gives the policy a rate of its own, `policy_lr_scale` times the other."""
        return partial(self._grouped, factory)

    def _grouped(self, factory: Callable[..., Optimizer], parameters: Iterable[nn.Parameter]) -> Optimizer:
        given = list(parameters)
        own = {id(p) for p in self._prepared().policy.parameters()}
        rate = factory(given).defaults["lr"]
        groups = {False: [p for p in given if id(p) not in own], True: [p for p in given if id(p) in own]}
        rates = {False: rate, True: rate * self.policy_lr_scale}
        return factory([{"params": groups[key], "lr": rates[key]} for key in groups if groups[key]])

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One batch. `loss` is the mean loss under masks; the other scalars tell what the policy does."""
        pair = self._prepared()
        x, y = batch
        beta = pair.policy(x)
        cells = beta.sample().clamp(EPS, 1 - EPS)
        output, log_p = pair.classifier(x * self._mask(cells, x, pair.policy)), beta.log_prob(cells)
        if y.dim() == 1 and not y.is_floating_point():
            labelled = y != IGNORED
            output, y, log_p = output[labelled], y[labelled], log_p[labelled]
        losses = self._losses(output, y)
        backward(self._objective(losses, log_p, self._constant(losses.detach())))
        return {"loss": losses.detach().mean(), **_told(beta, log_p.detach(), losses.detach())}

    @torch.no_grad()
    def masks(self, x: Tensor, *, expected: bool = False) -> Tensor:
        """Masks for inputs, drawn or expected: `[B, 1, H, W]` of images, `[B, F]` of rows, `[B, 1, L]` of signals."""
        policy = self._prepared().policy
        with untouched(policy, training=False):
            beta = policy(x)
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


def default_policy(x: Tensor) -> BetaMaskPolicy:
    """A small policy for inputs like these: three convolutions for images and signals, one linear layer for rows."""
    if x.dim() == 2:
        return BetaMaskPolicy(nn.Sequential(nn.Linear(x.shape[1], 32), nn.ReLU()), 32, (x.shape[1],))
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d(2)) if x.dim() == 4 else (nn.Conv1d, nn.AdaptiveAvgPool1d(2))
    widths = (x.shape[1], 8, 16, 16)
    layers = [
        part for k in range(3) for part in (conv(widths[k], widths[k + 1], 3, 1 if k == 0 else 2, padding=1), nn.ReLU())
    ]
    features = nn.Sequential(*layers, pool, nn.Flatten())
    grid = tuple(max(1, round(0.29 * side)) for side in x.shape[2:]) if x.dim() == 4 else (x.shape[2],)
    return BetaMaskPolicy(features, 16 * 2 ** (x.dim() - 2), grid)


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
