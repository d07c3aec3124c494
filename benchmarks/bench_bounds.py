"""Time of bounds against one input after the other, and how many instances of VNN-COMP are decided.

Timed in alternation in one process, on one thread, 256 inputs of a network 784-128-128-10 in float32. Intervals took 13
ms, one input after the other 21 times as long (14 to 26 over the rounds), the package bound-propagation 0.4.7 1.5 times.
Linear bounds took 1.6 s, one after the other only 1.2 times as long, as the products of one input fill the processor
already; the package took 1.9 times. It bounds the ten outputs where ours bounds nine differences.

Of VNN-COMP, at 20 s for an instance, on a core that other programs shared: of 55 instances of ACAS Xu 32 were verified,
14 falsified and 9 left open, in 274 s; of the 90 of mnistfc 32, 21 and 37, in 874 s (26, 19 and 45 before ReLUs were
split): of its networks of two, four and six layers 17, 7 and 8 verified and 12, 5 and 4 falsified.

    python benchmarks/bench_bounds.py [--batch 256] [--rounds 3]
    python benchmarks/bench_bounds.py --vnncomp FOLDER [--limit 20]

The second form reads every instance of `FOLDER/*/*_instances.csv` whose files are there. Each is attacked; then
boxes are split where inputs are few, and signs of ReLUs where they are many. Witnesses are checked by onnxruntime.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchfolio.measure import alternate
from torchfolio.robustness.bounds import Bounds, crown, ibp
from torchfolio.robustness.onnx_file import read_onnx
from torchfolio.robustness.properties import Box, Property, Verdict, classification
from torchfolio.robustness.relu_split import ReluSplit
from torchfolio.robustness.verifiers import CrownSplit
from torchfolio.robustness.vnnlib import read_vnnlib

FEW = 20  # inputs up to which splitting them gets anywhere


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def intervals_of_one(net: nn.Sequential, low: Tensor, high: Tensor, C: Tensor) -> Tensor:
    """Textbook intervals of one input."""
    for layer in list(net)[:-1]:
        if isinstance(layer, nn.Linear):
            center, radius = layer((low + high) / 2), layer.weight.abs() @ ((high - low) / 2)
            low, high = center - radius, center + radius
        else:
            low, high = low.relu(), high.relu()
    last = net[-1]
    assert isinstance(last, nn.Linear)
    W = C @ last.weight
    return W @ (low + high) / 2 + C @ last.bias - W.abs() @ (high - low) / 2


def linear_of_one(net: nn.Sequential, low: Tensor, high: Tensor, C: Tensor) -> Tensor:
    """Textbook linear bounds of one input: every unit of every layer goes back to the input."""
    linear = [layer for layer in net if isinstance(layer, nn.Linear)]
    ranges: list[tuple[Tensor, Tensor]] = []

    def back(k: int, A: Tensor) -> Tensor:
        d = A @ linear[k].bias
        A = A @ linear[k].weight
        for (l, u), layer in zip(reversed(ranges[:k]), reversed(linear[:k]), strict=True):
            on, off = l >= 0, u <= 0
            s = torch.where(on, 1.0, torch.where(off, 0.0, u / (u - l)))
            a = torch.where(on | off, s, (u >= -l).to(s))
            d = d + A.clamp_max(0) @ torch.where(on | off, 0.0, -s * l)
            A = A.clamp_min(0) * a + A.clamp_max(0) * s
            d, A = d + A @ layer.bias, A @ layer.weight
        return A.clamp_min(0) @ low + A.clamp_max(0) @ high + d

    for k, layer in enumerate(linear[:-1]):
        eye = torch.eye(layer.out_features)
        ranges.append((back(k, eye), -back(k, -eye)))
    return back(len(linear) - 1, C)


@torch.no_grad()
def times(batch: int, rounds: int) -> None:
    net, prop = network(), classification(0, 10, torch.float32)
    net.requires_grad_(False)
    box = Box.ball(torch.rand(batch, 784), 0.02)
    pairs = list(zip(box.lower, box.upper, strict=True))

    def one_by_one(function: Any) -> Tensor:
        return torch.stack([function(net, low, high, prop.C) for low, high in pairs])

    for name, ours, theirs in (
        ("intervals", lambda: ibp(net, box, prop), lambda: one_by_one(intervals_of_one)),
        ("linear bounds", lambda: crown(net, box, prop), lambda: one_by_one(linear_of_one)),
    ):
        found, wanted = ours(), theirs()
        assert isinstance(found, Bounds)
        short = float((wanted - found.lower).max())
        timed: dict[str, Any] = {"batched": ours, "one_by_one": theirs}
        if importlib.util.find_spec("bound_propagation") is not None:
            timed["bound_propagation"] = peer(net, box, name)
        print(f"{name}, {batch} inputs of 784-128-128-10; ours are below the textbook's by at most {short:.1e}")
        print(alternate(**timed, repeats=rounds))


def peer(net: nn.Sequential, box: Box, name: str) -> Any:
    """The same bounds by the package bound-propagation, on outputs, without the property's rows."""
    from bound_propagation import BoundModelFactory, HyperRectangle  # pyright: ignore[reportMissingImports]

    bounded, region = BoundModelFactory().build(net), HyperRectangle(box.lower, box.upper)
    return (lambda: bounded.ibp(region)) if name == "intervals" else (lambda: bounded.crown(region).concretize())


