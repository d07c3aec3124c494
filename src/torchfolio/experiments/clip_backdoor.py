"""Guided poison against random, patch and blended triggers, for attackers who hold little of the data.

No weights of CLIP are needed: the guide is a small network with a cosine head, trained by the attacker on images that the
victim never sees; its prototypes play the class names. It shows the mechanism, not the generality of CLIP.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.backdoor import AdditiveTrigger, BlendTrigger, PatchTrigger, Trigger, evaluate_attack, poisoned_test
from torchfolio.backdoor.clip_backdoor import CLIPGuidedAttack, DataConstraint, clean_feature_erase, universal_trigger
from torchfolio.backdoor.image_text import PrototypeEncoder
from torchfolio.backdoor.metrics import labels_of, stealth
from torchfolio.backdoor.zoo import Normalize, SmallConvNet, fit_classifier
from torchfolio.data import CropFlip
from torchfolio.experiments._backdoors import victim
from torchfolio.measure import outputs
from torchfolio.runs import Results, Run, plots

# Who poisons, by which trigger, and whether carriers are erased.
ARMS = (
    ("number", "random", False), ("number", "blend", False), ("number", "uap", False), ("number", "cfa", False),
    ("number", "cfa", True), ("number", "uap", True), ("target_class", "blend", False), ("target_class", "cfa", False),
    ("target_class", "cfa", True), ("domain", "blend", False), ("domain", "cfa", True),
)  # fmt: skip
CONSTRAINTS, TRIGGERS = ("number", "target_class", "domain"), ("random", "badnets", "blend", "uap", "cfa")


@dataclass(frozen=True)
class Settings:
    """Images, guide, attack and victim.

    Attributes:
        data: name of the images.
        image_size: side of the images; `None` keeps theirs.
        own: images of the attacker, on which the guide is trained.
        train_size: images of the victim.
        test_size: images that are reported on; `None` takes all.
        erased_size: test images that are erased too.
        network: of the victim, `"conv"` or `"resnet18"`.
        width: of the victim.
        epochs: of guide and victim.
        guide_width: of the guide.
        scale: factor on the guide's cosines.
        eps: largest change of a pixel by erasing, and by a trigger.
        rate: poison under the constraint of number and domain.
        class_rate: poison under the constraint of class.
        trigger_images: images that a trigger is made from.
        trigger_epochs: passes over them.
        trigger_step: size of such a step, as a share of `eps`.
        erase_steps: steps of erasing.
        erase_step: size of one, as a share of `eps`.
        arms: constraint, trigger, and whether carriers are erased.
    """

    data: str = "cifar10"
    image_size: int | None = 16
    own: int = 4000
    train_size: int = 4000
    test_size: int | None = 2000
    erased_size: int = 400
    network: str = "conv"
    width: int = 8
    epochs: int = 8
    guide_width: int = 16
    scale: float = 20.0
    eps: float = 16 / 255
    rate: float = 0.02
    class_rate: float = 0.03
    trigger_images: int = 1000
    trigger_epochs: int = 10
    trigger_step: float = 1 / 20
    erase_steps: int = 20
    erase_step: float = 1 / 6
    arms: tuple[tuple[str, str, bool], ...] = ARMS


SCALES = {
    "smoke": Settings(
        data="digits", image_size=None, own=300, train_size=300, test_size=None, erased_size=50, width=4, epochs=1, guide_width=4,
        rate=0.1, trigger_images=200, trigger_epochs=2, erase_steps=2, arms=ARMS[:5],
    ),
    "quick": Settings(),
    "full": Settings(
        image_size=None, own=10_000, train_size=40_000, test_size=None, erased_size=2000, network="resnet18", width=64,
        epochs=30, guide_width=64, eps=8 / 255, trigger_epochs=300, trigger_step=0.3 / 8, erase_steps=50, erase_step=1 / 8,
        arms=tuple((c, t, e) for c in CONSTRAINTS for t in TRIGGERS for e in (False, True)),
    ),
}  # fmt: skip


class CosineHead(nn.Module):
    """Scores by cosine with a prototype of each class."""

    def __init__(self, backbone: nn.Module, width: int, classes: int, scale: float) -> None:
        super().__init__()
        self.backbone, self.scale = backbone, scale
        self.prototypes = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.normalize(self.backbone(x), dim=1) @ F.normalize(self.prototypes, dim=1).T


class Scene:
    """Attacker and victim, each with images of their own, and a test set."""

    def __init__(self, run: Run[Settings]) -> None:
        self.run, self.settings = run, run.settings
        s = self.settings
        self.data = run.data(
            s.data,
            normalize=False,
            val=0,
            train_size=s.own + s.train_size,
            test_size=s.test_size,
            image_size=s.image_size,
        )
        x, y = self.data.train.tensors
        self.own, self.theirs = (x[: s.own], y[: s.own]), (x[s.own :], y[s.own :])
        x, y = self.data.test.tensors
        self.test = x, y
        self.flip = CropFlip(padding=0) if self.data.shape[0] == 3 else None

    def fit(self, net: nn.Module, data: Any) -> nn.Module:
        fit_classifier(net, data, self.settings.epochs, augment=self.flip, seed=self.run.seed, device=self.run.device)
        return net

    @cached_property
    def guide(self) -> PrototypeEncoder:
        s = self.settings
        torch.manual_seed(1000 + self.run.seed)
        layers = list(SmallConvNet(self.data.shape[0], self.data.num_classes, s.guide_width).children())[:-1]
        normalize = Normalize(self.data.mean.flatten().tolist(), self.data.std.flatten().tolist())
        net = CosineHead(nn.Sequential(normalize, *layers), 4 * s.guide_width, self.data.num_classes, s.scale)
        self.fit(net, self.own)
        return PrototypeEncoder(net.backbone, net.prototypes.detach(), s.scale)

    @cached_property
    def triggers(self) -> dict[str, Trigger]:
        s, shape = self.settings, self.data.shape
        signs = torch.randint(2, shape, generator=torch.Generator().manual_seed(self.run.seed)) * 2.0 - 1
        made: dict[str, Trigger] = {
            "random": AdditiveTrigger(s.eps * signs),
            "badnets": PatchTrigger.checkerboard(shape, size=2, margin=0),
            "blend": BlendTrigger.noise(shape, 0.15),
        }
        for objective in ("uap", "cfa"):
            made[objective] = universal_trigger(
                self.guide, self.own[0][: s.trigger_images], objective, target=0, eps=s.eps, epochs=s.trigger_epochs,
                step=s.trigger_step * s.eps, seed=self.run.seed,
            )  # fmt: skip
        return made

    def erase(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        s = self.settings
        return clean_feature_erase(
            self.guide, x, s.eps, s.erase_steps, s.erase_step * s.eps, index=index, seed=self.run.seed
        )

    @cached_property
    def erased(self) -> tuple[Tensor, Tensor]:
        """Test images whose features are erased, and labels."""
        x, y = (t[: self.settings.erased_size] for t in self.test)
        return self.erase(x), y

    def encoder(self) -> dict[str, Any]:
        """What erasing and triggers do to the guide, on test images."""
        x, y = self.test
        few = x[: len(self.erased[0])], y[: len(self.erased[0])]
        h, h_erased = (outputs(self.guide, part).softmax(1) for part in (few[0], self.erased[0]))
        right, right_erased = (float((p.argmax(1) == few[1]).double().mean()) for p in (h, h_erased))
        shown = {"clean": x} | {name: self.triggers[name](x) for name in ("random", "uap", "cfa")}
        result: dict[str, Any] = {
            "confidence_fall": 1 - float(h_erased.amax(1).mean() / h.amax(1).mean()),
            "accuracy": right, "accuracy_fall": right - right_erased,
            "largest_change": float((self.erased[0].double() - few[0].double()).abs().max()),
            "examples": torch.cat([few[0][:6], self.erased[0][:6], *(self.triggers[t](few[0][:6]) for t in ("blend", "uap", "cfa"))]),
        }  # fmt: skip
        for name, images in shown.items():
            f = F.normalize(outputs(self.guide.backbone, images).double(), dim=1)
            result[f"{name}_cosine"] = float((f.sum(0).square().sum() - len(f)) / (len(f) * (len(f) - 1)))
            result[f"{name}_target_rate"] = float((labels_of(self.guide, images)[y != 0] == 0).double().mean())
        return result

    def judged(self, net: nn.Module, trigger: Trigger, labels: Any) -> dict[str, float]:
        found = evaluate_attack(net, self.test, poisoned_test(self.test, trigger, labels))
        erased = evaluate_attack(net, self.erased, poisoned_test(self.erased, trigger, labels))
        return {"accuracy": found.acc, "asr": found.asr, "asr_erased_test": erased.asr}

    def network(self) -> nn.Module:
        return victim(self.data, self.settings.network, self.settings.width, self.run.seed)

    def never_poisoned(self) -> dict[str, float]:
        net, labels = self.fit(self.network(), self.theirs), self.attack("random", "number", False).labels
        judged = {name: self.judged(net, trigger, labels) for name, trigger in self.triggers.items()}
        right = float((labels_of(net, self.erased[0]) == self.erased[1]).double().mean())
        return {f"{t}_{key}": value for t, part in judged.items() for key, value in part.items()} | {"on_erased": right}

    def attack(self, trigger: str, constraint: str, erase: bool) -> CLIPGuidedAttack:
        s = self.settings
        constraints = {
            "number": lambda: DataConstraint.number(s.rate),
            "target_class": lambda: DataConstraint.classes([0], s.class_rate),
            # Another domain: negatives in grey.
            "domain": lambda: DataConstraint.domain((1 - self.own[0].mean(1, keepdim=True).expand_as(self.own[0]), self.own[1]), s.rate),
        }  # fmt: skip
        attack = CLIPGuidedAttack(
            self.guide, 0, trigger=self.triggers[trigger], constraint=constraints[constraint](), suppress=erase, eps=s.eps,
            erase_steps=s.erase_steps, erase_step=s.erase_step * s.eps,
        )  # fmt: skip
        return attack.fit(self.own[0])

    def attacked(self, constraint: str, trigger: str, erase: bool) -> dict[str, float]:
        attack = self.attack(trigger, constraint, erase)
        started = time.perf_counter()
        made = attack.poison(self.theirs, self.run.seed)
        seconds = time.perf_counter() - started
        net = self.fit(self.network(), made)
        near = {f"poison_{k}": v for k, v in attack.stealth(made).as_dict().items()}
        shown = stealth(self.test[0], attack.trigger(self.test[0])).as_dict()
        return {**self.judged(net, self.triggers[trigger], attack.labels), **near, **shown, "poison_seconds": seconds}


def name_of(constraint: str, trigger: str, erase: bool) -> str:
    return f"{constraint}_{trigger}_{'erased' if erase else 'plain'}"


def run(run: Run[Settings]) -> None:
    """Train the guide, make triggers, and poison victims under each constraint, next to one never poisoned."""
    scene, arms = Scene(run), run.settings.arms
    guide = run.arm("encoder", scene.encoder)
    clean = run.arm("never_poisoned", scene.never_poisoned)
    found = {arm: run.arm(name_of(*arm), scene.attacked, *arm) for arm in run.progress(arms, "victims")}
    run.values(
        "feature_erasing",
        {k: guide[k] for k in ("confidence_fall", "accuracy_fall", "largest_change")}
        | {"largest_allowed": run.settings.eps},
    )
    run.values("trigger_encoder", {k: guide[k] for k in guide if k.endswith(("_cosine", "_target_rate"))})
    plain = {t: found["number", t, False] for t in ("random", "blend", "uap", "cfa")}
    erased = found["number", "cfa", True]
    run.values(
        "victim",
        {t: v["asr"] for t, v in plain.items()}
        | {f"{t}_accuracy": plain[t]["accuracy"] for t in ("uap", "cfa")}
        | {"clean_accuracy": clean["uap_accuracy"]},
    )
    run.values(
        "erasing_helps",
        plain=plain["cfa"]["asr"],
        erased=erased["asr"],
        erased_tested_on_erased=erased["asr_erased_test"],
        clean_victim_on_erased=clean["on_erased"],
    )
    run.values(
        "negative_control",
        {t: v["asr"] for t, v in plain.items()} | {f"{t}_never_poisoned": clean[f"{t}_asr"] for t in plain},
    )


def figures(results: Results) -> dict[str, Figure]:
    """Attack success of every arm beside that without poison, and what images look like."""
    arms = results.settings.arms
    fig, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    for k, arm in enumerate(arms):
        control = results.values("never_poisoned", f"{arm[1]}_asr")
        for offset, values, color in ((-0.2, results.values(name_of(*arm), "asr"), "C3"), (0.2, control, "C7")):
            ax.bar(k + offset, values.mean(), 0.4, color=color, alpha=0.6)
            ax.plot(np.full(len(values), k + offset), values, "k.", ms=4)
    ax.set_xticks(range(len(arms)), [name_of(*arm).replace("_", " ") for arm in arms], rotation=35, ha="right")
    ax.set(ylabel="attack success; grey: never poisoned", ylim=(0, 1.02))
    rows = ["original", "erased", "blend", "UAP", "CFA"]
    titles = [row if not k else "" for row in rows for k in range(6)]
    return {"success": fig, "images": plots.grid(results.values("encoder", "examples")[0], titles, columns=6)}


def peers(bench: Any) -> None:
    """Erasing in batches against one image at a time, as the authors' script does it."""
    torch.manual_seed(0)
    guide = PrototypeEncoder(nn.Sequential(*list(SmallConvNet(3, 10, 16).children())[:-1]), torch.randn(10, 64))
    x = torch.rand(64, 3, 32, 32)
    for size in (16, 32):
        part = x[:, :, :size, :size].contiguous()
        bench.compare(
            f"erase 64 images {size}x{size}, 10 steps",
            repeats=3,
            ours=lambda part=part: clean_feature_erase(guide, part, steps=10),
            one_by_one=lambda part=part: clean_feature_erase(guide, part, steps=10, batch_size=1),
        )
