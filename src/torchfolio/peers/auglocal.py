"""A training step beside those of backprop that recomputes activations, and of backprop."""

from __future__ import annotations

from torchfolio.engine import Backprop
from torchfolio.experiments._local_learning import CheckpointedBackprop, stepper
from torchfolio.local.auglocal import AugLocal
from torchfolio.runs.bench import Bench


def peers(bench: Bench) -> None:
    bench.compare(
        "a step of ResNet-20 on 32 images",
        ours=stepper(AugLocal(3)),
        checkpointed_backprop=stepper(CheckpointedBackprop()),
        backprop=stepper(Backprop()),
    )
