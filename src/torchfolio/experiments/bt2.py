"""Measures an update of a small embedding of digits: what the new model's queries find in the old gallery."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.adaptation.bt2 import BT2, BackwardCompatible, BCTLoss, BT2Loss, Embed, Embedder, class_prototypes
from torchfolio.data import DataSplits
from torchfolio.engine import LearningRule
from torchfolio.engine.recipes import adam, cosine
from torchfolio.measure import outputs, retrieval
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Digits, a perceptron as backbone, and BT²'s knobs."""

    data: str = setting("mnist10k", "name of the data set")
    train_size: int | None = setting(6000, "images of the new training set")
    old_size: int = setting(600, "images of the old one, of the first five classes")
    hidden: int = setting(384, "width of the backbone")
    dim: int = setting(32, "coordinates of the old and of the independent embedding")
    extra_dim: int = setting(8, "d")
    lambda_new: float = setting(10.0, "weight of the independent model's embedding")
    paper_lambda: float = setting(1.0, "the paper's weight, run beside it")
    epochs: int = setting(12, "number of epochs of every training")


SCALES = {
    "smoke": Settings("digits", None, 150, hidden=32, dim=8, extra_dim=2, epochs=2),
    "quick": Settings(),
    "full": Settings("cifar10", None, 10_000, hidden=1024, dim=64, extra_dim=16, epochs=40),
}


def backbone(run: Run[Settings], data: DataSplits, width: int) -> nn.Sequential:
    """A perceptron with batch normalisation."""
    pixels, hidden = data.train.tensors[0][0].numel(), run.settings.hidden
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (pixels, hidden):
        layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, width))


def train(run: Run[Settings], net: nn.Module, data: Any, rule: LearningRule | None = None) -> nn.Module:
    run.fit(net, data, rule=rule, optimizer=adam(1e-3), scheduler=cosine(), epochs=run.settings.epochs, batch_size=128)
    return net


class BCT(LearningRule):
    """Backward-compatible training of an `Embedder`, by the old prototypes on its first coordinates."""

    def __init__(self, prototypes: Tensor) -> None:
        self.objective = BCTLoss(prototypes)

    def prepare(self, model: nn.Module, example: Any) -> nn.Module:
        self.model: Any = model
        self.objective.to(example[0].device)
        return model

    def step(self, batch: Any, backward: Any) -> dict[str, Tensor]:
        x, y = batch
        embedding = self.model.embed(x)
        loss = self.objective(self.model.head(embedding), embedding, y)
        backward(loss)
        return {"loss": loss.detach()}


def embeddings(run: Run[Settings], data: DataSplits) -> dict[str, Any]:
    """Test embeddings of all models: old, independent, BCT, naive extra dimensions, BT², and a chain of updates."""
    settings, (x, y) = run.settings, data.train.tensors
    m, d, classes = settings.dim, settings.extra_dim, data.num_classes
    torch.manual_seed(run.seed)
    few = (y < classes // 2).nonzero()[:, 0][: settings.old_size]
    first = train(run, Embedder(backbone(run, data, m), m, classes // 2), (x[few], y[few]))
    alone = train(run, Embedder(backbone(run, data, m), m, classes), (x, y))
    old, new = outputs(Embed(first), x), outputs(Embed(alone), x)
    prototypes = class_prototypes(old, y, classes)
    nets: dict[str, nn.Module] = {"old": first, "independent": alone}
    for name, width in (("bct", m), ("naive", m + d)):
        nets[name] = train(run, Embedder(backbone(run, data, width), width, classes), (x, y), BCT(prototypes))
    for name, weight in (("bt2", settings.lambda_new), ("bt2_paper", settings.paper_lambda)):
        nets[name] = _updated(run, data, (x, y, old, new), prototypes, weight)
    # A chain: half of the new data, then all of it on top of the second model.
    half = torch.arange(len(x)) < len(x) // 2
    second = _updated(run, data, (x[half], y[half], old[half], new[half]), class_prototypes(old[half], y[half], classes),
                      settings.lambda_new)  # fmt: skip
    previous = F.normalize(outputs(Embed(second), x), dim=1)
    nets["second"] = second
    nets["third"] = _updated(
        run, data, (x, y, previous, new), class_prototypes(previous, y, classes), settings.lambda_new
    )
    return {name: outputs(Embed(net), data.test.tensors[0]) for name, net in nets.items()}


def _updated(run: Run[Settings], data: DataSplits, batch: Any, prototypes: Tensor, weight: float) -> nn.Module:
    n, m = batch[3].shape[1], batch[2].shape[1]
    net = BackwardCompatible(backbone(run, data, n + m), n, m, data.num_classes, run.settings.extra_dim)
    return train(run, net, batch, BT2(BT2Loss(prototypes, lambda_new=weight)))


def run(run: Run[Settings]) -> None:
    """Train all models, and retrieve the test images of a class by one of them."""
    settings = run.settings
    data = run.data(settings.data, train_size=settings.train_size)
    found = run.arm("embeddings", embeddings, run, data)
    y = data.test.tensors[1]

    def score(query: str, gallery: str) -> float:
        return retrieval(found[query], y, found[gallery], y, exclude_self=True).mean_average_precision

    pairs = {"old_old": ("old", "old"), "new_old": ("bt2", "old"), "new_new": ("bt2", "bt2"), "bct": ("bct", "bct"),
             "bct_old": ("bct", "old"), "naive": ("naive", "naive"), "independent": ("independent", "independent"),
             "independent_old": ("independent", "old"), "paper_new": ("bt2_paper", "bt2_paper"),
             "paper_old": ("bt2_paper", "old"), "third_first": ("third", "old"), "third_third": ("third", "third")}  # fmt: skip
    scores = run.arm("retrieval", lambda: {name: score(*pair) for name, pair in pairs.items()})
    run.values("compatible", pick(scores, "new_old", "old_old", "paper_old"))
    keys = ("new_new", "independent", "bct", "new_old", "bct_old", "paper_new")
    run.values("new_quality", {k: scores[k] for k in keys})
    run.values("negative_control", pick(scores, "independent_old", "old_old"))
    run.values("extra_dimensions", pick(scores, "new_new", "naive"))
    run.values("chain", third_first=scores["third_first"], first_first=scores["old_old"], third=scores["third_third"])


def figures(results: Results) -> plots.Figures:
    """Mean average precision of the pairs."""
    bars = {
        "old / old": "old_old", "BT² / old": "new_old", "BCT / old": "bct_old", "alone / old": "independent_old",
        "BT² / BT²": "new_new", "BCT / BCT": "bct", "naive": "naive", "alone / alone": "independent",
    }  # fmt: skip
    scores = {label: ("retrieval", name) for label, name in bars.items()}
    return {"retrieval": plots.bars(results, scores, ylabel="mean average precision")}
