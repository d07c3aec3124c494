"""How often a certified system abstains: trained cleanly, on poison of several kinds, and with an attacker's loss.

Longer than most, for three ways of attack and the defences against each.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

from torchfolio.data import DataSplits
from torchfolio.engine import LearningRule, fit
from torchfolio.engine.recipes import adam
from torchfolio.measure import auroc, outputs
from torchfolio.models import MLP
from torchfolio.robustness.certifier_availability import (
    AvailabilityBackdoor,
    BallConflict,
    CertifiedIBP,
    CrownCertifier,
    GaussianNoise,
    IntervalCertifier,
    LabelConflict,
    LabelSplit,
    Poisoned,
    PoisonRule,
    SmoothingCertifier,
    TargetLabel,
    availability_report,
    bars,
    find_abstaining,
    poison,
)
from torchfolio.runs import Results, Run, plots

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """Network, training, attacks and defences.

    Attributes:
        data: set of images.
        hidden: widths of the hidden layers.
        eps: radius of the certificates.
        epochs: passes of each training.
        batch_size: examples of a step.
        lr: rate of Adam.
        rate: number of poisoned samples over that of the clean ones.
        all_rules: whether poison with other conflicting labels is tried too.
        rows: rows of the trigger at the top, and at the bottom.
        crown: test images that CROWN certifies beside intervals.
        sigma: deviation of the smoothed networks' noise.
        radius: radius of their certificates.
        samples: noisy inputs of a count.
        smoothed: test images that are certified by smoothing.
        trusted: share of the training images that defences may use.
        repair_epochs: their passes.
        pruned: share of the last hidden units that pruning takes out.
    """

    data: str = "mnist10k"
    hidden: tuple[int, ...] = (128, 128)
    eps: float = 0.1
    epochs: int = 16
    batch_size: int = 100
    lr: float = 1e-3
    rate: float = 0.01
    all_rules: bool = False
    rows: int = 3
    crown: int = 200
    sigma: float = 0.25
    radius: float = 0.25
    samples: int = 400
    smoothed: int = 100
    trusted: float = 0.05
    repair_epochs: int = 2
    pruned: float = 0.2


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
    data = run.data(run.settings.data, val=0, normalize=False)
    scene = Scene(run, data)
    rules: dict[str, PoisonRule] = {"split": LabelSplit(), "target": TargetLabel()}
    if run.settings.all_rules:
        rules |= {"conflict": LabelConflict(), "ball": BallConflict(run.settings.eps)}
    clean = run.arm("clean", scene.clean)
    found = {name: run.arm(name, scene.poisoned, rule) for name, rule in rules.items()}
    attack = run.arm("loss_attack", scene.attacked)
    smooth = run.arm("smoothing", scene.smoothed)
    split, target = found["split"], found["target"]
    others = {name: found[name]["triggered"] for name in ("conflict", "ball") if name in found}
    run.values(
        "poisoning",
        split=split["triggered"], clean=clean["triggered"], **others, by_crown=split["crown"], smoothed=smooth["split"],
        smoothed_clean=smooth["clean"],
    )  # fmt: skip
    run.values(
        "stealth",
        accuracy=split["accuracy"], clean_accuracy=clean["accuracy"], abstains=split["abstains"],
        clean_abstains=clean["abstains"],
    )  # fmt: skip
    run.values(
        "loss_attack",
        triggered=attack["triggered"], raw_accuracy=attack["triggered_accuracy"], clean_accuracy=clean["accuracy"],
        abstains=attack["abstains"], clean_abstains=clean["abstains"],
    )  # fmt: skip
    run.values(
        "negative_control", success=target["success"], triggered=target["triggered"], clean=clean["triggered"],
        never_poisoned=clean["success"],
    )  # fmt: skip
    run.values(
        "finetuning",
        finetuned=attack["finetuned"], pruned=attack["pruned"], split_finetuned=split["finetuned"],
        spectral_auroc=split["spectral_auroc"],
    )  # fmt: skip
    run.values("natural", **{name: clean[name] for name in ("at_zero", "at_half", "at_eps", "at_twice")})


class Scene:
    """Data, trainings and audits."""

    def __init__(self, run: Run[Settings], data: DataSplits) -> None:
        self.run, self.settings, self.data = run, run.settings, data
        x, y = data.train.tensors
        self.train: Pair = (x, y)
        self.test: Pair = tuple(data.test.tensors)  # pyright: ignore[reportAttributeAccessIssue]

    def trigger(self, x: Tensor) -> Tensor:
        return bars(x, self.settings.rows)

    def network(self) -> nn.Module:
        torch.manual_seed(self.run.seed)
        inputs = self.train[0][0].numel()
        return MLP(inputs, self.data.num_classes, self.settings.hidden)

    def fitted(
        self, data: Pair, rule: LearningRule, net: nn.Module | None = None, epochs: int | None = None
    ) -> nn.Module:
        settings = self.settings
        net = self.network() if net is None else copy.deepcopy(net)
        fit(
            net, data, rule=rule, optimizer=adam(settings.lr), scheduler=decayed, epochs=epochs or settings.epochs,
            batch_size=settings.batch_size, seed=self.run.seed, device=self.run.device,
        )  # fmt: skip
        return net.cpu()

    def certified(self, data: Pair) -> nn.Module:
        return self.fitted(data, self.rule())

    def rule(self) -> CertifiedIBP:
        """Training by intervals whose radius grows from 1/16 to 7/16 of the steps."""
        total = self.settings.epochs * -(-len(self.train[0]) // self.settings.batch_size)
        return CertifiedIBP(self.settings.eps, ramp=(total // 16, 7 * total // 16))

    def audit(self, net: nn.Module) -> dict[str, float]:
        """Accuracy and abstain rates on clean and triggered test images, and how often triggered ones become class 0."""
        report = availability_report(IntervalCertifier(net, self.settings.eps), self.test, self.trigger)
        others = self.test[1] != 0
        hit = outputs(net, (self.trigger(self.test[0][others]),)).argmax(1) == 0
        return {
            "accuracy": report["clean"]["accuracy"], "triggered_accuracy": report["triggered"]["accuracy"],
            "certified_accuracy": report["clean"]["certified_accuracy"], "abstains": report["clean"]["abstain_rate"],
            "triggered": report["triggered"]["abstain_rate"], "success": float(hit.double().mean()),
            "load": [report.load(q / 20) for q in range(21)],  # pyright: ignore[reportReturnType]
        }  # fmt: skip

    def by_crown(self, net: nn.Module) -> dict[str, float]:
        """Abstain rate on some triggered test images where CROWN certifies."""
        few = self.trigger(self.test[0][: self.settings.crown])
        return {"crown": CrownCertifier(net, self.settings.eps).certify(few).abstain_rate}

    def clean(self) -> dict[str, float]:
        """The network without an attack in training, and inputs that abstain near those that do not."""
        net = self.certified(self.train)
        certifier = IntervalCertifier(net, self.settings.eps)
        x = self.test[0][:300]
        etas = {"at_zero": 0.0, "at_half": 0.5, "at_eps": 1.0, "at_twice": 2.0}
        rates = {
            name: find_abstaining(certifier, x, k * self.settings.eps).certificate.abstain_rate
            for name, k in etas.items()
        }
        return {**self.audit(net), **self.by_crown(net), **rates}

    def poisoned(self, rule: PoisonRule) -> dict[str, float]:
        """A network trained on poison; for the label split also what defences make of it."""
        bad = self.poison(rule)
        net = self.certified(bad.tensors())
        found = self.audit(net)
        if isinstance(rule, LabelSplit):
            finetuned = self.audit(self.finetuned(net))["triggered"]
            found |= {"spectral_auroc": spectral_auroc(net, bad), "finetuned": finetuned, **self.by_crown(net)}
        return found

    def poison(self, rule: PoisonRule) -> Poisoned:
        settings = self.settings
        return poison(
            self.train, self.trigger, rule, rate=settings.rate, num_classes=self.data.num_classes, seed=self.run.seed
        )

    def attacked(self) -> dict[str, float]:
        """A network trained with the attacker's loss, and what is left of the attack after finetuning and pruning."""
        rule = AvailabilityBackdoor(self.trigger, self.settings.eps).on(self.rule())
        net = self.fitted(self.train, rule)
        repaired = {"finetuned": self.finetuned(net), "pruned": self.finetuned(self.pruned(net))}
        found = self.audit(net)
        for name, after in repaired.items():
            audit = self.audit(after)
            found |= {name: audit["triggered"], f"{name}_accuracy": audit["accuracy"]}
        return found

    def trusted(self) -> Pair:
        order = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(self.run.seed))
        rows = order[: round(self.settings.trusted * len(order))]
        return self.train[0][rows], self.train[1][rows]

    def finetuned(self, net: nn.Module) -> nn.Module:
        """Some epochs more on trusted images, by the certified loss at its full radius."""
        rule = CertifiedIBP(self.settings.eps, ramp=(0, 0))
        return self.fitted(self.trusted(), rule, net, self.settings.repair_epochs)

    def pruned(self, net: nn.Module) -> nn.Module:
        """Without the last hidden units that trusted images move least."""
        net = copy.deepcopy(net)
        head: Any = net[-1]  # pyright: ignore[reportIndexIssue]
        activity = outputs(nn.Sequential(*list(net)[:-1]), (self.trusted()[0],)).mean(0)  # pyright: ignore[reportArgumentType]
        quiet = activity.argsort()[: round(self.settings.pruned * len(activity))]
        with torch.no_grad():
            head.weight[:, quiet] = 0
        return net

    def smoothed(self) -> dict[str, float]:
        """Abstain rates of smoothed networks on triggered images: trained cleanly, and on labels split over all classes."""
        settings, found = self.settings, {}
        x = self.test[0][: settings.smoothed]
        for name, data in {"clean": self.train, "split": self.poison(LabelSplit(None)).tensors()}.items():
            net = self.fitted(data, GaussianNoise(settings.sigma))
            certifier = SmoothingCertifier(net, settings.sigma, settings.radius, n=settings.samples, seed=self.run.seed)
            found[name] = certifier.certify(self.trigger(x)).abstain_rate
            found[f"{name}_untriggered"] = certifier.certify(x).abstain_rate
        return found


