"""Learning rules that train an encoder without labels, by two random views of every image.

The views run through the network as one batch. Projector and predictor are trained beside the encoder and are no part of
what `fit` leaves: use the encoder's features.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.checks import between, positive, whole
from torchfolio.data.views import TwoViews, simclr_views
from torchfolio.engine import LearningRule
from torchfolio.engine.modes import undisturbed
from torchfolio.engine.rules import Batch
from torchfolio.measure import untouched
from torchfolio.training.contrastive import byol, nt_xent, simsiam

__all__ = ["BYOL", "ContrastiveRule", "SimCLR", "SimSiam"]


class ContrastiveRule(LearningRule):
    """What such rules share; subclasses say in `compare` what the loss of two views is.

    Args:
        view: random change of a batch of images, each for itself; `simclr_views()` by default.
        hidden: width inside projector and predictor.
        out_dim: width of the projections.

    Shapes:
        The encoder gives features `[N, D]`; batches are (x, anything), of two examples or more.

    Raises:
        ValueError: on settings out of range; in `prepare`, if the encoder gives something else.
    """

    needs_targets = False

    def __init__(self, view: Callable[..., Tensor] | None = None, hidden: int = 256, out_dim: int = 128) -> None:
        self.view = view or simclr_views()
        self.hidden, self.out_dim = whole("hidden", hidden, 1), whole("out_dim", out_dim, 1)
        self.parts: nn.ModuleDict | None = None

    def prepare(self, model: nn.Module, example: Batch) -> nn.Module:
        with torch.no_grad(), undisturbed(), untouched(model, training=False):
            features = model(example[0])
        if not isinstance(features, Tensor) or features.dim() != 2:
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(f"expected an encoder that gives features [N, D], got {got}")
        parts = nn.ModuleDict({"encoder": model, "projector": self.projector(features.shape[1])})
        parts.update(self.beside(parts))
        self.parts = parts.to(features)
        return self.parts

    def projector(self, width: int) -> nn.Module:
        """From features to projections: two layers with batch norm between them."""
        return _mlp(width, self.hidden, self.out_dim)

    def beside(self, parts: nn.ModuleDict) -> dict[str, nn.Module]:
        """Modules beside encoder and projector; none by default."""
        return {}

    def project(self, x: Tensor) -> Tensor:
        """Projections `[N, out_dim]` of images."""
        parts = self._ready()
        return parts["projector"](parts["encoder"](x))

    @abstractmethod
    def compare(self, views: Tensor) -> Tensor:
        """The loss of two views, one behind the other in one batch `[2N, …]`."""

    def step(self, batch: Batch, backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        self._ready()
        loss = self.compare(torch.cat(TwoViews(self.view)(batch[0])))
        backward(loss)
        return {"loss": loss.detach()}

    def _ready(self) -> Any:
        if self.parts is None:
            raise RuntimeError("call prepare(model, example) before step")
        return self.parts


class SimCLR(ContrastiveRule):
    """Tell an image's other view from all other images, by `nt_xent`.

    Args:
        view: function that draws a view, see `ContrastiveRule`.
        temperature: temperature of the softmax over cosines.
        **settings: `hidden` and `out_dim` of `ContrastiveRule`.

    Reference:
        Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020, eq. 1.
    """

    def __init__(self, view: Callable[..., Tensor] | None = None, temperature: float = 0.2, **settings: Any) -> None:
        super().__init__(view, **settings)
        self.temperature = positive("temperature", temperature)

    def compare(self, views: Tensor) -> Tensor:
        first, second = self.project(views).chunk(2)
        return nt_xent(first, second, self.temperature)


class SimSiam(ContrastiveRule):
    """Predict the projection of an image's other view, which gets no gradient.

    Reference:
        Chen and He, "Exploring Simple Siamese Representation Learning", CVPR 2021, eq. 2.
    """

    def projector(self, width: int) -> nn.Module:
        return nn.Sequential(super().projector(width), nn.BatchNorm1d(self.out_dim, affine=False))

    def beside(self, parts: nn.ModuleDict) -> dict[str, nn.Module]:
        return {"predictor": _mlp(self.out_dim, max(1, self.out_dim // 4), self.out_dim)}

    def compare(self, views: Tensor) -> Tensor:
        z = self.project(views)
        p1, p2 = self._ready()["predictor"](z).chunk(2)
        z1, z2 = z.chunk(2)
        return simsiam((p1, p2), (z1, z2))


class BYOL(ContrastiveRule):
    """Predict how a slowly moving copy of the network projects an image's other view.

    Args:
        view: function that draws a view, see `ContrastiveRule`.
        momentum: share of the copy that stays in a step.
        **settings: `hidden` and `out_dim` of `ContrastiveRule`.

    Reference:
        Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020, eqs. 1 and 2.
    """

    def __init__(self, view: Callable[..., Tensor] | None = None, momentum: float = 0.99, **settings: Any) -> None:
        super().__init__(view, **settings)
        self.momentum = between("momentum", momentum, 0, 1)

    def beside(self, parts: nn.ModuleDict) -> dict[str, nn.Module]:
        slow = {f"slow_{name}": copy.deepcopy(parts[name]).requires_grad_(False) for name in ("encoder", "projector")}
        return {"predictor": _mlp(self.out_dim, self.hidden, self.out_dim), **slow}

    def compare(self, views: Tensor) -> Tensor:
        parts = self._ready()
        with torch.no_grad():
            for name in ("encoder", "projector"):
                slow, fast = list(parts[f"slow_{name}"].parameters()), list(parts[name].parameters())
                torch._foreach_lerp_(slow, fast, 1 - self.momentum)
            t1, t2 = parts["slow_projector"](parts["slow_encoder"](views)).chunk(2)
        p1, p2 = parts["predictor"](self.project(views)).chunk(2)
        return byol((p1, p2), (t1, t2))


def _mlp(width: int, hidden: int, out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out)
    )
