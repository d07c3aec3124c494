"""Images of two classes as rows, and small networks that tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from torchfolio.engine import evaluate
from torchfolio.engine.recipes import sgd
from torchfolio.models import MLP
from torchfolio.robustness.boundary_tilting import TiltReport, analyse
from torchfolio.runs import Run

Array = NDArray[Any]


@dataclass(frozen=True)
class ImagePair:
    """Images `[N, d]` in [0, 1] and labels of the two classes: to fit, to choose by, to report on."""

    X: Array
    y: Array
    X_val: Array
    y_val: Array
    X_test: Array
    y_test: Array
    shape: tuple[int, ...]


def image_pair(run: Run[Any]) -> ImagePair:
    """The two classes; the seed draws which training images are held out."""
    data = run.data(run.settings.images, val=0, normalize=False)
    (X, y), (X_test, y_test) = (
        (x.flatten(1).double().numpy()[np.isin(t, run.settings.pair)], t.numpy()[np.isin(t, run.settings.pair)])
        for x, t in (data.train.tensors, data.test.tensors)
    )
    order = np.random.default_rng(run.seed).permutation(len(X))
    held, used = np.split(order, [round(run.settings.val * len(X))])
    return ImagePair(X[used], y[used], X[held], y[held], X_test, y_test, data.shape)


def of_networks(run: Run[Any], data: ImagePair) -> dict[str, Any]:
    """A network by weight decay: median angle and strength at the validation images, and test accuracy."""
    out: dict[str, list[float]] = {"decays": [], "angle": [], "strength": [], "accuracy": []}
    parts = [
        TensorDataset(torch.from_numpy(X).float(), torch.from_numpy((y == y.max()).astype(np.int64)))
        for X, y in ((data.X, data.y), (data.X_val, data.y_val), (data.X_test, data.y_test))
    ]
    for decay in run.settings.decays:
        torch.manual_seed(run.seed)
        net = MLP(data.X.shape[1], 2, (100,))
        run.fit(net, parts[0], optimizer=sgd(lr=0.05, weight_decay=decay), epochs=run.settings.epochs)
        report: TiltReport = analyse(net, *parts[1].tensors, classes=(0, 1))
        accuracy = 100 * evaluate(net, parts[2], device=run.device)["accuracy"]
        for key, value in zip(out, (decay, report.angle, report.strength, accuracy), strict=True):
            out[key].append(value)
    return out