def decide(folder: Path, limit: float) -> None:
    """Verdicts on every instance that is there, one a line, then how many of each."""
    for listed in sorted(folder.glob("*/*_instances.csv")):
        rows = [row for row in csv.reader(listed.read_text().splitlines()) if row]
        there = [row for row in rows if all((listed.parent / name).exists() for name in row[:2])]
        counts: Counter[str] = Counter()
        seconds = 0.0
        for row in there:
            onnx, path = listed.parent / row[0], listed.parent / row[1]
            verdict = verdict_on(onnx, path, limit)
            counts[verdict.status] += 1
            seconds += verdict.seconds
            print(f"{onnx.stem},{path.stem},{verdict.status},{verdict.seconds:.2f},{verdict.boxes}", flush=True)
        kinds = ", ".join(f"{counts[s]} {s}" for s in ("verified", "falsified", "unknown"))
        print(f"{listed.parent.name}: {len(rows)} listed, {len(there)} read, {kinds}, {seconds:.0f} s", flush=True)


def verdict_on(onnx: Path, path: Path, limit: float) -> Verdict:
    """Of one instance, all of whose boxes must hold."""
    net, shape = read_onnx(onnx)
    started, boxes, open_ = time.perf_counter(), 0, False
    for box, prop in read_vnnlib(path, shape):
        few = box.lower[0].numel() <= FEW
        verifier = CrownSplit() if few else ReluSplit(attack_steps=100)
        found = verifier.decide(net, box, prop, limit - (time.perf_counter() - started))
        boxes += found.boxes
        if found.witness is not None:
            check(onnx, box, prop, found.witness)
            return Verdict("falsified", found.witness, time.perf_counter() - started, boxes)
        open_ |= found.status != "verified"
    return Verdict("unknown" if open_ else "verified", None, time.perf_counter() - started, boxes)


def check(onnx: Path, box: Box, prop: Property, witness: Tensor) -> None:
    """That another program, in float32, sees the violation too."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]
    x = witness.float().numpy().reshape(given.shape)
    (ran,) = session.run(None, {given.name: x})
    slack = prop.by_group(prop.slack(torch.from_numpy(np.asarray(ran)).double().view(1, -1))).amin()
    inside = box.to(torch.float32).contains(torch.from_numpy(x).view(1, *witness.shape)).all()
    if not inside or float(slack) > 1e-4:
        raise AssertionError(f"{onnx.stem}: onnxruntime does not see the violation, its slack is {float(slack):.2e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vnncomp", type=Path)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds for an instance")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.vnncomp is not None:
        decide(arguments.vnncomp, arguments.limit)
    else:
        times(arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
