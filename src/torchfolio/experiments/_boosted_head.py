"""A convolutional network's own softmax head against a boosted head on the same frozen features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import nn

from torchfolio.efficiency.gbnn import boost_head
from torchfolio.engine.recipes import adam
from torchfolio.measure import outputs
from torchfolio.models import ConvNet
from torchfolio.runs import Run
from torchfolio.runs.tasks import accuracy

__all__ = ["compare_heads"]


def compare_heads(run: Run[Any], own: Mapping[str, Any]) -> dict[str, float]:
    """Test accuracy in percent of the network's softmax head and of the boosted one, with all units and with a quarter.

    Args:
        run: run whose settings have `images`, `train_size`, `epochs`, `head_units` and `max_iter`.
        own: GBNN's other settings.
    """
    s = run.settings
    data = run.data(s.images, train_size=s.train_size)
    net = ConvNet(data.num_classes, data.shape[0], widths=(16, 32, 64))
    run.fit(net, data.train, optimizer=adam(3e-3), epochs=s.epochs, batch_size=64)
    *layers, head = net.children()
    backbone = nn.Sequential(*layers, *list(head.children())[:-1])
    own = {**own, "total_units": s.head_units, "max_iter": s.max_iter}
    boosted = boost_head(backbone, data.train, **own, random_state=run.seed)
    quarter = s.head_units // 4 // own["units_per_step"] * own["units_per_step"]
    small = boosted.estimator.predict(outputs(backbone, data.test).double().numpy(), n_units=quarter)
    return {
        "softmax_head": accuracy(net, data.test),
        "boosted_head": accuracy(boosted.network, data.test),
        "boosted_quarter": 100 * float(np.mean(small == data.test.tensors[1].numpy())),
    }
