"""Measures concatenated features of several trainings: on digits that were not trained on, beside wider networks."""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchfolio.engine import fit
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.experiments._new_classes import finetune, probe, ridge_gap, split_classes
from torchfolio.measure import accuracy, outputs
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.training.episodes import train_episodes
from torchfolio.training.rich_representations import Concatenated, RichDistillation, split_head
from torchfolio.training.snapshots import Snapshots


@dataclass(frozen=True)
class Settings:
    """Data, networks and budget."""

    data: str = setting("mnist10k", "images of ten classes")
    image_size: int | None = setting(14, "side of the images; `None` keeps them")
    train_size: int | None = setting(None, "training images of all ten; `None` takes all")
    val_size: int = setting(1000, "validation images")
    source: int = setting(5, "number of classes that are trained on, from 0; the others are new")
    width: int = setting(8, "channels of the first layer; the features are twice as many")
    episodes: int = setting(5, "trainings n")
    epochs: int = setting(6, "number of epochs of each training")
    distill_epochs: int = setting(12, "number of epochs of distillation, and of the single training beside it")
    draws: int = setting(20, "number of draws of few labels")
    finetune_epochs: int = setting(
        30, "passes over 20 labels for each class; fewer over more labels, for as many steps"
    )
    lrs: tuple[float, ...] = setting((0.01, 0.05), "learning rates of fine-tuning, chosen on validation data")


SCALES = {
    "smoke": Settings(
        data="digits", image_size=None, val_size=200, width=4, episodes=2, epochs=1, distill_epochs=1, draws=2,
        finetune_epochs=2,
    ),
    "quick": Settings(),
    "full": Settings(data="cifar10", image_size=None, source=7, width=16, episodes=10, epochs=30, distill_epochs=60),
}  # fmt: skip


def trunk(channels: int, width: int) -> nn.Module:
    """Three convolutions with batch norm, the pooled features of the last."""
    layers: list[nn.Module] = []
    for k, (a, b) in enumerate(((channels, width), (width, 2 * width), (2 * width, 2 * width))):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if k < 2 else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers)


def network(body: nn.Module, width: int, classes: int) -> nn.Module:
    """A trunk and a linear head."""
    return nn.Sequential(OrderedDict(trunk=body, head=nn.Linear(width, classes)))


