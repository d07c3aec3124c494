"""Guided poison against random, patch and blended triggers, for attackers who hold little of the data.

No weights of CLIP are needed: the guide is a small network with a cosine head, trained by the attacker on images that
the victim never sees; its prototypes play the class names. It shows the mechanism, not the generality of CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torchfolio.backdoor import AllToOne, LabelMap, Trigger, poisoned_test
from torchfolio.backdoor.metrics import accuracy_of, attack_metrics, stealth
from torchfolio.experiments._backdoors import victim
from torchfolio.experiments._guided_attacker import GuidedAttacker
from torchfolio.measure import timed
from torchfolio.runs import Results, Run, pick, plots, setting

# Who poisons, by which trigger, and whether carriers are erased.
ARMS = (
    ("number", "random", False), ("number", "blend", False), ("number", "uap", False), ("number", "cfa", False),
    ("number", "cfa", True), ("number", "uap", True), ("target_class", "blend", False), ("target_class", "cfa", False),
    ("target_class", "cfa", True), ("domain", "blend", False), ("domain", "cfa", True),
)  # fmt: skip
CONSTRAINTS, TRIGGERS = ("number", "target_class", "domain"), ("random", "badnets", "blend", "uap", "cfa")


@dataclass(frozen=True)
class Settings:
    """Images, guide, attack and victim."""

    data: str = setting("cifar10", "name of the images")
    image_size: int | None = setting(16, "side of the images; `None` keeps theirs")
    own: int = setting(4000, "images of the attacker, on which the guide is trained")
    train_size: int = setting(4000, "images of the victim")
    test_size: int | None = setting(2000, "images that are reported on; `None` takes all")
    erased_size: int = setting(400, "test images that are erased too")
    network: str = setting("conv", 'kind of the victim, `"conv"` or `"resnet18"`')
    width: int = setting(8, "width of the victim")
    epochs: int = setting(8, "number of epochs of guide and victim")
    guide_width: int = setting(16, "width of the guide")
    scale: float = setting(20.0, "factor on the guide's cosines")
    eps: float = setting(16 / 255, "largest change of a pixel by erasing, and by a trigger")
    rate: float = setting(0.02, "poison under the constraint of number and domain")
    class_rate: float = setting(0.03, "poison under the constraint of class")
    trigger_images: int = setting(1000, "images that a trigger is made from")
    trigger_epochs: int = setting(10, "passes over them")
    trigger_step: float = setting(1 / 20, "size of such a step, as a share of `eps`")
    erase_steps: int = setting(20, "steps of erasing")
    erase_step: float = setting(1 / 6, "size of one, as a share of `eps`")
    arms: tuple[tuple[str, str, bool], ...] = setting(ARMS, "constraint, trigger, and whether carriers are erased")


SCALES = {
    "smoke": Settings(
        data="digits", image_size=None, own=300, train_size=300, test_size=None, erased_size=50, width=4, epochs=1,
        guide_width=4, rate=0.1, trigger_images=200, trigger_epochs=2, erase_steps=2, arms=ARMS[:5],
    ),
    "quick": Settings(),
    "full": Settings(
        image_size=None, own=10_000, train_size=40_000, test_size=None, erased_size=2000, network="resnet18", width=64,
        epochs=30, guide_width=64, eps=8 / 255, trigger_epochs=300, trigger_step=0.3 / 8, erase_steps=50,
        erase_step=1 / 8,
        arms=tuple((c, t, e) for c in CONSTRAINTS for t in TRIGGERS for e in (False, True)),
    ),
}  # fmt: skip


class Scene(GuidedAttacker):
    """The attacker at work on victims."""

    def network(self) -> nn.Module:
        """A new victim."""
        return victim(self.data, self.settings.network, self.settings.width, self.run.seed)

    def judged(self, net: nn.Module, trigger: Trigger, labels: LabelMap) -> dict[str, float]:
        """Accuracy and attack success, on test images and on erased ones."""
        plain, erased = (attack_metrics(net, x, poisoned_test(x, trigger, labels)) for x in (self.test, self.erased))
        return {"accuracy": plain.acc, "asr": plain.asr, "asr_erased_test": erased.asr}

    def never_poisoned(self) -> dict[str, float]:
        """A victim without poison, and every trigger on it."""
        net, labels = self.fit(self.network(), self.theirs), AllToOne(0, self.data.num_classes)
        result = {"on_erased": accuracy_of(net, *self.erased)}
        for name, trigger in self.triggers.items():
            result |= {f"{name}_{key}": value for key, value in self.judged(net, trigger, labels).items()}
        return result

    def attacked(self, constraint: str, trigger: str, erase: bool) -> dict[str, float]:
        """A victim, and how far its poison is from carriers and triggered images are from their originals."""
        attack = self.attack(trigger, constraint, erase)
        poisoned, seconds = timed(attack.poison, self.theirs, self.run.seed)
        net = self.fit(self.network(), poisoned)
        carriers = {f"poison_{key}": value for key, value in attack.stealth(poisoned).as_dict().items()}
        originals = stealth(self.test[0], attack.trigger(self.test[0])).as_dict()
        return {
            **self.judged(net, self.triggers[trigger], attack.labels),
            **carriers,
            **originals,
            "poison_seconds": seconds,
        }


def name_of(constraint: str, trigger: str, erase: bool) -> str:
    """Name of an arm."""
    return f"{constraint}_{trigger}_{'erased' if erase else 'plain'}"


def run(run: Run[Settings]) -> None:
    """Train the guide, make triggers, and poison victims under each constraint, next to one never poisoned."""
    scene = Scene(run)
    guide = run.arm("encoder", scene.on_guide)
    clean = run.arm("never_poisoned", scene.never_poisoned)
    arms = {a: run.arm(name_of(*a), scene.attacked, *a) for a in run.progress(run.settings.arms, "victims")}
    falls = pick(guide, "confidence_fall", "accuracy_fall", "largest_change")
    run.values("feature_erasing", falls, largest_allowed=run.settings.eps)
    run.values("trigger_encoder", {k: guide[k] for k in guide if k.endswith(("_cosine", "_target_rate"))})
    plain = {t: arms["number", t, False] for t in ("random", "blend", "uap", "cfa")}
    success = {t: arm["asr"] for t, arm in plain.items()}
    accuracy = {f"{t}_accuracy": plain[t]["accuracy"] for t in ("uap", "cfa")}
    run.values("victim", success | accuracy, clean_accuracy=clean["uap_accuracy"])
    erased = arms["number", "cfa", True]
    on_erased = {"erased_tested_on_erased": erased["asr_erased_test"], "clean_victim_on_erased": clean["on_erased"]}
    run.values("erasing_helps", on_erased, plain=plain["cfa"]["asr"], erased=erased["asr"])
    run.values("negative_control", success, **{f"{t}_never_poisoned": clean[f"{t}_asr"] for t in plain})


def figures(results: Results) -> plots.Figures:
    """Attack success of every arm beside that without poison, and what images look like."""
    names = {name_of(*arm).replace("_", " "): arm for arm in results.settings.arms}
    series = {
        "poisoned": {label: (name_of(*arm), "asr") for label, arm in names.items()},
        "never poisoned": {label: ("never_poisoned", f"{arm[1]}_asr") for label, arm in names.items()},
    }
    titles = [row if not k else "" for row in ("original", "erased", "blend", "UAP", "CFA") for k in range(6)]
    return {
        "success": plots.groups(results, series, ylabel="attack success"),
        "images": plots.grid(results.values("encoder", "examples")[0], titles, columns=6),
    }
