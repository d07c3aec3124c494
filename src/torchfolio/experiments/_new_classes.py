"""Classes that a network was not trained on: probes of its features, and fine-tuning on few labels."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchfolio.data import DataSplits
from torchfolio.engine import fit
from torchfolio.engine.recipes import cosine, sgd
from torchfolio.measure import linear_probe, outputs
from torchfolio.runs.tasks import accuracy
from torchfolio.training.rich_representations import Concatenated, two_stage_finetune

__all__ = ["finetune", "probe", "ridge_gap", "split_classes"]

Classes = dict[str, tuple[Tensor, Tensor]]
"""Examples and labels by split."""


def split_classes(data: DataSplits, source: int) -> tuple[Classes, Classes]:
    """Examples of the first `source` classes and of the others, each numbered from 0, by split."""
    old, new = {}, {}
    for name in ("train", "val", "test"):
        x, y = getattr(data, name).tensors
        first = y < source
        old[name], new[name] = (x[first], y[first]), (x[~first], y[~first] - source)
    return old, new


def probe(features: nn.Module, target: Classes, *, draws: int, seed: int) -> dict[str, float]:
    """Logistic regression on the new classes, with all labels and with 5 for each class, in percent."""
    (x, y), (x_test, y_test) = target["train"], target["test"]
    read, read_test = outputs(features, x), outputs(features, x_test)
    full = linear_probe(read, y, read_test, y_test, max_iter=500)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(draws):
        rows = few(y, 5, generator)
        scores.append(linear_probe(read[rows], y[rows], read_test, y_test, max_iter=500))
    return {"full": 100 * full, "few": 100 * sum(scores) / len(scores)}


def finetune(
    bodies: list[nn.Module],
    width: int,
    make: Callable[[nn.Module, int, int], nn.Module],
    target: Classes,
    *,
    labels: int,
    lrs: tuple[float, ...],
    epochs: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Fine-tuning on few labels: each network by itself, the concatenation as a whole, and in two stages.

    Args:
        bodies: trunks of the networks.
        width: features of each.
        make: makes a network of a trunk, its features and a number of classes.
        target: new classes.
        labels: labels of each class.
        lrs: learning rates, the best of which is chosen on validation data for each way.
        epochs: passes over the labels.
        seed: random seed.
        device: device of the trainings.

    Returns:
        Test accuracy in percent by way; with `_low`, at the first of the rates.
    """
    (x, y), classes = target["train"], int(target["train"][1].max()) + 1
    rows = few(y, labels, torch.Generator().manual_seed(seed))
    data = (x[rows], y[rows])
    starts = [make(body, width, classes) for body in bodies]
    scores: dict[str, list[tuple[float, float]]] = {"single": [], "naive": [], "two_stage": []}

    def scored(net: nn.Module) -> tuple[float, float]:
        return accuracy(net, target["val"]), accuracy(net, target["test"])

    for lr in lrs:
        tuned: list[nn.Module] = []

        def learn(net: nn.Module, seed: int, lr: float = lr, tuned: list[nn.Module] = tuned) -> None:
            fit(net, data, optimizer=sgd(lr, 0.9, 1e-4), scheduler=cosine(), epochs=epochs, batch_size=32, seed=seed,
                device=device)  # fmt: skip
            tuned.append(net)

        both = two_stage_finetune(starts, learn, data, seed=seed)
        val, test = zip(*(scored(net) for net in tuned), strict=True)
        scores["single"].append((sum(val) / len(val), sum(test) / len(test)))
        scores["two_stage"].append(scored(both))
        naive = make(Concatenated([copy.deepcopy(b) for b in bodies], frozen=False), width * len(bodies), classes)
        learn(naive, seed)
        scores["naive"].append(scored(naive))
    # Between rates that validate equally the first is taken: the test accuracy has no say.
    found = {name: max(pairs, key=lambda pair: pair[0])[1] for name, pairs in scores.items()}
    return {**found, **{f"{name}_low": pairs[0][1] for name, pairs in scores.items()}}


def few(y: Tensor, labels: int, generator: torch.Generator) -> Tensor:
    """Rows of so many random examples for each class."""
    order = torch.randperm(len(y), generator=generator)
    return torch.cat([order[y[order] == c][:labels] for c in y.unique()])


def ridge_gap(body: nn.Module, target: Classes, n: int, penalty: float = 1.0) -> float:
    """Largest difference of ridge predictions: n copies with a penalty, one copy with an n-th of it."""
    f = outputs(body, target["train"][0][:500]).double()
    y = nn.functional.one_hot(target["train"][1][:500]).double()

    def predict(z: Tensor, strength: float) -> Tensor:
        gram = z @ z.T
        return gram @ torch.linalg.solve(gram + strength * torch.eye(len(z), dtype=z.dtype), y)

    return float((predict(f.repeat(1, n), penalty) - predict(f, penalty / n)).abs().max())
