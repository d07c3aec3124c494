"""A frozen perceptron that is adapted to turned images, by SNNK's adapters and by the usual ones."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn

from torchfolio.data import DataSplits
from torchfolio.engine.recipes import adam, cosine
from torchfolio.experiments._bottleneck_adapter import add_bottlenecks
from torchfolio.layers.snnk import add_adapters
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy

__all__ = ["adapt_to_turned"]


def adapt_to_turned(run: Run[Any], data: DataSplits) -> dict[str, Any]:
    """Accuracy on images turned by 90 degrees: a frozen perceptron alone, with a new head, and with each adapter.

    Args:
        run: run whose settings have `epochs` of the perceptron, `adapter_epochs`, and the `rates` to choose from on
            validation data.
        data: images.

    Returns:
        Accuracy in percent `before`, and by adapter and width, with the number of its parameters.
    """
    s = run.settings
    splits = {"train": data.train.tensors, "val": data.val.tensors, "test": data.test.tensors}
    turned = {n: (x.rot90(1, (2, 3)), y) for n, (x, y) in splits.items()}
    inputs, common = math.prod(data.shape), {"scheduler": cosine(), "progress": False}
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                        nn.Linear(256, data.num_classes))  # fmt: skip
    run.fit(net, splits["train"], optimizer=adam(), epochs=s.epochs, **common)
    found: dict[str, Any] = {"before": accuracy(net, turned["test"])}
    for name, size in (("head", 0), ("snnk", 8), ("bottleneck", 4), ("bottleneck", 16)):
        best = -1.0
        for rate in s.rates:
            model: Any = copy.deepcopy(net)
            if name == "snnk":  # behind the linear layers, where the authors put them
                add_adapters(model, lambda key, layer: key in ("1", "3"), size, seed=run.seed)
            else:
                model.requires_grad_(False)
            if name == "bottleneck":
                torch.manual_seed(run.seed)
                add_bottlenecks(model, (1, 3), size)
            added = sum(p.numel() for p in model.parameters() if p.requires_grad)
            model[5].requires_grad_(True)
            run.fit(model, turned["train"], optimizer=adam(rate), epochs=s.adapter_epochs, **common)
            if (val := accuracy(model, turned["val"])) > best:  # the rate is chosen here
                best = val
                found[f"{name}_{size}"] = accuracy(model, turned["test"])
                found[f"{name}_{size}_parameters"] = added
    return found
