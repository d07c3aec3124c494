"""How often a certified system abstains: trained cleanly, on poison of several kinds, and with an attacker's loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torchfolio.experiments._abstain_audits import ETAS, AbstainAudit
from torchfolio.experiments._certified_networks import CertifiedNetworks, spectral_auroc
from torchfolio.robustness.certifier_availability import AvailabilityBackdoor, GaussianNoise, SmoothingCertifier
from torchfolio.robustness.label_conflicts import BallConflict, LabelConflict, LabelSplit, PoisonRule, TargetLabel, bars
from torchfolio.runs import Results, Run, pick, plots, setting


@dataclass(frozen=True)
class Settings:
    """Network, training, attacks and defences."""

    data: str = setting("mnist10k", "set of images")
    hidden: tuple[int, ...] = setting((128, 128), "widths of the hidden layers")
    eps: float = setting(0.1, "radius of the certificates")
    epochs: int = setting(16, "passes of each training")
    batch_size: int = setting(100, "examples of a step")
    lr: float = setting(1e-3, "rate of Adam")
    rate: float = setting(0.01, "number of poisoned samples over that of the clean ones")
    all_rules: bool = setting(False, "whether poison with other conflicting labels is tried too")
    rows: int = setting(3, "rows of the trigger at the top, and at the bottom")
    crown: int = setting(200, "test images that CROWN certifies beside intervals")
    sigma: float = setting(0.25, "deviation of the smoothed networks' noise")
    radius: float = setting(0.25, "radius of their certificates")
    samples: int = setting(400, "noisy inputs of a count")
    smoothed: int = setting(100, "test images that are certified by smoothing")
    trusted: float = setting(0.05, "share of the training images that defences may use")
    repair_epochs: int = setting(2, "their passes")
    pruned: float = setting(0.2, "share of the last hidden units that pruning takes out")


SCALES = {
    "smoke": Settings(
        data="digits", hidden=(32,), epochs=3, rows=1, all_rules=True, crown=50, smoothed=50, samples=100
    ),
    "quick": Settings(),
    "full": Settings(
        data="cifar10", hidden=(1024, 512), eps=2 / 255, epochs=30, all_rules=True, crown=500, samples=1000
    ),
}


def run(run: Run[Settings]) -> None:
    """Train every network, audit it, and try the defences."""
    s, scene = run.settings, Scene(run)
    rules: dict[str, PoisonRule] = {"split": LabelSplit(), "target": TargetLabel()}
    if s.all_rules:
        rules |= {"conflict": LabelConflict(), "ball": BallConflict(s.eps)}
    clean = run.arm("clean", scene.clean)
    poisoned = {name: run.arm(name, scene.poisoned, rule) for name, rule in rules.items()}
    attack = run.arm("loss_attack", scene.attacked)
    smooth = run.arm("smoothing", scene.smoothed)
    split, target = poisoned["split"], poisoned["target"]
    triggered = {name: arm["triggered"] for name, arm in poisoned.items() if name != "target"}
    smoothed = {"smoothed": smooth["split"], "smoothed_clean": smooth["clean"]}
    run.values("poisoning", triggered | smoothed, clean=clean["triggered"], by_crown=split["crown"])
    usual = {"clean_accuracy": clean["accuracy"], "clean_abstains": clean["abstains"]}
    run.values("stealth", usual | pick(split, "accuracy", "abstains"))
    run.values("loss_attack", usual | pick(attack, "triggered", "abstains"), raw_accuracy=attack["triggered_accuracy"])
    unharmed = {"clean": clean["triggered"], "never_poisoned": clean["success"]}
    run.values("negative_control", unharmed | pick(target, "success", "triggered"))
    repaired = pick(attack, "finetuned", "pruned") | {"split_finetuned": split["finetuned"]}
    run.values("finetuning", repaired, spectral_auroc=split["spectral_auroc"])
    run.values("natural", pick(clean, *ETAS))


class Scene:
    """The arms: a training each, and its audit."""

    def __init__(self, run: Run[Settings]) -> None:
        self.run, self.settings = run, run.settings
        self.data = run.data(run.settings.data, val=0, normalize=False)
        self.test: Any = self.data.test.tensors
        self.trigger = partial(bars, rows=run.settings.rows)
        self.networks = CertifiedNetworks(run, self.data)
        self.audit = AbstainAudit(self.test, self.trigger, self.settings.eps)

    def clean(self) -> dict[str, Any]:
        """The network without an attack in training, and inputs that abstain near those that do not."""
        net = self.networks.certified(self.networks.train)
        return {**self.audit(net), **self.audit.by_crown(net, self.settings.crown), **self.audit.nearby(net)}

    def poisoned(self, rule: PoisonRule) -> dict[str, Any]:
        """A network trained on poison; for the label split also what defences make of it."""
        bad = self.networks.poisoned(rule, self.trigger)
        net = self.networks.certified(bad.tensors())
        audit = self.audit(net)
        if isinstance(rule, LabelSplit):
            finetuned = self.audit(self.networks.finetuned(net))["triggered"]
            audit |= {"spectral_auroc": spectral_auroc(net, bad), "finetuned": finetuned}
            audit |= self.audit.by_crown(net, self.settings.crown)
        return audit

    def attacked(self) -> dict[str, Any]:
        """A network trained with the attacker's loss, and what is left of the attack after finetuning and pruning."""
        networks = self.networks
        rule = AvailabilityBackdoor(self.trigger, self.settings.eps).on(networks.rule())
        net = networks.fitted(networks.train, rule)
        audit = self.audit(net)
        repaired = {"finetuned": networks.finetuned(net), "pruned": networks.finetuned(networks.pruned(net))}
        for name, after in repaired.items():
            again = self.audit(after)
            audit |= {name: again["triggered"], f"{name}_accuracy": again["accuracy"]}
        return audit

    def smoothed(self) -> dict[str, float]:
        """Abstain rates of smoothed networks on triggered images: trained cleanly, on labels split over all classes."""
        s, networks = self.settings, self.networks
        x, rates = self.test[0][: s.smoothed], {}
        poisoned = networks.poisoned(LabelSplit(None), self.trigger)
        for name, data in {"clean": networks.train, "split": poisoned.tensors()}.items():
            net = networks.fitted(data, GaussianNoise(s.sigma))
            certifier = SmoothingCertifier(net, s.sigma, s.radius, n=s.samples, seed=self.run.seed)
            rates[name] = certifier.certify(self.trigger(x)).abstain_rate
            rates[f"{name}_untriggered"] = certifier.certify(x).abstain_rate
        return rates


def figures(results: Results) -> plots.Figures:
    """Abstain rates by attack, and the fallback's load by the share of attacked requests."""
    arms = {"clean": "clean", "label split": "split", "one target": "target", "loss": "loss_attack"}
    rates = {
        images: {label: (arm, rate) for label, arm in arms.items()}
        for images, rate in (("triggered images", "triggered"), ("clean images", "abstains"))
    }
    loads = {label: (arm, "load") for label, arm in arms.items()}
    shares = [k / 20 for k in range(21)]
    across, up = "share of requests with the trigger", "share that reaches the fallback"
    return {
        "abstain rate": plots.groups(results, rates, ylabel="abstains"),
        "load": plots.curves(results, loads, x=shares, xlabel=across, ylabel=up),
    }