class Study:
    """What the arms of one seed share: data, and the networks they compare."""

    def __init__(self, run: Run[Settings]) -> None:
        self.run, self.settings = run, run.settings
        s = run.settings
        data = run.data(s.data, image_size=s.image_size, train_size=s.train_size, val=s.val_size)
        self.source, self.target = split_classes(data, s.source)
        self.channels = self.source["train"][0].shape[1]

    def build(self, width: int | None = None) -> nn.Module:
        """A fresh network for the source classes."""
        width = width or self.settings.width
        return network(trunk(self.channels, width), 2 * width, self.settings.source)

    def train(self, net: nn.Module, seed: int, epochs: int | None = None, **options: Any) -> None:
        """The source task: SGD with Nesterov momentum, half a cosine."""
        own = {"optimizer": sgd(0.1, 0.9, 5e-4), "scheduler": cosine(), "batch_size": 128, "device": self.run.device}
        fit(net, self.source["train"], epochs=epochs or self.settings.epochs, seed=seed, **{**own, **options})

    def probe(self, features: nn.Module) -> dict[str, float]:
        """Accuracy on the new classes by features."""
        return probe(features, self.target, draws=self.settings.draws, seed=self.run.seed)

    def episodes(self) -> list[nn.Module]:
        """The networks of all episodes."""
        return train_episodes(self.build, self.train, [1000 * self.run.seed + k for k in range(self.settings.episodes)])

    def single(self) -> dict[str, Any]:
        """The episodes, alone and together; they are kept for the arms that follow."""
        self.models = self.episodes()
        trunks = [split_head(net)[0] for net in self.models]
        alone = [self.probe(t) for t in trunks]
        logits = torch.stack([outputs(net, self.source["test"]) for net in self.models])
        y = self.source["test"][1]
        joint = self.probe(Concatenated(trunks))
        copies = self.probe(Concatenated([copy.deepcopy(trunks[0]) for _ in trunks]))
        return {
            "full": sum(a["full"] for a in alone) / len(alone), "best": max(a["full"] for a in alone),
            "few": sum(a["few"] for a in alone) / len(alone), "cat": joint["full"], "cat_few": joint["few"],
            "copies": copies["full"], "one": alone[0]["full"], "ridge": ridge_gap(trunks[0], self.target, len(trunks)),
            "source": 100 * sum(accuracy(z, y) for z in logits) / len(logits),
            "cat_source": 100 * accuracy(logits.mean(0), y),
        }  # fmt: skip

    def wider(self, width: int) -> dict[str, float]:
        """One network of another width."""
        net = self.build(width)
        self.train(net, self.run.seed)
        return {**self.probe(split_head(net)[0]), "parameters": float(sum(p.numel() for p in net.parameters()))}

    def joint(self) -> dict[str, float]:
        """The architecture of the concatenation, trained from scratch as one network."""
        s = self.settings
        body = Concatenated([trunk(self.channels, s.width) for _ in range(s.episodes)], frozen=False)
        self.train(network(body, 2 * s.width * s.episodes, s.source), self.run.seed)
        return self.probe(body)

    def snapshots(self) -> dict[str, float]:
        """States of one training at a high constant rate, as the episodes."""
        s, kept = self.settings, Snapshots(self.settings.episodes, every=max(1, self.settings.epochs // 3))
        net = self.build()
        self.train(net, self.run.seed, kept.every * s.episodes, scheduler=None, callbacks=[kept])
        members = [copy.deepcopy(net) for _ in kept.states]
        for member, state in zip(members, kept.states, strict=True):
            member.load_state_dict(state)
        return self.probe(Concatenated([split_head(m)[0] for m in members]))

    def distilled(self, heads: str) -> dict[str, float]:
        """One trunk that serves all episodes' heads."""
        body = trunk(self.channels, self.settings.width)
        self.train(body, self.run.seed, self.settings.distill_epochs, rule=RichDistillation(self.models, 10.0, heads))
        return self.probe(body)

    def longer(self) -> dict[str, float]:
        """One network, trained as long as the distillation."""
        net = self.build()
        self.train(net, self.run.seed, self.settings.distill_epochs)
        return self.probe(split_head(net)[0])

    def finetuned(self, labels: int) -> dict[str, float]:
        """Fine-tuning on few labels: each network, the concatenation as a whole, and in two stages."""
        s, bodies = self.settings, [split_head(net)[0] for net in self.models]
        epochs = max(1, round(s.finetune_epochs * 20 / labels))
        return finetune(bodies, 2 * s.width, network, self.target, labels=labels, lrs=s.lrs, epochs=epochs,
                        seed=self.run.seed, device=self.run.device)  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Episodes first; then what is compared with them."""
    s, study = run.settings, Study(run)
    base = run.arm("episodes", study.single)
    if not hasattr(study, "models"):  # a resumed run has the arm, but not the networks
        study.models = study.episodes()
    wide = run.arm("wide_parameters", study.wider, round(s.width * s.episodes**0.5))
    run.arm("wide_features", study.wider, s.width * s.episodes)
    run.arm("joint", study.joint)
    run.arm("snapshots", study.snapshots)
    run.values("transfer", cat=base["cat"], single=base["full"], best=base["best"], wide=wide["full"])
    run.values("few_shot", cat=base["cat_few"], single=base["few"], wide=wide["few"])
    run.values("source_task", cat=base["cat_source"], single=base["source"])
    run.values("negative_control", copies=base["copies"], single=base["one"], ridge=base["ridge"])
    separate = run.arm("distilled", study.distilled, "separate")
    averaged = run.arm("distilled_averaged", study.distilled, "averaged")
    longer = run.arm("longer", study.longer)
    run.values("distillation", distilled=separate["full"], single=longer["full"], averaged_head=averaged["full"])
    tuned = {labels: run.arm(f"finetuned_{labels}", study.finetuned, labels) for labels in (20, 50)}
    measured = {f"{name}_{k}": tuned[k][name] for k in tuned for name in ("single", "naive", "two_stage")}
    low = {"two_stage_low": tuned[20]["two_stage_low"], "naive_low": tuned[20]["naive_low"]}
    run.values("two_stage", {**measured, **low})


ARMS = {
    "one network": ("episodes", "full"),
    "five concatenated": ("episodes", "cat"),
    "as many parameters": ("wide_parameters", "full"),
    "as many features": ("wide_features", "full"),
    "trained jointly": ("joint", "full"),
    "snapshots": ("snapshots", "full"),
    "distilled": ("distilled", "full"),
}


def figures(results: Results) -> plots.Figures:
    """Probes of new classes, with all labels and with five for each class."""
    few_labels = {n: (a, {"full": "few", "cat": "cat_few"}[k]) for n, (a, k) in ARMS.items()}
    return {
        "transfer": plots.bars(results, ARMS, ylabel="probe accuracy on new classes (%)"),
        "few shot": plots.bars(results, few_labels, ylabel="accuracy from 5 labels a class (%)"),
    }
