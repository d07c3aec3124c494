"""Detectors on networks of which it is known whether they are poisoned: verdict, score, threshold, seconds.

Small convolutional networks on the embedded digits: clean ones, and ones trained on pictures a tenth of which carry a trigger.
Every detector sees the network and clean test pictures, never the trigger. An attack's success is shown beside that of the same
trigger on the clean network. It writes the table and the picture of docs/is_it_poisoned.md. Run it with

    python benchmarks/is_it_poisoned.py [--seeds 3] [--output docs]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import advice
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from torchfolio.backdoor import UMD, SmoothInv
from torchfolio.backdoor.labels import AllToAll, AllToOne
from torchfolio.backdoor.poison import poisoned_test
from torchfolio.backdoor.triggers import AdditiveTrigger, BlendTrigger, PatchTrigger
from torchfolio.backdoor.victims import victim
from torchfolio.data import DataSplits, load
from torchfolio.measure import outputs

DETECTORS: dict[str, Callable[[], Any]] = {
    "smoothinv": lambda: SmoothInv(sigma=0.12, eps=1.25, steps=30, n=6),
    "umd": lambda: UMD(steps=200),
}


def attacks(data: DataSplits) -> dict[str, tuple[Any, Any]]:
    """A trigger and what it does to labels, by name."""
    patch = PatchTrigger.checkerboard(data.shape, size=2, margin=0)
    added = AdditiveTrigger.shape("chessboard", data.shape, amplitude=0.15)
    blend = BlendTrigger.noise(data.shape, alpha=0.3, seed=0)
    return {
        "a mark in the corner: every class to 7": (patch, AllToOne(7, 10)),
        "a mark in the corner: every class to the next": (patch, AllToAll(10)),
        "a faint pattern all over: every class to 7": (blend, AllToOne(7, 10)),
        "a faint chessboard added: every class to the next": (added, AllToAll(10)),
    }


def measure(data: DataSplits, seeds: int) -> Iterator[dict[str, Any]]:
    """A row for every network and detector."""
    clean_images = data.test.tensors
    for seed in range(seeds):
        cases: dict[str, tuple[Any, Any]] = attacks(data)
        first = next(iter(cases.values()))
        clean = victim(data, *first, rate=0.0, epochs=12, lr=0.1, seed=seed).model
        networks = [("clean", None, clean)]
        networks += [(n, a, victim(data, *a, rate=0.1, epochs=12, lr=0.1, seed=seed).model) for n, a in cases.items()]
        for name, attack, net in networks:
            success = control = float("nan")
            if attack is not None:
                x, y = poisoned_test(clean_images, *attack).tensors()
                success, control = (float((outputs(m, x).argmax(1) == y).float().mean()) for m in (net, clean))
            for detector, make in DETECTORS.items():
                started = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    images = clean_images if detector == "umd" else clean_images[0][:80]
                    verdict = make().scan(net, images)
                yield {
                    "network": name, "seed": seed,
                    "attack succeeds, %": "" if attack is None else round(100 * success, 1),
                    "same trigger, clean network, %": "" if attack is None else round(100 * control, 1),
                    "detector": detector, "score": round(float(verdict.score), 3),
                    "threshold": round(float(verdict.threshold), 3),
                    "verdict": "suspicious" if verdict.is_backdoored else "not suspicious",
                    "right": "yes" if verdict.is_backdoored == (attack is not None) else "no",
                    "seconds": round(time.perf_counter() - started, 1),
                }  # fmt: skip


def draw(rows: Sequence[dict[str, Any]]) -> Figure:
    """Scores beside thresholds, a panel a detector."""
    figure, axes = plt.subplots(1, len(DETECTORS), figsize=(10, 3), layout="constrained", sharey=True)
    names = list(dict.fromkeys(row["network"] for row in rows))
    for detector, ax in zip(DETECTORS, axes, strict=True):
        own = [row for row in rows if row["detector"] == detector]
        for row in own:
            colour = "C0" if row["network"] == "clean" else "C3"
            ax.plot(row["score"], names.index(row["network"]), "o", color=colour, alpha=0.7)
        ax.axvline(own[0]["threshold"], color="grey", ls="--", lw=1)
        ax.set(xlabel="score (dashed: threshold)", title=detector, yticks=range(len(names)), yticklabels=names)
        ax.grid(alpha=0.3)
    axes[0].invert_yaxis()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=advice.DOCS, help="a folder like docs/")
    arguments = parser.parse_args()
    rows = []
    for row in measure(load("digits", normalize=False, val=0), arguments.seeds):
        print(row, flush=True)
        rows.append(row)
    advice.write("is_it_poisoned", "python benchmarks/is_it_poisoned.py", rows, draw(rows), arguments.output)


if __name__ == "__main__":
    main()
