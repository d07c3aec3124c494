"""Trains a small network in a process of its own, for tests that kill it or run several."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.data import CropFlip
from torchfolio.engine import LearningRule, fit


class EveryLayer(LearningRule):
    """Calls backward once for each layer, on a loss of that layer's own."""

    def prepare(self, model, example):
        self.model = model
        return model

    def step(self, batch, backward):
        h, y = batch
        for layer in self.model[:-1]:
            h = layer(h)
            backward((h - 1).square().mean())
            h = h.detach()
        loss = nn.functional.cross_entropy(self.model[-1](h), y)
        backward(loss)
        return {"loss": loss.detach()}


def image_job(kind: str):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 2, 6, 6, generator=generator), torch.randint(3, (60,), generator=generator)
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)
    )
    data = TensorDataset(x, y)
    return net, DataLoader(data, batch_size=8, shuffle=True) if kind == "loader" else data


def train_and_save(kind: str, folder: str, out: str, pause: float) -> None:
    net, data = image_job(kind)
    fit(
        net,
        data,
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=32),
        epochs=4,
        batch_size=8,
        augment=CropFlip(padding=1),
        checkpoint=folder if folder != "none" else None,
        checkpoint_every=3,
        callbacks=[lambda state: time.sleep(pause)] if pause else [],
        device="cpu",
    )
    torch.save(net.state_dict(), out)


def train_in_several(kind: str, out: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 5, generator=generator), torch.randint(3, (50,), generator=generator)
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    rule = EveryLayer() if kind == "many" else None
    # 50 examples in batches of 12 leave a last batch of 2, and shares that differ between processes.
    fit(net, (x, y), rule=rule, optimizer=partial(torch.optim.SGD, lr=0.1), epochs=2, batch_size=11, device="cpu")
    if int(__import__("os").environ.get("RANK", "0")) == 0:
        torch.save(net.state_dict(), out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train_and_save(sys.argv[2], sys.argv[3], sys.argv[4], float(sys.argv[5]))
    else:
        Path(sys.argv[3]).parent.mkdir(exist_ok=True)
        train_in_several(sys.argv[2], sys.argv[3])
