"""BT²: a new embedding that is compared with the old gallery without losing what an independent model would learn.

The new network gives a few dimensions more than the independent one would have, and two learnable orthonormal changes
of basis put what is compatible with the old embedding first:

$$f = z_{1..n} / \\lVert z_{1..n} \\rVert, \\quad o = W_3\\,\\mathrm{relu}(z) + b_3, \\quad
\\bar o = o_{1..d} / \\lVert o_{1..d} \\rVert, \\quad u = [\\bar o;\\, C P f], \\quad
\\phi_{new} = [B u_{1..m};\\, u_{m+1..}]$$

with $P \\in O(n)$, $B \\in O(m)$. The first m coordinates are comparable with the old embedding; the whole has inner
products $\\langle \\bar o, \\bar o' \\rangle + C^2 \\langle f, f' \\rangle$ and squared length $1 + C^2$ ($C^2$ if d = 0).

Reference:
    Zhou et al., BT²: Backward-compatible Training with Basis Transformation, ICCV 2023 (arXiv 2211.03989), Section 4.
    Weights of the loss are those of the published configurations; logits have no temperature, as there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.adaptation.adapter import Adapted, Adapter, Adapting
from torchfolio.adaptation.basis_transformation import (
    BackwardCompatible,
    BasisTransformation,
    BT2Output,
    Embed,
    Embedder,
    Rotation,
)
from torchfolio.adaptation.compatible import (
    BCTLoss,
    backfill_curve,
    class_prototypes,
    normalized,
    upgrade_report,
)
from torchfolio.checks import at_least, finite, positive, whole
from torchfolio.data import Examples
from torchfolio.engine import LearningRule, fit
from torchfolio.engine.recipes import adam, cosine
from torchfolio.measure import outputs
from torchfolio.models.init import redraw

__all__ = [
    "BT2",
    "BCTLoss",
    "BT2Adapter",
    "BT2Loss",
    "BT2Output",
    "BackwardCompatible",
    "BasisTransformation",
    "Embedder",
    "Rotation",
    "backfill_curve",
    "class_prototypes",
    "updated",
    "upgrade_report",
]


class BT2Loss(nn.Module):
    """The objective: classify, agree with the old prototypes, the old embedding, and the independent model.

    $$\\mathrm{CE}(y, t) + \\lambda_{cls}\\,\\mathrm{CE}(\\hat c W^\\top, t)
    + \\lambda_{old}\\,(1 - \\langle \\phi_{old}, \\hat c \\rangle) + \\lambda_{new}\\,(1 - \\langle \\phi', f \\rangle)$$

    Args:
        prototypes: $W$ `[K, m]`, see `class_prototypes`.
        lambda_new: weight of the independent model's embedding, the knob for the new quality: 10 for small shared
            backbones.
        lambda_cls: weight of the prototypes.
        lambda_old: weight of the old embedding.

    Shapes:
        a `BT2Output`, labels `[B]`, old embeddings `[B, m]` and independent ones `[B, n]` of unit length, to a scalar.
    """

    prototypes: Tensor

    def __init__(
        self, prototypes: Tensor, lambda_new: float = 1.0, lambda_cls: float = 10.0, lambda_old: float = 5.0
    ) -> None:
        super().__init__()
        self.lambda_new, self.lambda_cls = at_least("lambda_new", lambda_new, 0), at_least("lambda_cls", lambda_cls, 0)
        self.lambda_old = at_least("lambda_old", lambda_old, 0)
        self.register_buffer("prototypes", finite("prototypes", prototypes).detach().clone())

    def forward(self, found: BT2Output, y: Tensor, old: Tensor, new: Tensor) -> Tensor:
        return torch.stack(list(self.parts(found, y, old, new).values())).sum()

    def parts(self, found: BT2Output, y: Tensor, old: Tensor, new: Tensor) -> dict[str, Tensor]:
        """The four terms, weighted, by name."""
        if self.prototypes.shape[1] != found.compatible.shape[1] or old.shape != found.compatible.shape:
            raise ValueError(
                f"expected prototypes and old embeddings of {found.compatible.shape[1]} coordinates, got "
                f"{self.prototypes.shape[1]} and {tuple(old.shape)}"
            )
        assert found.logits is not None
        compatible = F.normalize(found.compatible, dim=1)
        return {
            "classes": F.cross_entropy(found.logits, y),
            "prototypes": self.lambda_cls * F.cross_entropy(compatible @ self.prototypes.T, y),
            "old": self.lambda_old * (1 - (old * compatible).sum(1).mean()),
            "new": self.lambda_new * (1 - (new * found.new).sum(1).mean()),
        }


Embedding = Callable[[Tensor], Tensor]


class BT2(LearningRule):
    """Trains a `BackwardCompatible` network.

    Args:
        loss: loss, see `BT2Loss`.
        old: old model, from inputs to unit embeddings `[B, m]`, frozen; `None` where batches are (x, t, old, new), with
            embeddings that were computed before.
        new: independent model likewise, to `[B, n]`.

    Raises:
        TypeError: if the network is no `BackwardCompatible`.
        ValueError: if one of the models is missing, or batches bring no embeddings where there is neither.
    """

    def __init__(self, loss: BT2Loss, old: Embedding | None = None, new: Embedding | None = None) -> None:
        if (old is None) != (new is None):
            raise ValueError("expected both the old and the independent model, or neither, got one")
        self.objective, self.old, self.new = loss, old, new

    def prepare(self, model: nn.Module, example: Sequence[Tensor]) -> nn.Module:
        if not isinstance(model, BackwardCompatible):
            raise TypeError(f"expected a BackwardCompatible network, got {type(model).__name__}")
        if len(example) != (4 if self.old is None else 2):
            wanted = "(x, t, old, new)" if self.old is None else "(x, t)"
            raise ValueError(f"expected batches {wanted}, got {len(example)} tensors")
        self.model = model
        self.objective.to(example[0].device)
        return model

    def step(self, batch: Sequence[Tensor], backward: Callable[[Tensor], None]) -> Mapping[str, Tensor | float]:
        x, y = batch[:2]
        if self.old is not None and self.new is not None:
            with torch.no_grad():
                old, new = normalized(self.old(x), "old embeddings"), normalized(self.new(x), "new embeddings")
        else:
            old, new = batch[2:]
        parts = self.objective.parts(self.model.outputs(x), y, old, new)
        total = torch.stack(list(parts.values())).sum()
        backward(total)
        return {"loss": total.detach(), **{name: part.detach() for name, part in parts.items()}}

    def __repr__(self) -> str:
        return f"BT2({self.objective.lambda_new}, {self.objective.lambda_cls}, {self.objective.lambda_old})"


def updated(
    network: nn.Module, new_dim: int, old_dim: int, num_classes: int, extra_dim: int = 8, scale: float = 2.0
) -> nn.Module:
    """A `BackwardCompatible` network on a classifier's own backbone, whose last linear layer gives the features.

    Args:
        network: classifier that ends in an `nn.Linear`; it becomes the backbone.
        new_dim: number of new features, see `BasisTransformation`.
        old_dim: number of old features, see `BasisTransformation`.
        num_classes: number of classes.
        extra_dim: number of extra features, see `BasisTransformation`.
        scale: scale, see `BasisTransformation`.
    """
    name, last = _classifier(network)
    features = nn.Linear(last.in_features, new_dim + old_dim).to(last.weight)
    if not name:
        return BackwardCompatible(features, new_dim, old_dim, num_classes, extra_dim, scale)
    network.set_submodule(name, features)
    return BackwardCompatible(network, new_dim, old_dim, num_classes, extra_dim, scale)


def _classifier(network: nn.Module) -> tuple[str, nn.Linear]:
    linear = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.Linear)]
    if not linear:
        raise ValueError("expected a classifier that ends in a linear layer, got a network without any")
    return linear[-1]


class BT2Adapter(Adapter):
    """Update a network on data so that the new embedding stays comparable with the old one's.

    The old embedding is what the network's last linear layer sees, normalised. An independent network of the same
    architecture is trained first, then the compatible one.

    Args:
        epochs: number of epochs of each of the two trainings.
        lr: learning rate of Adam.
        new_dim: coordinates of the new branch; as many as the old embedding has by default.
        extra_dim: d.
        scale: C.
        lambda_new: weight of the independent model's embedding.
        batch_size: examples of a batch.
    """

    def __init__(
        self,
        epochs: int = 10,
        lr: float = 1e-3,
        new_dim: int | None = None,
        extra_dim: int = 8,
        scale: float = 2.0,
        lambda_new: float = 10.0,
        batch_size: int = 128,
    ) -> None:
        self.epochs, self.lr, self.batch_size = (
            whole("epochs", epochs, 1),
            positive("lr", lr),
            whole("batch_size", batch_size, 1),
        )
        self.new_dim = None if new_dim is None else whole("new_dim", new_dim, 1)
        self.extra_dim, self.scale = whole("extra_dim", extra_dim, 0), positive("scale", scale)
        self.lambda_new = at_least("lambda_new", lambda_new, 0)
        self.built: dict[str, int | float] = {}

    def _adapt(self, model: nn.Module, data: Any, run: Adapting) -> Adapted:
        name, last = _classifier(model)
        like = {"device": run.device, "dtype": last.weight.dtype}
        examples = Examples(data)
        x, y = torch.cat([b[0] for b in examples.batches()]), examples.labels
        if y is None:
            raise ValueError("expected labelled examples, got targets that are no labels")
        embed = copy.deepcopy(model) if name else nn.Identity()  # of a linear layer alone it is the input
        embed.set_submodule(name, nn.Identity()) if name else None
        old = F.normalize(outputs(embed, x).flatten(1), dim=1)
        dim, classes = old.shape[1], run.num_classes or int(y.max()) + 1
        n = self.new_dim or dim
        self.built = {"new_dim": n, "old_dim": dim, "num_classes": classes, "extra_dim": min(self.extra_dim, dim),
                      "scale": self.scale}  # fmt: skip
        run.say("training the independent network")
        alone = Embedder(_fresh(model, name, n), n, classes).to(**like)
        self._train(alone, (x, y), run)
        new = outputs(Embed(alone), x)
        run.say("training the compatible network")
        net = updated(_fresh(model, name, n), **self.built).to(**like)  # pyright: ignore[reportArgumentType]
        rule = BT2(BT2Loss(class_prototypes(old, y, classes), lambda_new=self.lambda_new))
        self._train(net, (x, y, old, new), run, rule)
        agreement = F.cosine_similarity(outputs(Embed(net), x)[:, :dim], old).mean()
        return Adapted(net, {"agreement_with_old": float(agreement), "dimensions": float(n + self.built["extra_dim"])})

    def _train(self, net: nn.Module, data: Any, run: Adapting, rule: LearningRule | None = None) -> None:
        fit(net, data, rule=rule, optimizer=adam(self.lr), scheduler=cosine(), epochs=self.epochs,
            batch_size=self.batch_size, seed=run.seed, device=run.device)  # fmt: skip

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        return {"build": "torchfolio.adaptation.bt2:updated", "arguments": {"network": network, **self.built}}


def _fresh(model: nn.Module, name: str, width: int) -> nn.Module:
    """A copy with weights drawn anew whose last linear layer has `width` outputs."""
    net = redraw(copy.deepcopy(model))
    last: Any = net.get_submodule(name)
    features = nn.Linear(last.in_features, width).to(last.weight)
    if not name:
        return features
    net.set_submodule(name, features)
    return net
