"""UMD on digit networks: are backdoored ones told from clean ones, whatever their map of classes, and by which pairs?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchfolio.backdoor import X2X, AdditiveTrigger, AllToOne, LabelMap, Trigger, auroc
from torchfolio.backdoor.umd import UMD, UMDVerdict, core_periphery
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import DataSplits
from torchfolio.experiments._backdoors import perceptron
from torchfolio.experiments._neural_cleanse import anomaly_index
from torchfolio.runs import Results, Run, plots, setting
from torchfolio.runs.tasks import OwnNetwork, own_network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings(OwnNetwork):
    """Data, victims and the detector."""

    data: str = setting("mnist10k", "name of the images")
    image_size: int = setting(14, "side of the images")
    size: int = setting(4000, "training images")
    width: int = setting(8, "width of the networks")
    epochs: int = setting(5, "number of epochs of the training")
    rate: float = setting(0.15, "poisoned images that are added, as a share of the training images")
    each: int = setting(2, "networks of each kind")
    sources: int = setting(5, "source classes of the attacks with several targets")
    amplitude: float = setting(0.06, "amplitude of the chessboard that sends all classes to one")
    big_amplitude: float = setting(0.15, "amplitude of the diagonals that send some classes to targets of their own")
    steps: int = setting(200, "number of steps of an inversion")
    n_transfer: int = setting(20, "images of every class that triggers are tried on")


SCALES = {
    "smoke": Settings(data="digits", image_size=8, size=800, epochs=6, each=1, steps=4, n_transfer=5),
    "quick": Settings(),
    "full": Settings(data="cifar10", image_size=32, size=50_000, width=16, epochs=20, each=10, amplitude=0.03,
                     big_amplitude=15 / 255),
}  # fmt: skip


def run(run: Run[Settings]) -> None:
    """Train networks of every kind, scan them, and compare with Neural Cleanse's statistic on the same triggers."""
    s = run.settings
    data = run.data(s.data, normalize=False, val=0, train_size=s.size, image_size=s.image_size)
    names = [f"{kind}_{k}" for kind in ("clean", "a2o", "x2x") for k in range(s.each)]
    arms = {name: run.arm(name, scanned, run, data, name) for name in [*names, "clean_mlp", "clean_narrow"]}
    clean, a2o, x2x = ([arms[f"{kind}_{k}"] for k in range(s.each)] for kind in ("clean", "a2o", "x2x"))
    flagged = [arm for arm in x2x if arm["flagged"]]
    run.values(
        "detection",
        false_positives=total(clean, "flagged"),
        single_target=total(a2o, "flagged"),
        several_targets=total(x2x, "flagged"),
        auroc=ranked(clean, a2o + x2x, "score"),
        other_false_positives=total([arms["clean_mlp"], arms["clean_narrow"]], "flagged"),
    )
    several = mean(flagged, "recall") if flagged else 0.0
    run.values("pairs", precision=mean(a2o, "precision"), recall=mean(a2o, "recall"), recall_several=several)
    run.values("baseline", umd=ranked(clean, x2x, "score"), neural_cleanse=ranked(clean, x2x, "cleanse"))
    run.values("negative_control", recall=mean(a2o, "shuffled_recall"))


