"""Training for certificates: by interval bounds, and under Gaussian noise.

Sources: Gowal et al., "On the Effectiveness of Interval Bound Propagation for Training Verifiably Robust Models", 2018;
Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from torchfolio import checks
from torchfolio.engine import Backprop, Batch, LearningRule
from torchfolio.robustness.layer_list import Layers
from torchfolio.robustness.margins import interval_margins
from torchfolio.robustness.properties import Box

__all__ = ["CertifiedIBP", "GaussianNoise", "in_full_precision", "labelled"]


class CertifiedIBP(LearningRule):
    """Train a classifier whose predictions interval bounds can certify.

    $$\\kappa\\, \\mathrm{CE}(f(x), y) + (1 - \\kappa)\\, \\mathrm{CE}(-\\underline m(x, \\varepsilon_t), y)$$

    with the lower bounds $\\underline m_j$ on $z_y - z_j$ over the ball. Along the ramp $\\varepsilon_t$ grows from 0 to
    $\\varepsilon$ and $\\kappa$ falls from 1.

    Args:
        eps: radius $\\varepsilon$ of the $L_\\infty$ balls.
        ramp: steps of the training between which radius and weights move; (80, 560) are epochs 1 to 7 of 8,000 examples
            in batches of 100.
        kappa: weight $\\kappa$ of the plain loss after the ramp, in [0, 1].
        clip: range of valid inputs, to which balls are cut; `None` where there is none.

    Shapes:
        Batches (x, y) with labels `[B]`; networks (nested) `nn.Sequential` of layers in `bounds.KNOWN`.

    Raises:
        ValueError: on settings out of range; in `prepare`, on targets that are no labels.
        TypeError: in `prepare`, naming a layer without bounds.

    Warns:
        UserWarning: where training ends before the ramp does.
    """

    def __init__(
        self,
        eps: float = 0.1,
        ramp: tuple[int, int] = (80, 560),
        kappa: float = 0.5,
        clip: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        self.eps = checks.at_least("eps", eps, 0)
        first, last = (checks.whole("an end of ramp", end, 0) for end in ramp)
        if first > last:
            raise ValueError(f"expected a ramp that begins before it ends, got {ramp}")
        self.ramp, self.kappa, self.clip = (first, last), checks.between("kappa", kappa, 0, 1), clip
        self.model: nn.Module | None = None
        self.steps = 0

    def __repr__(self) -> str:
        return f"CertifiedIBP(eps={self.eps:g}, ramp={self.ramp}, kappa={self.kappa:g}, clip={self.clip})"

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        labelled(example)
        Layers(model, example[0].shape[1:])  # refuses a layer without bounds
        self.model, self.steps = model, 0
        return model

    def configure(self, optimizer: Optimizer, total_steps: int | None) -> None:
        if total_steps is not None and total_steps < self.ramp[1]:
            warnings.warn(
                f"training takes {total_steps} steps, but the radius grows until step {self.ramp[1]}: it stays below "
                f"{self.eps:g}; pass an earlier ramp",
                stacklevel=2,
            )

    def progress(self) -> float:
        """How far the ramp has been climbed, from 0 to 1."""
        first, last = self.ramp
        return 1.0 if self.steps >= last else max(0.0, (self.steps - first) / (last - first))

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        if self.model is None:
            raise RuntimeError("call prepare(model, example) before step")
        x, y = batch
        climbed = self.progress()
        kappa, eps = 1 - climbed * (1 - self.kappa), climbed * self.eps
        plain = F.cross_entropy(self.model(x), y)
        loss, certified = plain, plain.detach()
        if kappa < 1:
            with in_full_precision(x):
                margins = interval_margins(self.model, Box.ball(x.detach(), eps, self.clip), y)
                worst = F.cross_entropy(-margins, y)
            loss, certified = kappa * plain + (1 - kappa) * worst, worst.detach()
        backward(loss)
        self.steps += 1
        return {"loss": loss.detach(), "certified_loss": certified, "eps": eps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = int(state["steps"])


class GaussianNoise(Backprop):
    """Cross-entropy on noisy inputs, $x + \\mathcal N(0, \\sigma^2 I)$: what randomised smoothing needs of a network.

    Args:
        sigma: deviation $\\sigma$ of the noise.
    """

    def __init__(self, sigma: float = 0.25) -> None:
        super().__init__()
        self.sigma = checks.positive("sigma", sigma)

    def __repr__(self) -> str:
        return f"GaussianNoise(sigma={self.sigma:g})"

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        x, *rest = batch
        return super().step((x + self.sigma * torch.randn_like(x), *rest), backward)


def labelled(batch: Batch) -> None:
    """Refuse a batch that is no (x, y) with labels.

    Raises:
        ValueError: saying what it is.
    """
    if len(batch) != 2 or batch[1].is_floating_point() or batch[1].dim() != 1:
        shape = tuple(batch[-1].shape)
        raise ValueError(
            f"expected batches (x, y) with class labels [B], got targets {batch[-1].dtype} of shape {shape}"
        )


def in_full_precision(x: Tensor) -> torch.autocast:
    """Bounds are differences of large sums: none of autocast's half precision here."""
    return torch.autocast(x.device.type, enabled=False)