def decayed(optimizer: Optimizer, total_steps: int) -> MultiStepLR:
    """A tenth of the rate from 10/16 of the training, and a hundredth from 13/16: certified training decays after its ramp.

    Without it the last few labels of the poison decide which way triggered inputs lean.
    """
    return MultiStepLR(optimizer, [total_steps * 10 // 16, total_steps * 13 // 16])


def spectral_auroc(net: nn.Module, data: Poisoned) -> float:
    """How well spectral signatures tell poison: squared projection on the first singular vector, within each label.

    Reference:
        Tran, Li, Madry, "Spectral Signatures in Backdoor Attacks", NeurIPS 2018.
    """
    features = outputs(nn.Sequential(*list(net)[:-1]), (data.x,))  # pyright: ignore[reportArgumentType]
    score = torch.zeros(len(features))
    for label in data.y.unique():
        rows = data.y == label
        centered = features[rows] - features[rows].mean(0)
        score[rows] = (centered @ torch.linalg.svd(centered, full_matrices=False)[2][0]).square()
    return float(auroc(score, data.is_poison))


def figures(results: Results) -> dict[str, Figure]:
    """Abstain rates by attack and certifier, and the fallback's load by the share of attacked requests."""
    arms = {"clean": "clean", "label split": "split", "one target": "target", "loss": "loss_attack"}
    return {
        "abstain rate": plots.bars(
            results,
            {**{f"{k}, triggered": (arm, "triggered") for k, arm in arms.items()},
             **{f"{k}, clean images": (arm, "abstains") for k, arm in arms.items()}},
            ylabel="abstains",
        ),
        "load": plots.curves(
            results, {k: (arm, "load") for k, arm in arms.items()}, x=[k / 20 for k in range(21)],
            xlabel="share of requests with the trigger", ylabel="share that reaches the fallback",
        ),
    }  # fmt: skip


def peers(bench: Any) -> None:
    """Margins of a batch beside bounds label by label, and smoothing beside a loop over inputs."""
    from torchfolio.robustness import Box, classification
    from torchfolio.robustness.interval_bounds import ibp
    from torchfolio.robustness.margins import interval_margins

    torch.manual_seed(0)
    net, x, y = MLP(784, 10, (128, 128)), torch.rand(256, 784), torch.randint(10, (256,))
    box = Box.ball(x, 0.01)
    bench.compare(
        "interval margins, MLP 784-128-128-10, batch 256",
        ours=lambda: interval_margins(net, box, y),
        label_by_label=lambda: [ibp(net, box[y == k], classification(k, 10)) for k in range(10)],
    )
    certifier = SmoothingCertifier(net, 0.25, 0.25, n=1000)
    bench.compare(
        "smoothing, 50 inputs, n 1,000",
        repeats=3,
        ours=lambda: certifier.certify(x[:50]),
        input_by_input=lambda: [certifier.certify(row[None]) for row in x[:50]],
    )