def scanned(run: Run[Settings], data: DataSplits, name: str) -> dict[str, Any]:
    """One network and what the detector says of it."""
    s = run.settings
    kind, which = name.split("_")
    seed = 10 * run.seed + (int(which) if which.isdigit() else 0)
    trigger, labels = attack(s, data, kind, seed)
    nets = {"mlp": partial(perceptron, data), "narrow": partial(default_net, data, max(2, s.width // 2))}
    made = victim(
        data, trigger, labels, rate=0.0 if kind == "clean" else s.rate, epochs=s.epochs, mode="append",
        net=partial(own_network, s, data, nets.get(which, partial(default_net, data, s.width))), seed=seed,
        device=run.device,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the number of pairs is recorded
        detector = UMD(steps=s.steps, n_transfer=s.n_transfer, n_images=10 if s.n_transfer >= 10 else 4)
        verdict = detector.scan(made.model, data.test.tensors, seed=seed, progress=False)
    assert isinstance(verdict, UMDVerdict)
    assert verdict.triggers is not None
    true = set(labels.pairs().items())
    shuffled = core_periphery(permuted(verdict.transfer, seed), [pair[0] for pair in verdict.triggers.pairs])
    hits = len(true & {verdict.triggers.pairs[k] for k in shuffled.members})
    # An infinite score ranks above all others.
    return {
        "flagged": int(verdict.is_backdoored), "score": min(verdict.score, 1e6), "threshold": verdict.threshold,
        "H": verdict.H, "core": [list(pair) for pair in verdict.core], "acc": made.metrics.acc, "asr": made.metrics.asr,
        "precision": len(true & set(verdict.core)) / len(verdict.core),
        "recall": len(true & set(verdict.core)) / len(true),
        "shuffled_recall": hits / len(true), "cleanse": anomaly_index(verdict.sizes), "sizes": verdict.sizes,
        "reached": verdict.evidence["pairs_reached"], "members": verdict.evidence["members"],
        "transfer": verdict.transfer,
    }  # fmt: skip


def attack(s: Settings, data: DataSplits, kind: str, seed: int) -> tuple[Trigger, LabelMap]:
    """Trigger and labels; those of all-to-one for clean networks, to see what the trigger does by itself."""
    if kind == "x2x":
        return AdditiveTrigger.shape("bigX", data.shape, s.big_amplitude), X2X.random(data.num_classes, s.sources, seed)
    target = AllToOne(seed % data.num_classes, data.num_classes)
    return AdditiveTrigger.shape("chessboard", data.shape, s.amplitude), target


def permuted(A: np.ndarray, seed: int) -> np.ndarray:
    """The transfers with all entries off the diagonal in random order."""
    off = ~np.eye(len(A), dtype=bool)
    out = np.zeros_like(A)
    out[off] = np.random.default_rng(seed).permutation(A[off])
    return out


def total(arms: list[dict[str, Any]], key: str) -> float:
    return float(sum(arm[key] for arm in arms))


def mean(arms: list[dict[str, Any]], key: str) -> float:
    return total(arms, key) / len(arms)


def ranked(clean: list[dict[str, Any]], bad: list[dict[str, Any]], key: str) -> float:
    return auroc(*(torch.tensor([arm[key] for arm in arms]) for arms in (clean, bad)))


def figures(results: Results) -> dict[str, Figure]:
    """Scores of all networks, and the transfers of one of each kind."""
    import matplotlib.pyplot as plt

    fig, ax = plots.axes("", "score")
    for k, (kind, label) in enumerate({"clean": "clean", "a2o": "to one target", "x2x": "to several"}.items()):
        arms = [arm for seed in results.arms for name, arm in seed.items() if name.startswith(kind)]
        ax.plot(k + np.linspace(-0.2, 0.2, len(arms)), [min(arm["score"], 20) for arm in arms], "o", label=label)
    ax.axhline(results.arms[0]["clean_0"]["threshold"], c="k", ls="--")
    ax.set_xticks(range(3), ["clean", "one target", "several targets"])
    maps, axes = plt.subplots(1, 3, figsize=(9, 3.1), layout="constrained")
    for place, kind in zip(axes, ("clean", "a2o", "x2x"), strict=True):
        arm = results.arms[0][f"{kind}_0"]
        A, members = np.asarray(arm["transfer"]), list(arm["members"])
        order = [*members, *np.setdiff1d(np.arange(len(A)), members)]
        place.imshow(A[np.ix_(order, order)], vmin=0, vmax=1, interpolation="nearest")
        place.set(
            title=f"{kind}: H = {arm['H']:.2f}, z = {arm['score']:.2g}",
            xlabel="tried on pair",
            ylabel="trigger of pair",
        )
    return {"scores": fig, "transfers": maps}
