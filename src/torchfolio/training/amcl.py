"""Contrastive learning with several heads, each with a temperature of its own for every pair.

Lei Wang, Piotr Koniusz, Tom Gedeon, Liang Zheng, "Adaptive Multi-head Contrastive Learning", ECCV 2024,
https://arxiv.org/abs/2310.05615.

Where augmentations of several kinds are combined, two views of one image may look unlike and those of two images alike,
and one similarity with one temperature is too rigid. The losses here replace those of SimCLR, MoCo, SimSiam and Barlow
Twins, of which each has a class of its own; `AMCL` and its subclasses train an encoder by them in `fit`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.checks import at_least, between, one_of, positive, whole
from torchfolio.data.views import ColorJitter, Compose, Flip, Grey, ResizedCrop, TwoViews
from torchfolio.engine import Batch, LearningRule
from torchfolio.engine.modes import undisturbed
from torchfolio.measure import untouched
from torchfolio.training.multi_head_losses import AMCLBarlowLoss, AMCLLoss, AMCLSimSiamLoss, Negatives
from torchfolio.training.pair_temperature import (
    ConcatTemperature,
    FixedTemperature,
    MultiHeadProjector,
    PairTemperature,
    temperature_penalty,
)

__all__ = [
    "AMCL", "AMCLBarlow", "AMCLBarlowLoss", "AMCLLoss", "AMCLMoCo", "AMCLSimSiam", "AMCLSimSiamLoss",
    "ConcatTemperature", "FixedTemperature", "MultiHeadProjector", "PairTemperature", "temperature_penalty",
]  # fmt: skip


class AMCL(LearningRule):
    """Train an encoder without labels, as SimCLR does, by `AMCLLoss` on two views of every image.

    The targets of the batches are not used. Projector and temperatures are trained beside the encoder and are no part
    of what `fit` leaves: use the encoder's features.

    Args:
        view: random change of a batch of images; by default SimCLR's crops, flips, colours and greys, without clamping, so
            that images may be normalised.
        heads: number C of heads; 3 to 5.
        out_dim: width d' of the projections.
        temperature: module of temperatures; `PairTemperature(out_dim)` by default.
        beta: weight of the penalty on temperatures.
        negatives: treatment of negatives, see `AMCLLoss`.
        top_k: number of negatives that count, see `AMCLLoss`.

    Shapes:
        The encoder gives features `[N, D]`; batches are x, alone or before others.

    Raises:
        ValueError: on settings out of range; in `prepare`, if the encoder gives something else.

    Example:
        >>> fit(encoder, images, rule=AMCL(), optimizer=adam(1e-3), epochs=100, batch_size=256, drop_last=True)
        >>> features = encoder(x)

    Reference:
        Wang et al., ECCV 2024.
    """

    needs_targets = False

    def __init__(
        self,
        view: Callable[..., Tensor] | None = None,
        heads: int = 3,
        out_dim: int = 128,
        temperature: nn.Module | None = None,
        beta: float = 1e-3,
        negatives: Negatives = "logsumexp",
        top_k: int = 1,
    ) -> None:
        self.view, self.heads, self.out_dim = view, whole("heads", heads, 1), whole("out_dim", out_dim, 1)
        self.temperature, self.beta = temperature, at_least("beta", beta, 0)
        self.negatives: Negatives = one_of("negatives", negatives, ("logsumexp", "max", "topk"))
        self.top_k = whole("top_k", top_k, 1)
        self.views = TwoViews(view or Compose([ResizedCrop(), Flip(), ColorJitter(bounds=None), Grey()]))
        self.parts: nn.ModuleDict | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        with torch.no_grad(), undisturbed(), untouched(model, training=False):
            features = model(example[0])
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected an encoder that gives features [N, D], got {got}")
        width = features.shape[1]
        projector = MultiHeadProjector(width, width, self.out_dim, self.heads)
        parts = nn.ModuleDict({"encoder": model, "projector": projector})
        parts.update(dict(self.build()))
        for name in parts.keys() - {"encoder"}:  # losses are computed in full precision
            parts[name].to(features.device, torch.promote_types(features.dtype, torch.float32) if name == "loss" else
                           features.dtype)  # fmt: skip
        self.parts = parts
        return parts

    def build(self) -> dict[str, nn.Module]:
        """Modules beside encoder and projector, the loss among them."""
        temperature = self.temperature or PairTemperature(self.out_dim)
        return {"loss": AMCLLoss(temperature, self.beta, self.negatives, self.top_k)}

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        """One step; beside the loss come the means of temperatures and similarities."""
        if self.parts is None:
            raise RuntimeError("call prepare(model, example) before step")
        loss = self.compare(self.parts, *self.views(batch[0]))
        backward(loss)
        stats: Any = self.parts["loss"].stats
        return {"loss": loss.detach(), **stats}

    def compare(self, parts: Any, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views, which run as one batch."""
        projected = parts["projector"](parts["encoder"](torch.cat([first, second])))
        return parts["loss"](*projected.chunk(2, 1))


