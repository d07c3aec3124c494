"""A learned trigger against fixed ones in the data of three contrastive methods, next to victims never poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torchfolio.backdoor import AdditiveTrigger
from torchfolio.backdoor.blto import BLTO
from torchfolio.backdoor.frequency import ctrl_trigger
from torchfolio.backdoor.metrics import stealth
from torchfolio.backdoor.trigger_nets import TriggerNet
from torchfolio.engine.recipes import sgd
from torchfolio.experiments._contrastive_victims import RULES, ContrastiveVictims
from torchfolio.runs import Results, Run, plots, setting


@dataclass(frozen=True)
class Settings:
    """Images, attack and victims."""

    data: str = setting("digits", "name of the images")
    train_size: int | None = setting(None, "training images; `None` takes all")
    network: str = setting("conv", 'encoder, `"conv"` or `"resnet18"`')
    width: int = setting(16, "channels of its first layer")
    target: int = setting(1, "class that triggered images are to be taken for")
    eps: float = setting(0.3, "largest change of a pixel")
    rate: float = setting(0.05, "share of the images that is poisoned, all of the target class")
    rounds: int = setting(150, "rounds of the attack")
    steps: int = setting(3, "inner and outer steps of a round, each")
    reinit_every: int = setting(50, "rounds of a surrogate's life")
    generator_width: int = setting(16, "channels of the trigger's network")
    generator_lr: float = setting(2e-3, "its learning rate")
    attack_batch: int = setting(64, "images of a step of the attack")
    victims: tuple[tuple[str, tuple[str, ...]], ...] = setting(
        (("simsiam", ("blto", "fixed", "ctrl")), ("simclr", ("blto", "fixed")), ("byol", ("blto",))),
        "contrastive methods, and the triggers that each is attacked with",
    )
    victim_steps: int = setting(250, "steps of a victim")
    lr: float = setting(0.05, "learning rate of surrogates and victims")
    batch_size: int = setting(128, "images of a step of a victim")


SCALES = {
    "smoke": Settings(
        train_size=300, rounds=4, steps=1, reinit_every=2, generator_width=4, victim_steps=3,
        victims=(("simsiam", ("blto", "fixed")), ("simclr", ("blto", "fixed"))),
    ),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", network="resnet18", width=64, eps=8 / 255, rate=0.01, rounds=2000, steps=10, reinit_every=200,
        generator_width=64, generator_lr=1e-4, attack_batch=256, victim_steps=40_000, batch_size=256,
        victims=tuple((m, ("blto", "fixed", "ctrl")) for m in RULES),
    ),
}  # fmt: skip


class Scene(ContrastiveVictims):
    """Triggers, learned and fixed, and what they do to victims."""

    def attack(self, **settings: Any) -> BLTO:
        """The attack with its trigger learned on the training images."""
        s = self.settings
        torch.manual_seed(self.run.seed)
        attack = BLTO(
            self.encoder, self.rule, s.target, rate=s.rate, eps=s.eps, rounds=s.rounds, outer_steps=s.steps,
            reinit_every=s.reinit_every, view=self.view(), lr=s.generator_lr, batch_size=s.attack_batch,
            generator=TriggerNet(self.data.shape[0], s.eps, s.generator_width), seed=self.run.seed,
            optimizer=sgd(s.lr, weight_decay=5e-4, nesterov=False), **{"inner_steps": s.steps, **settings},
        )  # fmt: skip
        return attack.fit(self.train)

    @cached_property
    def blto(self) -> BLTO:
        """The attack as it is meant."""
        return self.attack()

    @cached_property
    def triggers(self) -> dict[str, Any]:
        """The learned trigger and two fixed ones, which change pixels as much."""
        eps, shape = self.settings.eps, self.data.shape
        signs = torch.randint(2, shape, generator=self.run.generator()) * 2.0 - 1
        waves = ctrl_trigger(shape, 1.0).delta
        return {
            "blto": self.blto.trigger,
            "fixed": AdditiveTrigger(eps * signs),
            "ctrl": AdditiveTrigger(waves * (eps / float(waves.abs().max()))),
        }

    def learned(self) -> dict[str, Any]:
        """The trigger, and how its training went."""
        attack, x = self.blto, self.test[0]
        with torch.no_grad():
            triggered = attack.trigger(x)
            examples = torch.cat([x[:6], *(trigger(x[:6]) for trigger in self.triggers.values())])
        lives = torch.tensor(attack.history.lives)
        return {
            "similarity": attack.history.similarity, "examples": examples,
            "triggered_cosine": float(lives[:, 0].mean()), "clean_cosine": float(lives[:, 1].mean()),
            "largest_change": float((triggered - x).abs().max()), **stealth(x, triggered).as_dict(),
        }  # fmt: skip

    def never_poisoned(self, method: str) -> dict[str, float]:
        """What every trigger, and none, does to a victim of clean data."""
        encoder = self.pretrained(method)
        judged = {name: self.judged(encoder, trigger) for name, trigger in self.triggers.items()}
        judged["none"] = self.judged(encoder, nn.Identity())
        return {f"{name}_{key}": value for name, scores in judged.items() for key, value in scores.items()}

    def attacked(self, method: str, trigger: Any) -> dict[str, float]:
        """What a trigger does to a victim of data that it poisoned."""
        return self.judged(self.pretrained(method, trigger), trigger)


def run(run: Run[Settings]) -> None:
    """Learn the trigger, then pretrain victims on data with it, with fixed triggers, and with none."""
    scene, methods = Scene(run), [m for m, _ in run.settings.victims]
    learned = run.arm("trigger", scene.learned)
    clean = {m: run.arm(f"{m}_never_poisoned", scene.never_poisoned, m) for m in run.progress(methods, "clean victims")}
    success, without = {}, {}
    for m, triggers in run.progress(run.settings.victims, "victims"):
        for t in triggers:
            arm = run.arm(f"{m}_{t}", lambda m=m, t=t: scene.attacked(m, scene.triggers[t]))
            success[f"{m}_{t}"], without[f"{m}_{t}"] = arm["asr"], clean[m][f"{t}_asr"]
    untrained = run.arm(
        "untrained_surrogate", lambda: scene.attacked("simsiam", scene.attack(bilevel=False, inner_steps=0).trigger)
    )
    run.values("beats_fixed_trigger", success)
    accuracies = {f"{m}_accuracy": run.arms[f"{m}_blto"]["accuracy"] for m in methods}
    accuracies |= {f"{m}_clean_accuracy": clean[m]["none_accuracy"] for m in methods}
    run.values("stealth", accuracies, largest_change=learned["largest_change"], largest_allowed=run.settings.eps)
    run.values("alignment", triggered=learned["triggered_cosine"], clean=learned["clean_cosine"])
    gains = {name: success[name] - without[name] for name in success}
    run.values("backdoor_gain", gains | {f"{name}_never_poisoned": asr for name, asr in without.items()})
    run.values("negative_control", blto=success["simsiam_blto"], untrained=untrained["asr"])


def figures(results: Results) -> plots.Figures:
    """Success of every trigger beside that without poison, the course of training, and what images look like."""
    pairs = [(m, t) for m, triggers in results.settings.victims for t in triggers]
    series = {
        "poisoned": {f"{m} {t}": (f"{m}_{t}", "asr") for m, t in pairs},
        "never poisoned": {f"{m} {t}": (f"{m}_never_poisoned", f"{t}_asr") for m, t in pairs},
    }
    titles = [row if not k else "" for row in ("original", "BLTO", "fixed", "CTRL") for k in range(6)]
    return {
        "success": plots.groups(results, series, ylabel="attack success"),
        "training": plots.curves(results, {"similarity to the target": ("trigger", "similarity")}, xlabel="round"),
        "images": plots.grid(results.values("trigger", "examples")[0], titles, columns=6),
    }
