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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.adaptation.adapter import Adapted, Adapter, Adapting
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
    "backfill_curve",
    "class_prototypes",
    "updated",
    "upgrade_report",
]


class Rotation(nn.Module):
    """A learnable orthonormal map, $x \\mapsto x (Q e^{S - S^\\top})^\\top$ with a random orthonormal Q and S below the diagonal.

    Args:
        dim: of the vectors.
    """

    base: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("base", torch.linalg.qr(torch.randn(dim, dim))[0])
        self.skew = nn.Parameter(torch.zeros(dim, dim))

    @property
    def matrix(self) -> Tensor:
        """The orthonormal matrix, in float32 at least."""
        below = (self.skew if self.skew.dtype == torch.float64 else self.skew.float()).tril(-1)
        return self.base.to(below) @ torch.matrix_exp(below - below.T)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix.to(x.dtype))


class BT2Output(NamedTuple):
    """What a backward-compatible network gives.

    Attributes:
        logits: `[B, K]`; `None` from the transformation alone.
        compatible: first m coordinates of the embedding, `[B, m]`.
        new: the new branch $f$ of unit length, `[B, n]`.
        embedding: $\\phi_{new}$, `[B, d + n]`.
    """

    logits: Tensor | None
    compatible: Tensor
    new: Tensor
    embedding: Tensor


class BasisTransformation(nn.Module):
    """From features to an embedding whose first coordinates are comparable with an old one.

    Args:
        new_dim: n, coordinates of the new branch.
        old_dim: m, coordinates of the old embedding.
        extra_dim: d, from 0 to m; d + n must be at least m.
        scale: C, weight of the new branch.

    Shapes:
        features `[B, n + m]` to a `BT2Output`.

    Raises:
        ValueError: if d is above m, or d + n below m.
    """

    def __init__(self, new_dim: int, old_dim: int, extra_dim: int = 32, scale: float = 2.0) -> None:
        super().__init__()
        self.new_dim, self.old_dim = whole("new_dim", new_dim, 1), whole("old_dim", old_dim, 1)
        self.extra_dim = whole("extra_dim", extra_dim, 0, old_dim)
        self.scale = positive("scale", scale)
        if extra_dim + new_dim < old_dim:
            raise ValueError(
                f"expected extra_dim + new_dim to be at least old_dim {old_dim}, got {extra_dim + new_dim}"
            )
        self.old = nn.Linear(new_dim + old_dim, old_dim)
        self.rotate_new, self.rotate_compatible = Rotation(new_dim), Rotation(old_dim)

    def forward(self, z: Tensor) -> BT2Output:
        if z.shape[-1] != self.new_dim + self.old_dim:
            raise ValueError(f"expected {self.new_dim + self.old_dim} features, got shape {tuple(z.shape)}")
        new = F.normalize(z[..., : self.new_dim], dim=-1)
        # The old branch is normalised before and after the cut; the first has no effect on the second.
        old = F.normalize(self.old(z.relu())[..., : self.extra_dim], dim=-1)
        u = torch.cat([old, self.scale * self.rotate_new(new)], -1)
        compatible = self.rotate_compatible(u[..., : self.old_dim])
        return BT2Output(None, compatible, new, torch.cat([compatible, u[..., self.old_dim :]], -1))

    def extra_repr(self) -> str:
        return f"new_dim={self.new_dim}, old_dim={self.old_dim}, extra_dim={self.extra_dim}, scale={self.scale}"


