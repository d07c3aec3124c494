"""Benchmarks of verifiers on disk: networks, properties and their list, as the competition of verifiers has them."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from torchfolio.robustness.counterexample_pairs import HiddenModel
from torchfolio.robustness.onnx_file import read_onnx, write_onnx
from torchfolio.robustness.properties import Box, Property, classification
from torchfolio.robustness.vnnlib import read_vnnlib, write_vnnlib
from torchfolio.shown import Shown

if TYPE_CHECKING:
    pass


def export(hidden: HiddenModel, folder: str | Path, timeout: int = 100) -> Path:
    """Write a benchmark as VNN-COMP lays it out.

    `model.onnx`, `vnnlib/{i}.vnnlib`, `instances.csv`; instances with a hidden counterexample first, clean ones after.
    Counterexamples are written to `secret/` beside, which no verifier should see, with the sweep that they survived.

    Raises:
        ValueError: if no counterexample is hidden.
    """
    from safetensors.torch import save_file

    if not hidden.valid.any():
        raise ValueError("no counterexample is hidden: there is nothing to test verifiers with")
    folder = Path(folder)
    for part in ("vnnlib", "secret"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    pairs = hidden.pairs.to("cpu")
    shape = pairs.centers.shape[1:]
    model = copy.deepcopy(hidden.model).cpu().float().eval()
    write_onnx(model, folder / "model.onnx", shape)
    with torch.no_grad():
        classes = model(pairs.centers[:1]).shape[1]
    n = len(pairs)
    chosen = [*hidden.valid.nonzero()[:, 0].tolist(), *range(n, 2 * n)]
    rows = []
    for i, k in enumerate(chosen):
        prop = classification(int(pairs.all()[1][k]), classes)
        path = write_vnnlib(folder / "vnnlib" / f"{i}.vnnlib", pairs.box(k), prop)
        rows.append(["model.onnx", f"vnnlib/{i}.vnnlib", timeout])
        if k < n:
            ((box, _),) = read_vnnlib(path, shape)
            assert box.contains(pairs.counterexamples[k : k + 1].double()).all()
    with (folder / "instances.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    save_file(
        {"counterexamples": pairs.counterexamples[hidden.valid].contiguous()},
        folder / "secret" / "counterexamples.safetensors",
    )
    record = {
        "hidden": int(hidden.valid.sum()), "eps": pairs.eps, "data_range": pairs.data_range,
        "sweep": [list(s) for s in hidden.sweep], "restarts": hidden.restarts,
    }  # fmt: skip
    (folder / "secret" / "record.json").write_text(json.dumps(record, indent=1))
    return folder


@dataclass(frozen=True, repr=False)
class Instance(Shown):
    """One question to a verifier.

    Attributes:
        onnx: path of the network.
        vnnlib: path of the property.
        timeout: seconds.
        kind: `"unverifiable"` (there is a hidden counterexample), `"clean"`, or `"unknown"`.
        counterexample: hidden one.
    """

    onnx: Path
    vnnlib: Path
    timeout: float
    kind: Literal["unverifiable", "clean", "unknown"] = "unknown"
    counterexample: Tensor | None = None

    def read(self) -> tuple[nn.Sequential, list[tuple[Box, Property]]]:
        """The network and its properties."""
        net, shape = read_onnx(self.onnx)
        return net, read_vnnlib(self.vnnlib, shape)


@dataclass(frozen=True)
class Benchmark:
    """Instances in a folder."""

    folder: Path
    instances: tuple[Instance, ...] = field(default=())

    def __iter__(self) -> Iterator[Instance]:
        return iter(self.instances)

    def __len__(self) -> int:
        return len(self.instances)


def load(folder: str | Path) -> Benchmark:
    """Read a benchmark that `export` wrote, or one in the layout of VNN-COMP (`instances.csv` or `NAME_instances.csv`).

    Raises:
        FileNotFoundError: if there is no list of instances, or it names a file that is not there.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    lists = [*folder.glob("instances.csv"), *folder.glob("*_instances.csv")]
    if not lists:
        raise FileNotFoundError(f"there is no instances.csv in {folder}")
    secret = folder / "secret" / "counterexamples.safetensors"
    examples = load_file(secret)["counterexamples"] if secret.is_file() else None
    instances = []
    with lists[0].open(newline="") as file:
        for i, row in enumerate(r for r in csv.reader(file) if r):
            onnx, vnnlib = _there(folder, row[0]), _there(folder, row[1])
            timeout = float(row[2]) if len(row) > 2 else 100.0
            if examples is None:
                instances.append(Instance(onnx, vnnlib, timeout))
            elif i < len(examples):
                instances.append(Instance(onnx, vnnlib, timeout, "unverifiable", examples[i]))
            else:
                instances.append(Instance(onnx, vnnlib, timeout, "clean"))
    return Benchmark(folder, tuple(instances))


def _there(folder: Path, name: str) -> Path:
    """A file of a benchmark; lists may name folders that were left out."""
    for path in (folder / name.strip(), folder / Path(name.strip()).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder} lists {name.strip()}, which is not there")
