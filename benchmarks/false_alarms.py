"""How often detectors of backdoors accuse clean networks: `torchfolio audit`, on networks that no experiment trained.

Two clean networks each of three architectures (MLP, convolutional, residual) on two sets (digits of 8x8; CIFAR-10 at 16x16, 4,000
images), and two with a backdoor, so that it is seen that the detectors can speak: digits with a patch in the corner, and
CIFAR-10 with a faint chessboard. Each is written as a bundle and given to

    torchfolio audit net/ --data digits --detector umd,smoothinv,badexpert --set smoothinv.steps=120 --set smoothinv.n=20

in this process. BaDExpert's filter accuses no network, so the digits' networks are also compared with nine clean references
of their architecture, as `--reference` does, at `--alpha 0.1`.

    python benchmarks/false_alarms.py [--seeds 2] [--output false_alarms/]

A network that is in the output folder is not trained or audited again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from torchfolio import models
from torchfolio.backdoor import AdditiveTrigger, AllToOne, PatchTrigger, Trigger, poison
from torchfolio.backdoor.badexpert import extract_backdoor_expert
from torchfolio.backdoor.concentration import concentration, judge
from torchfolio.backdoor.metrics import accuracy_of
from torchfolio.bundle import Manifest, load_bundle, save_bundle
from torchfolio.cli import app
from torchfolio.data import DataSplits, load
from torchfolio.engine import fit
from torchfolio.engine.recipes import one_cycle, sgd

SETS: dict[str, tuple[dict[str, Any], list[str], int]] = {
    "digits": ({}, [], 12),
    "cifar10": ({"image_size": 16, "train_size": 4000, "test_size": 1000}, ["--image-size", "16"], 8),
}
"""Arguments of `load`, of `audit`, and epochs."""

NETWORKS: dict[str, Callable[[DataSplits], tuple[str, dict[str, Any]]]] = {
    "MLP": lambda d: ("MLP", {"in_features": d.train.tensors[0][0].numel(), "out_features": 10, "hidden": [64]}),
    "convolutional": lambda d: ("ConvNet", {"in_channels": d.shape[0], "widths": [8, 16, 32]}),
    "residual": lambda d: ("ResNetCIFAR", {"depth": 8, "widths": [8, 16, 32], "in_channels": d.shape[0]}),
}
TRIGGERS: dict[str, Callable[[tuple[int, ...]], Trigger]] = {
    "patch": lambda shape: PatchTrigger.checkerboard(shape, size=2, margin=0),
    "chessboard": lambda shape: AdditiveTrigger.shape("chessboard", shape, 15 / 255),
}
POISONED = (("digits", "convolutional", "patch"), ("cifar10", "residual", "chessboard"))
SETTINGS = ["--set", "smoothinv.steps=120", "--set", "smoothinv.n=20"]
REFERENCES, ALPHA = 9, 0.1


def bundle(folder: Path, data: DataSplits, name: str, network: str, seed: int, trigger: str | None) -> Path:
    """Train a network on normalised images and write it as a bundle, unless it is there."""
    if folder.exists():
        return folder
    build, arguments = NETWORKS[network](data)
    manifest = Manifest(
        f"torchfolio.models:{build}", arguments, tuple(data.shape), tuple(map(str, range(10))),
        tuple(data.mean.flatten().tolist()), tuple(data.std.flatten().tolist()), {"data": name, "seed": seed},
    )  # fmt: skip
    torch.manual_seed(seed)
    net: nn.Module = getattr(models, build)(**arguments)
    x, y = data.train.tensors
    if trigger is not None:
        x, y = poison((x, y), TRIGGERS[trigger](data.shape), AllToOne(0, 10), rate=0.1, seed=seed).tensors()
    fit(net, (normalized(x, data), y), epochs=SETS[name][2], batch_size=64, optimizer=sgd(lr=0.1), device="cpu",
        scheduler=one_cycle(max_lr=0.1), seed=seed, progress=False)  # fmt: skip
    save_bundle(net, folder, manifest)
    return folder


def normalized(x: Tensor, data: DataSplits) -> Tensor:
    return (x - data.mean.view(-1, 1, 1)) / data.std.view(-1, 1, 1)


def audited(folder: Path, name: str) -> dict[str, Any]:
    """What `torchfolio audit` says of a bundle: its report and its exit code."""
    record = folder.with_suffix(".json")
    if record.exists():
        return json.loads(record.read_text())
    command = ["audit", str(folder), "--data", name, *SETS[name][1], "--detector", "umd,smoothinv,badexpert", *SETTINGS]
    done = CliRunner().invoke(app, [*command, "--json", "--output", str(folder.with_suffix(".audit"))])
    if done.exit_code not in (0, 1):
        raise RuntimeError(done.output)
    report = {**json.loads(done.stdout), "exit_code": done.exit_code}
    record.write_text(json.dumps(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("false_alarms"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name, (arguments, _, _) in SETS.items():
        data = load(name, normalize=False, val=0, **arguments)
        for network in NETWORKS:
            cases: list[tuple[int, str | None]] = [(seed, None) for seed in range(options.seeds)]
            cases += [(0, trigger) for where, kind, trigger in POISONED if (where, kind) == (name, network)]
            folders = [
                bundle(
                    options.output / f"{name}-{network}-{trigger or 'clean'}-{seed}", data, name, network, seed, trigger
                )
                for seed, trigger in cases
            ]
            shares = (
                compared(options.output, data, name, network, folders) if name == "digits" else [None] * len(folders)
            )
            for (seed, trigger), folder, accused in zip(cases, folders, shares, strict=True):
                report = audited(folder, name)
                x, y = data.test.tensors
                rows.append({
                    "set": name, "network": network, "seed": seed, "trigger": trigger or "none",
                    "accuracy": accuracy_of(load_bundle(folder).model, normalized(x, data), y),
                    **{slug: report["networks"][slug]["suspicious"] for slug in ("umd", "smoothinv")},
                    "badexpert": accused, "exit": report["exit_code"],
                })  # fmt: skip
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).to_string(index=False), counted(rows).to_string(), sep="\n\n")


def compared(output: Path, data: DataSplits, name: str, network: str, folders: list[Path]) -> list[bool]:
    """What BaDExpert says of networks next to nine clean references of their architecture."""
    references = [
        bundle(output / f"{name}-{network}-reference-{k}", data, name, network, 1000 + k, None)
        for k in range(REFERENCES)
    ]
    clean = normalized(data.test.tensors[0], data), data.test.tensors[1]
    shares = [
        concentration(extract_backdoor_expert(load_bundle(f).model, clean, seed=0), clean[0])
        for f in [*folders, *references]
    ]
    return [judge(share, shares[len(folders) :], ALPHA).is_backdoored for share in shares[: len(folders)]]


def counted(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Networks that each detector accuses, of those that it judged."""
    made = {}
    for kind in ("clean", "poisoned"):
        part = [row for row in rows if (row["trigger"] == "none") == (kind == "clean")]
        cells = {}
        for slug in ("umd", "smoothinv", "badexpert"):
            judged = [row[slug] for row in part if row[slug] is not None]
            cells[slug] = f"{sum(judged)} of {len(judged)}"
        cells["exit code 1"] = f"{sum(row['exit'] for row in part)} of {len(part)}"
        made[kind] = cells
    return pd.DataFrame(made).rename_axis("detector")


if __name__ == "__main__":
    main()