class BackwardCompatible(nn.Module):
    """A classifier on a backward-compatible embedding.

    Args:
        backbone: from inputs to n + m features `[B, n + m]`.
        new_dim: see `BasisTransformation`.
        old_dim: see `BasisTransformation`.
        num_classes: number of classes.
        extra_dim: see `BasisTransformation`.
        scale: see `BasisTransformation`.

    Shapes:
        inputs to logits `[B, K]`; `outputs(x)` gives everything, `embed(x)` the embedding `[B, d + n]`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        new_dim: int,
        old_dim: int,
        num_classes: int,
        extra_dim: int = 32,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.transformation = BasisTransformation(new_dim, old_dim, extra_dim, scale)
        self.head = nn.Linear(new_dim, whole("num_classes", num_classes, 2), bias=False)

    def outputs(self, x: Tensor) -> BT2Output:
        """Logits, compatible part, new branch and embedding."""
        found = self.transformation(self.backbone(x).flatten(1))
        return found._replace(logits=self.head(found.new))

    def embed(self, x: Tensor) -> Tensor:
        """The embedding, of constant length: to be compared whole with its like, by its first m coordinates with the old."""
        return self.outputs(x).embedding

    def forward(self, x: Tensor) -> Tensor:
        logits = self.outputs(x).logits
        assert logits is not None
        return logits

    @torch.no_grad()
    def folded(self) -> BackwardCompatible:
        """A copy whose changes of basis are plain linear maps, for inference."""
        net = copy.deepcopy(self)
        for name in ("rotate_new", "rotate_compatible"):
            matrix = getattr(net.transformation, name).matrix
            plain = nn.Linear(*matrix.shape, bias=False, device=matrix.device, dtype=net.head.weight.dtype)
            plain.weight.copy_(matrix)
            setattr(net.transformation, name, plain)
        return net


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
        loss: see `BT2Loss`.
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
        new_dim: see `BasisTransformation`.
        old_dim: see `BasisTransformation`.
        num_classes: number of classes.
        extra_dim: see `BasisTransformation`.
        scale: see `BasisTransformation`.
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
        epochs: of each of the two trainings.
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
        self.epochs, self.lr, self.batch_size = whole("epochs", epochs, 1), positive("lr", lr), batch_size
        self.new_dim, self.extra_dim, self.scale, self.lambda_new = new_dim, extra_dim, scale, lambda_new
        self.built: dict[str, int | float] = {}

    def _adapt(self, model: nn.Module, data: Any, run: Adapting) -> Adapted:
        name, _ = _classifier(model)
        examples = Examples(data)
        x, y = torch.cat([b[0] for b in examples.batches()]), examples.labels
        if y is None:
            raise ValueError("expected labelled examples, got targets that are no labels")
        embed = copy.deepcopy(model)
        embed.set_submodule(name, nn.Identity()) if name else None
        old = F.normalize(outputs(embed, x).flatten(1), dim=1)
        dim, classes = old.shape[1], run.num_classes or int(y.max()) + 1
        n = self.new_dim or dim
        self.built = {"new_dim": n, "old_dim": dim, "num_classes": classes, "extra_dim": min(self.extra_dim, dim),
                      "scale": self.scale}  # fmt: skip
        run.say("training the independent network")
        alone = Embedder(_fresh(model, name, n), n, classes).to(run.device)
        self._train(alone, (x, y), run)
        new = outputs(Embed(alone), x)
        run.say("training the compatible network")
        net = updated(_fresh(model, name, n), **self.built).to(run.device)  # pyright: ignore[reportArgumentType]
        rule = BT2(BT2Loss(class_prototypes(old, y, classes), lambda_new=self.lambda_new))
        self._train(net, (x, y, old, new), run, rule)
        agreement = F.cosine_similarity(outputs(Embed(net), x)[:, :dim], old).mean()
        return Adapted(net, {"agreement_with_old": float(agreement), "dimensions": float(n + self.built["extra_dim"])})

    def _train(self, net: nn.Module, data: Any, run: Adapting, rule: LearningRule | None = None) -> None:
        fit(net, data, rule=rule, optimizer=adam(self.lr), scheduler=cosine(), epochs=self.epochs,
            batch_size=self.batch_size, seed=run.seed, device=run.device)  # fmt: skip

    def recipe(self, network: dict[str, Any]) -> dict[str, Any]:
        return {"build": "torchfolio.adaptation.bt2:updated", "arguments": {"network": network, **self.built}}


class Embedder(nn.Module):
    """The ordinary classifier on unit embeddings, $y = Af$: the independent model, and that of BCT.

    Args:
        backbone: from inputs to features `[B, dim]`.
        dim: coordinates of the embedding.
        num_classes: number of classes.
    """

    def __init__(self, backbone: nn.Module, dim: int, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(dim, num_classes, bias=False)

    def embed(self, x: Tensor) -> Tensor:
        """Unit embeddings `[B, dim]`."""
        return F.normalize(self.backbone(x).flatten(1), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Embed(nn.Module):
    """A network that answers with its embedding."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.embed(x)


def _fresh(model: nn.Module, name: str, width: int) -> nn.Module:
    """A copy with weights drawn anew whose last linear layer has `width` outputs."""
    net = redraw(copy.deepcopy(model))
    last: Any = net.get_submodule(name)
    features = nn.Linear(last.in_features, width).to(last.weight)
    if not name:
        return features
    net.set_submodule(name, features)
    return net
