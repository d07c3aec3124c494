"""UMD on digit networks: are backdoored ones told from clean ones, whatever their map of classes, and by which pairs?"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from torchfolio.backdoor import X2X, AdditiveTrigger, AllToOne, LabelMap, Trigger, auroc
from torchfolio.backdoor.umd import UMD, UMDVerdict, core_periphery
from torchfolio.backdoor.victims import default_net, victim
from torchfolio.data import DataSplits
from torchfolio.experiments._backdoors import perceptron
from torchfolio.experiments._neural_cleanse import anomaly_index
from torchfolio.runs import Results, Run, column, plots, setting
from torchfolio.runs.tasks import OwnNetwork, own_network


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

KINDS = ("clean", "a2o", "x2x")  # no attack; all classes to one; some classes to targets of their own


def run(run: Run[Settings]) -> None:
    """Train networks of every kind, scan them, and compare with Neural Cleanse's statistic on the same triggers."""
    s = run.settings
    data = run.data(s.data, normalize=False, val=0, train_size=s.size, image_size=s.image_size)
    clean, a2o, x2x = (
        [run.arm(f"{kind}_{k}", scanned, run, data, kind, 10 * run.seed + k) for k in range(s.each)] for kind in KINDS
    )
    other_nets = {"mlp": partial(perceptron, data), "narrow": partial(default_net, data, max(2, s.width // 2))}
    others = [
        run.arm(f"clean_{name}", scanned, run, data, "clean", 10 * run.seed, net) for name, net in other_nets.items()
    ]
    run.values(
        "detection",
        false_positives=column(clean, "flagged").sum(),
        single_target=column(a2o, "flagged").sum(),
        several_targets=column(x2x, "flagged").sum(),
        auroc=ranked(clean, a2o + x2x, "score"),
        other_false_positives=column(others, "flagged").sum(),
    )
    flagged = [arm for arm in x2x if arm["flagged"]]
    several = column(flagged, "recall").mean() if flagged else 0.0
    precision, recall = (column(a2o, name).mean() for name in ("precision", "recall"))
    run.values("pairs", precision=precision, recall=recall, recall_several=several)
    run.values("baseline", umd=ranked(clean, x2x, "score"), neural_cleanse=ranked(clean, x2x, "cleanse"))
    run.values("negative_control", recall=column(a2o, "shuffled_recall").mean())


def scanned(run: Run[Settings], data: DataSplits, kind: str, seed: int, net: Any = None) -> dict[str, Any]:
    """One network, of another kind if given, and what the detector says of it."""
    s = run.settings
    trigger, labels = attack(s, data, kind, seed)
    made = victim(
        data, trigger, labels, rate=0.0 if kind == "clean" else s.rate, epochs=s.epochs, mode="append",
        net=partial(own_network, s, data, net or partial(default_net, data, s.width)), seed=seed, device=run.device,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the number of pairs is recorded
        detector = UMD(steps=s.steps, n_transfer=s.n_transfer, n_images=10 if s.n_transfer >= 10 else 4)
        verdict = detector.scan(made.model, data.test.tensors, seed=seed, progress=False)
    assert isinstance(verdict, UMDVerdict)
    assert verdict.triggers is not None
    pairs, true = verdict.triggers.pairs, set(labels.pairs().items())
    shuffled = core_periphery(permuted(verdict.transfer, seed), [pair[0] for pair in pairs])
    hits = true & set(verdict.core)
    return {
        "flagged": int(verdict.is_backdoored),
        "score": min(verdict.score, 1e6),  # an infinite score ranks above all others
        "threshold": verdict.threshold, "H": verdict.H, "acc": made.metrics.acc, "asr": made.metrics.asr,
        "precision": len(hits) / len(verdict.core), "recall": len(hits) / len(true),
        "shuffled_recall": len(true & {pairs[k] for k in shuffled.members}) / len(true),
        "cleanse": anomaly_index(verdict.sizes), "reached": verdict.evidence["pairs_reached"],
        "members": verdict.evidence["members"], "transfer": verdict.transfer,
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


def ranked(clean: list[dict[str, Any]], bad: list[dict[str, Any]], name: str) -> float:
    """AUROC of a score that should be larger for backdoored networks."""
    return auroc(torch.tensor(column(clean, name)), torch.tensor(column(bad, name)))


def figures(results: Results) -> plots.Figures:
    """Scores of all networks, and the transfers of one of each kind, its members first."""
    scores, ax = plots.axes("", "score")
    for k, kind in enumerate(KINDS):
        arms = [arm for seed in results.arms for name, arm in seed.items() if name.startswith(kind)]
        ax.plot(k + np.linspace(-0.2, 0.2, len(arms)), column(arms, "score").clip(max=20), "o")
    ax.axhline(results.arms[0]["clean_0"]["threshold"], c="k", ls="--")
    ax.set_xticks(range(3), ["clean", "one target", "several targets"])
    transfers = {}
    for kind in KINDS:
        arm = results.arms[0][f"{kind}_0"]
        A, members = np.asarray(arm["transfer"]), list(arm["members"])
        order = [*members, *np.setdiff1d(np.arange(len(A)), members)]
        transfers[f"{kind}: H = {arm['H']:.2f}, z = {arm['score']:.2g}"] = A[np.ix_(order, order)]
    tried = plots.matrices(transfers, xlabel="tried on pair", ylabel="trigger of pair", digits=None)
    return {"scores": scores, "transfers": tried}