class AMCLMoCo(AMCL):
    """Train as MoCo does: keys come from a slowly moving copy of the encoder, negatives from a queue for each head.

    Args:
        momentum: share of the copy that stays in a step.
        queue: number of keys kept; random unit vectors at first.
        **settings: settings of `AMCL`.
    """

    def __init__(self, view: Callable[..., Tensor] | None = None, momentum: float = 0.99, queue: int = 4096,
                 **settings: Any) -> None:  # fmt: skip
        super().__init__(view, **settings)
        self.momentum, self.queue = between("momentum", momentum, 0, 1), whole("queue", queue, 1)

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        parts: Any = super().prepare(model, example)
        for name in ("encoder", "projector"):
            parts[f"slow_{name}"] = copy.deepcopy(parts[name]).requires_grad_(False)
        keys = F.normalize(torch.randn(self.heads, self.queue, self.out_dim), dim=-1)
        parts["loss"].register_buffer("queue", keys.to(next(parts["projector"].parameters()).device))
        return parts

    @torch.no_grad()
    def momentum_update(self) -> None:
        """Move the copy towards the encoder."""
        parts: Any = self.parts
        for name in ("encoder", "projector"):
            slow, fast = list(parts[f"slow_{name}"].parameters()), list(parts[name].parameters())
            torch._foreach_lerp_(slow, fast, 1 - self.momentum)

    def compare(self, parts: Any, first: Tensor, second: Tensor) -> Tensor:
        self.momentum_update()
        both = torch.cat([first, second])
        queries = parts["projector"](parts["encoder"](both))
        with torch.no_grad():
            keys = F.normalize(parts["slow_projector"](parts["slow_encoder"](both)).float(), dim=-1)
        (q1, q2), (k1, k2) = queries.chunk(2, 1), keys.chunk(2, 1)
        loss = (parts["loss"](q1, k2, parts["loss"].queue) + parts["loss"](q2, k1, parts["loss"].queue)) / 2
        with torch.no_grad():
            parts["loss"].queue = torch.cat([keys.to(parts["loss"].queue), parts["loss"].queue], 1)[:, : self.queue]
        return loss


class AMCLSimSiam(AMCL):
    """Train as SimSiam does, without negatives: a predictor for each head, and projections that get no gradient."""

    def build(self) -> dict[str, nn.Module]:
        temperature = self.temperature or PairTemperature(self.out_dim)
        hidden = max(1, self.out_dim // 4)
        predictor = MultiHeadProjector(self.out_dim, hidden, self.out_dim, self.heads)
        return {"predictor": predictor, "loss": AMCLSimSiamLoss(temperature, self.beta)}

    def compare(self, parts: Any, first: Tensor, second: Tensor) -> Tensor:
        z = parts["projector"](parts["encoder"](torch.cat([first, second])))
        return parts["loss"](parts["predictor"](z).chunk(2, 1), z.chunk(2, 1))


class AMCLBarlow(AMCL):
    """Train as Barlow Twins does, by the correlation of features. All batches must be of one size (`drop_last=True`).

    Args:
        batch_size: examples of a batch.
        low: least temperature.
        high: largest temperature.
        **settings: settings of `AMCL`.
    """

    def __init__(self, batch_size: int, view: Callable[..., Tensor] | None = None, low: float = 0.5, high: float = 1.5,
                 **settings: Any) -> None:  # fmt: skip
        super().__init__(view, **settings)
        self.batch_size = whole("batch_size", batch_size, 2)
        self.low, self.high = positive("low", low), positive("high", high)

    def build(self) -> dict[str, nn.Module]:
        temperature = self.temperature or PairTemperature(self.batch_size, low=self.low, high=self.high)
        return {"loss": AMCLBarlowLoss(temperature, self.beta)}

    def compare(self, parts: Any, first: Tensor, second: Tensor) -> Tensor:
        if len(first) != self.batch_size:
            raise ValueError(f"expected batches of {self.batch_size} examples, got {len(first)}; pass drop_last=True")
        return super().compare(parts, first, second)
