"""Measures concatenated features of several trainings: on digits that were not trained on, beside wider networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from torchfolio.experiments._new_classes import finetune, ridge_gap
from torchfolio.experiments._source_networks import SourceNetworks, network, trunk
from torchfolio.measure import accuracy, outputs
from torchfolio.models import parameter_count
from torchfolio.runs import Results, Run, pick, plots, setting
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


class Study(SourceNetworks):
    """The arms of one seed."""

    def single(self) -> dict[str, Any]:
        """The episodes, alone and together."""
        trunks = [split_head(net)[0] for net in self.models]
        each = [self.probe(body) for body in trunks]
        full, few = ([scores[labels] for scores in each] for labels in ("full", "few"))
        joint = self.probe(Concatenated(trunks))
        copies = self.probe(Concatenated([copy.deepcopy(trunks[0]) for _ in trunks]))
        x, y = self.source["test"]
        logits = torch.stack([outputs(net, x) for net in self.models])
        source = [accuracy(z, y) for z in logits]
        return {
            "full": sum(full) / len(full), "best": max(full), "few": sum(few) / len(few), "cat": joint["full"],
            "cat_few": joint["few"], "copies": copies["full"], "one": full[0],
            "ridge": ridge_gap(trunks[0], self.target, len(trunks)),
            "source": 100 * sum(source) / len(source), "cat_source": 100 * accuracy(logits.mean(0), y),
        }  # fmt: skip

    def alone(self, width: int | None = None, epochs: int | None = None) -> dict[str, float]:
        """One network, of another width or trained for longer."""
        net = self.build(width)
        self.train(net, self.run.seed, epochs)
        return {**self.probe(split_head(net)[0]), "parameters": float(parameter_count(net))}

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
    wide = run.arm("wide_parameters", study.alone, round(s.width * s.episodes**0.5))
    run.arm("wide_features", study.alone, s.width * s.episodes)
    run.arm("joint", study.joint)
    run.arm("snapshots", study.snapshots)
    run.values("transfer", cat=base["cat"], single=base["full"], best=base["best"], wide=wide["full"])
    run.values("few_shot", cat=base["cat_few"], single=base["few"], wide=wide["few"])
    run.values("source_task", cat=base["cat_source"], single=base["source"])
    run.values("negative_control", copies=base["copies"], single=base["one"], ridge=base["ridge"])
    separate = run.arm("distilled", study.distilled, "separate")
    averaged = run.arm("distilled_averaged", study.distilled, "averaged")
    longer = run.arm("longer", study.alone, epochs=s.distill_epochs)
    run.values("distillation", distilled=separate["full"], single=longer["full"], averaged_head=averaged["full"])
    tuned = {labels: run.arm(f"finetuned_{labels}", study.finetuned, labels) for labels in (20, 50)}
    measured = {f"{name}_{k}": tuned[k][name] for k in tuned for name in ("single", "naive", "two_stage")}
    run.values("two_stage", measured, **pick(tuned[20], "two_stage_low", "naive_low"))


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
    few = {name: (arm, {"full": "few", "cat": "cat_few"}[key]) for name, (arm, key) in ARMS.items()}
    return {
        "transfer": plots.bars(results, ARMS, ylabel="probe accuracy on new classes (%)"),
        "few shot": plots.bars(results, few, ylabel="accuracy from 5 labels a class (%)"),
    }
