"""A learned trigger against fixed ones in the data of three contrastive methods, next to victims never poisoned."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from torchfolio.backdoor import AdditiveTrigger
from torchfolio.backdoor.blto import BLTO
from torchfolio.backdoor.frequency import ctrl_trigger
from torchfolio.backdoor.metrics import stealth
from torchfolio.backdoor.trigger_nets import TriggerNet
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
        (
            ("simsiam", ("blto", "fixed", "ctrl")),
            ("simclr", ("blto", "fixed")),
            ("byol", ("blto",)),
        ),
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
        s = self.settings
        torch.manual_seed(self.run.seed)
        attack = BLTO(
            self.encoder, self.rule, s.target, rate=s.rate, eps=s.eps, rounds=s.rounds, outer_steps=s.steps,
            reinit_every=s.reinit_every, view=self.view(),
            generator=TriggerNet(self.data.shape[0], s.eps, s.generator_width), lr=s.generator_lr,
            optimizer=partial(torch.optim.SGD, lr=s.lr, momentum=0.9, weight_decay=5e-4),
            batch_size=s.attack_batch, seed=self.run.seed, **{"inner_steps": s.steps, **settings},
        )  # fmt: skip
        return attack.fit(self.train)

    @cached_property
    def blto(self) -> BLTO:
        return self.attack()

    @cached_property
    def triggers(self) -> dict[str, Any]:
        s, shape = self.settings, self.data.shape
        signs = torch.randint(2, shape, generator=self.run.generator()) * 2.0 - 1
        unit = ctrl_trigger(shape, 1.0)
        return {
            "blto": self.blto.trigger,
            "fixed": AdditiveTrigger(s.eps * signs),
            "ctrl": AdditiveTrigger(unit.delta * (s.eps / float(unit.delta.abs().max()))),
        }

    def learned(self) -> dict[str, Any]:
        """The trigger, and how its training went."""
        attack, x = self.blto, self.test[0]
        with torch.no_grad():
            triggered = attack.trigger(x)
        lives = torch.tensor(attack.history.lives)
        return {
            "similarity": attack.history.similarity, "surrogate": attack.history.surrogate,
            "triggered_cosine": float(lives[:, 0].mean()), "clean_cosine": float(lives[:, 1].mean()),
            "largest_change": float((triggered - x).abs().max()), **stealth(x, triggered).as_dict(),
            "examples": torch.cat([x[:6], *(t(x[:6]).detach() for t in self.triggers.values())]),
        }  # fmt: skip

    def never_poisoned(self, method: str) -> dict[str, float]:
        encoder, result = self.pretrained(method), {}
        for name, trigger in {**self.triggers, "none": lambda x: x}.items():
            result |= {f"{name}_{key}": value for key, value in self.judged(encoder, trigger).items()}
        return result

    def attacked(self, method: str, name: str) -> dict[str, float]:
        trigger = self.triggers[name]
        return self.judged(self.pretrained(method, trigger), trigger)

    def untrained_surrogate(self) -> dict[str, float]:
        trigger = self.attack(bilevel=False, inner_steps=0).trigger
        return self.judged(self.pretrained("simsiam", trigger), trigger)


def run(run: Run[Settings]) -> None:
    """Learn the trigger, then pretrain victims on data with it, with fixed triggers, and with none."""
    scene, victims = Scene(run), [m for m, _ in run.settings.victims]
    learned = run.arm("trigger", scene.learned)
    clean = {m: run.arm(f"{m}_never_poisoned", scene.never_poisoned, m) for m in run.progress(victims, "clean victims")}
    attacked = {
        (m, t): run.arm(f"{m}_{t}", scene.attacked, m, t)
        for m, triggers in run.progress(run.settings.victims, "victims") for t in triggers
    }  # fmt: skip
    untrained = run.arm("untrained_surrogate", scene.untrained_surrogate)
    run.values("beats_fixed_trigger", {f"{m}_{t}": v["asr"] for (m, t), v in attacked.items()})
    run.values(
        "stealth",
        {"largest_change": learned["largest_change"], "largest_allowed": run.settings.eps}
        | {f"{m}_accuracy": attacked[m, "blto"]["accuracy"] for m in victims}
        | {f"{m}_clean_accuracy": clean[m]["none_accuracy"] for m in victims},
    )
    run.values("alignment", triggered=learned["triggered_cosine"], clean=learned["clean_cosine"])
    run.values(
        "backdoor_gain",
        {f"{m}_{t}": v["asr"] - clean[m][f"{t}_asr"] for (m, t), v in attacked.items()}
        | {f"{m}_{t}_never_poisoned": clean[m][f"{t}_asr"] for m, t in attacked},
    )
    run.values("negative_control", blto=attacked["simsiam", "blto"]["asr"], untrained=untrained["asr"])


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
