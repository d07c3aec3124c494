"""SaRA: fine-tune the weights that are almost zero, and only those.

An optimizer for any module. Of the pretrained weights $P_0$ those with $M = 1[|P_0| < \\theta]$ are trained by AdamW, all
others stay bit for bit; no module is added and nothing has to be merged. Gradients are packed into $|M|$ numbers as soon
as autograd has a layer's, so that no dense gradient outlives its layer. The loss may have the term

$$\\lambda \\lVert P \\odot M \\rVert_*$$

for one matrix a step, and at one step weights that have outgrown the threshold are frozen where they are.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from torchfolio.adaptation.adapter import Adapted, Adapter, Adapting
from torchfolio.adaptation.sara_optimizer import SaRA, nuclear_gradient
from torchfolio.adaptation.small_weights import ineffective_drift, threshold_for, zero_smallest
from torchfolio.adaptation.weight_deltas import load_delta, save_delta
from torchfolio.checks import at_least, between, positive, whole
from torchfolio.engine import fit
from torchfolio.engine.recipes import cosine

__all__ = [
    "SaRA",
    "SaRAAdapter",
    "ineffective_drift",
    "load_delta",
    "nuclear_gradient",
    "save_delta",
    "threshold_for",
    "zero_smallest",
]


class SaRAAdapter(Adapter):
    """Fine-tune a network on labelled data by `SaRA`; its structure stays as it is.

    Args:
        epochs: number of passes over the data.
        fraction: share of all parameters that is trained, the smallest.
        lr: learning rate, which falls along half a cosine.
        weight_decay: decay of the trained entries.
        rank_weight: weight of the nuclear norm.
        rank_every: number of steps from one use of it to the next.
        progressive: whether entries that have grown are frozen at half of the training.
        batch_size: examples of a batch.

    Reference:
        Hu et al., ICLR 2025, arXiv 2409.06633.
    """

    def __init__(
        self,
        epochs: int = 10,
        fraction: float = 0.1,
        lr: float = 1e-3,
        weight_decay: float = 1e-2,
        rank_weight: float = 5e-4,
        rank_every: int = 1,
        progressive: bool = True,
        batch_size: int = 128,
    ) -> None:
        self.epochs, self.batch_size = whole("epochs", epochs, 1), whole("batch_size", batch_size, 1)
        self.fraction = between("fraction", fraction, 0, 1, inclusive=(False, True))
        self.lr, self.weight_decay = positive("lr", lr), at_least("weight_decay", weight_decay, 0)
        self.rank_weight, self.rank_every = at_least("rank_weight", rank_weight, 0), whole("rank_every", rank_every, 1)
        self.progressive = progressive

    def _adapt(self, model: nn.Module, data: Any, run: Adapting) -> Adapted:
        from torchfolio.data import Examples

        examples = Examples(data)
        x = next(iter(examples.batches(1)))[0].to(run.device)
        with torch.no_grad():
            classes = copy.deepcopy(model).eval()(x).shape[-1]
        if run.num_classes > classes:
            raise ValueError(
                f"the network tells {classes} classes apart, the data have {run.num_classes}: give it a new head first"
            )
        steps = self.epochs * -(-len(examples) // self.batch_size)
        optimizer = SaRA(
            model, fraction=self.fraction, lr=self.lr, weight_decay=self.weight_decay, rank_weight=self.rank_weight,
            rank_every=self.rank_every, progressive_at=max(1, steps // 2) if self.progressive else None, seed=run.seed,
        )  # fmt: skip
        report = {"trained": optimizer.trainable_count, "threshold": optimizer.threshold}
        try:
            fit(model, data, optimizer=lambda params: optimizer, scheduler=cosine(), epochs=self.epochs,
                batch_size=self.batch_size, seed=run.seed, device=run.device)  # fmt: skip
        finally:
            optimizer.release()
        return Adapted(model, {**report, "still_trained": optimizer.trainable_count})
