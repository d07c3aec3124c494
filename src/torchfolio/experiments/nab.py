"""NAB against undefended training and other uses of the same isolated samples."""

from __future__ import annotations

from dataclasses import dataclass

from torchfolio.experiments._isolation_defences import Scene, Task
from torchfolio.runs import Results, Run, plots, setting

DIGITS = Task()
PHOTOS = Task(
    data="cifar10", train_size=10_000, test_size=3000, clean_size=1000, width=16, epochs=8, lr=0.05, isolation_epochs=4,
    restarts=2, looks=2, stamp="mean", flip=True,
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Tasks and what they share."""

    digits: Task = setting(DIGITS, "task on digits")
    photos: Task | None = setting(PHOTOS, "task on photographs; `None` leaves it out")
    rate: float = setting(0.1, "share of the training images that is poisoned")
    ratio: float = setting(0.05, "share that is isolated")
    stamp_clean_fraction: float = setting(0.02, "share of the other samples that one arm stamps too")
    batch_size: int = setting(64, "batch size of all trainings but the verified classifier's")
    unlearn_lr: float = setting(1e-3, "learning rate of the baseline that unlearns the isolated samples")


SCALES = {
    "smoke": Settings(
        digits=Task(
            data="digits", clean_size=120, epochs=3, isolation_epochs=1, isolation_lr=0.1, restarts=2, looks=2,
            verified_epochs=5,
        ),
        photos=None,
    ),
    "quick": Settings(),
    "full": Settings(
        digits=Task(epochs=30),
        photos=Task(
            data="cifar10", clean_size=2500, network="resnet18", width=64, epochs=100, lr=0.1, isolation_epochs=20,
            isolation_lr=0.1, restarts=1, looks=1, verified_epochs=100, verified_lr=0.01, stamp="mean", flip=True,
        ),
    ),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Isolate once, then train with every use of what was isolated."""
    s, digits = run.settings, Scene(run, run.settings.digits)
    isolated = run.arm("isolation", digits.isolate)
    clean = run.arm("clean", digits.undefended, rate=0.0)
    undefended = run.arm("undefended", digits.undefended)
    nab = run.arm("nab", digits.defended, isolated)
    stamped = run.arm("nab_stamped", digits.defended, isolated, fraction=s.stamp_clean_fraction)
    relabel = run.arm("relabel", digits.relabelled, isolated)
    run.arm("remove", digits.removed, isolated)
    run.arm("unlearn", digits.unlearned, isolated)
    variants = {"digits_stamped": (stamped, undefended)}
    if s.photos is not None:
        photos = Scene(run, s.photos)
        isolated_photos = run.arm("photos_isolation", photos.isolate)
        before = run.arm("photos_undefended", photos.undefended)
        variants["photos"] = run.arm("photos_nab", photos.defended, isolated_photos), before
    run.values("isolation", precision=isolated["precision"])
    run.values(
        "defense",
        attack_success=nab["asr"],
        true_class=nab["bacc"],
        undefended=undefended["asr"],
        never_poisoned=clean["asr"],
    )
    losses = {f"{name}_accuracy_loss": before["acc"] - after["acc"] for name, (after, before) in variants.items()}
    successes = {f"{name}_attack_success": after["asr"] for name, (after, _) in variants.items()}
    run.values("clean_accuracy", losses | successes, digits_plain_accuracy_loss=undefended["acc"] - nab["acc"])
    run.values(
        "mechanism",
        without_stamp=nab["asr_without_stamp"],
        rejected_triggered=nab["b_rej"],
        rejected_clean=nab["c_rej"],
    )
    run.values(
        "negative_control",
        relabel=relabel["asr"],
        nab=nab["asr"],
        relabel_true_class=relabel["bacc"],
        nab_true_class=nab["bacc"],
    )


def figures(results: Results) -> plots.Figures:
    """All defences beside each other, the course of training, and how precise isolation is."""
    arms = {
        "never poisoned": "clean", "no defence": "undefended", "NAB": "nab", "NAB, clean stamped too": "nab_stamped",
        "relabel only": "relabel", "remove": "remove", "unlearn": "unlearn",
    }  # fmt: skip
    scores = {"clean accuracy": "acc", "attack success": "asr", "true class of triggered": "bacc"}
    course = {
        "clean accuracy": "acc_curve",
        "attack success, stamped": "asr_curve",
        "attack success, unstamped": "unstamped_curve",
    }
    isolations = {"isolation": results.settings.digits.data}
    if results.settings.photos is not None:
        isolations["photos_isolation"] = results.settings.photos.data
    precision = plots.curves(
        results, {name: (arm, "precision_by_share") for arm, name in isolations.items()},
        x=results.values("isolation", "shares")[0], xlabel="share isolated", ylabel="share of these that is poisoned",
    )  # fmt: skip
    precision.axes[0].axhline(results.settings.rate, c="grey", ls=":")  # chance
    precision.axes[0].axvline(results.settings.ratio, c="k", ls="--", lw=1)
    return {
        "defences": plots.groups(
            results, {label: {k: (arm, v) for k, arm in arms.items()} for label, v in scores.items()}, ylabel="share"
        ),
        "training": plots.curves(
            results, {label: ("nab", v) for label, v in course.items()}, xlabel="epoch", ylabel="share"
        ),
        "isolation": precision,
    }
