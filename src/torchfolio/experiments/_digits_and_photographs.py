"""Digits and photographs as one problem of grey images: classes 0 to 9 are digits, 10 to 19 photographs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.measure import linear_probe, outputs
from torchfolio.runs import Run
from torchfolio.training.noise_mask import BetaMaskPolicy

__all__ = ["Part", "load_joint", "modality"]

Part = tuple[Tensor, Tensor]  # images, labels


def load_joint(run: Run[Any]) -> dict[str, Part]:
    """Both sets with one normalisation, by split.

    Args:
        run: run whose settings name the two `sources`, their `train_sizes`, `test_sizes` and `val_size`, and the
            `image_size`.
    """
    s = run.settings
    parts: dict[str, list[Part]] = {"train": [], "val": [], "test": []}
    for k, (name, size, test_size) in enumerate(zip(s.sources, s.train_sizes, s.test_sizes, strict=True)):
        splits = run.data(
            name, train_size=size, val=s.val_size, test_size=test_size, image_size=s.image_size, normalize=False
        )
        for split, sets in parts.items():
            x, y = getattr(splits, split).tensors
            sets.append((x.mean(1, keepdim=True), y + 10 * k))
    joint = {name: (torch.cat([x for x, _ in p]), torch.cat([y for _, y in p])) for name, p in parts.items()}
    std, mean = torch.std_mean(joint["train"][0])
    return {name: ((x - mean) / std, y) for name, (x, y) in joint.items()}


def modality(judged: BetaMaskPolicy, parts: dict[str, Part]) -> float:
    """Accuracy of telling digits from photographs by the policy's logits alone, in percent."""
    read = _Logits(judged)
    (x, y), (x_test, y_test) = ((outputs(read, parts[k][0]), (parts[k][1] >= 10).long()) for k in ("train", "test"))
    return 100 * linear_probe(x, y, x_test, y_test, max_iter=1000)


class _Logits(nn.Module):
    def __init__(self, judged: BetaMaskPolicy) -> None:
        super().__init__()
        self.judged = judged

    def forward(self, x: Tensor) -> Tensor:
        beta = self.judged(x)
        return torch.cat([beta.concentration1.log(), beta.concentration0.log()], 1)
