"""Trains a small network in a process of its own, for tests that kill it or run several."""

from __future__ import annotations

import os
import random
import sys
import time
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchfolio.engine import EarlyStopping, LearningRule, fit


class EveryLayer(LearningRule):
    """Calls backward once for each layer, on a loss of that layer's own, and leaves the last bias alone."""

    def prepare(self, model, example):
        self.layers = list(model.children())
        return model

    def step(self, batch, backward):
        h, y = batch
        for layer in self.layers[:-1]:
            h = layer(h)
            if h.requires_grad:
                backward((h - 1).square().mean())
            h = h.detach()
        loss = F.cross_entropy(F.linear(h, self.layers[-1].get_parameter("weight")), y)
        backward(loss)
        return {"loss": loss.detach(), "share": len(y) / 2}


class Shaky(Dataset):
    """Every look at an example is another one, by each of the global generators."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        noise = random.random() + np.random.rand() + torch.rand(1).item()
        return self.x[k] + 0.1 * noise, self.y[k]


def shift(x):
    """Augmentation by the global generator."""
    return torch.roll(x, int(torch.randint(3, ())), -1)


def image_job(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 2, 6, 6, generator=generator)
    y = torch.randint(3, (60,), generator=generator)
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 3)
    )
    if kind == "tensors":
        return net, TensorDataset(x, y)
    own = torch.Generator().manual_seed(3) if kind == "generator" else None
    workers = 2 if kind == "workers" else 0
    return net, DataLoader(Shaky(x, y), batch_size=8, shuffle=True, generator=own, num_workers=workers)


def train_and_save(kind, folder, out, pause):
    net, data = image_job(kind)
    fit(
        net,
        data,
        val=(torch.ones(4, 2, 6, 6), torch.zeros(4, dtype=torch.long)),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.05, total_steps=64),
        early_stopping=EarlyStopping(patience=50),
        epochs=4,
        batch_size=8,
        augment=shift,
        checkpoint=None if folder == "none" else folder,
        checkpoint_every=3,
        callbacks=[lambda state: time.sleep(pause)] if pause else [],
        device="cpu",
    )
    torch.save(net.state_dict(), out)


def train_in_several(kind, out):
    rank = int(os.environ.get("RANK", "0"))
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 5, generator=generator), torch.randint(3, (50,), generator=generator)
    torch.manual_seed(1 + rank)  # the first process's weights must win
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3))
    train = DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True) if kind == "loader" else (x, y)
    result = fit(
        net,
        train,
        val=(x[:31], y[:31]),
        rule=EveryLayer() if kind == "many" else None,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        epochs=2,
        # 50 examples in batches of 7 leave a last batch of one: shares that differ, and one that is empty.
        batch_size=7,
        accumulate=2,
        clip_norm=1.0,
        checkpoint=f"{out}.checkpoints",
        device="cpu",
    )
    if not rank:
        losses = [[row["loss"], row["val_loss"], row["val_accuracy"]] for row in result.history.rows]
        torch.save({"losses": torch.tensor(losses), **net.state_dict()}, out)


def train_sharded(out):
    """Sharded over two processes, or plain in one."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    def shard(module, mesh):
        for layer in module:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh["data_parallel"])
        return fully_shard(module, mesh=mesh["data_parallel"])

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=generator), torch.randint(4, (48,), generator=generator)
    fabric = None
    if "RANK" in os.environ:
        strategy = ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1)
        fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    for epochs in (1, 2):  # the second call goes on from the checkpoint of the first
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        fit(
            net, (x, y), val=(x, y), optimizer=optimizer, epochs=epochs, batch_size=16, fabric=fabric,
            device="cpu", checkpoint=f"{out}.checkpoints",
        )  # fmt: skip
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in net.state_dict().items()}
    if not int(os.environ.get("RANK", "0")):
        torch.save(state, out)


def stop_in_several(out):
    """One process asks to stop; both must leave, with a checkpoint."""
    x, y = torch.randn(40, 3), torch.randint(2, (40,))
    rank = int(os.environ["RANK"])

    def callback(state):
        if rank == 1 and state.step == 5:
            state.stop("seen enough")

    net, folder = nn.Linear(3, 2), f"{out}.checkpoints"
    result = fit(net, (x, y), epochs=99, batch_size=4, callbacks=[callback], checkpoint=folder, device="cpu")
    torch.save({"steps": torch.tensor(result.steps)}, f"{out}{rank}")


def several(job, folder):
    """One of the jobs for several processes."""
    out = f"{folder}/{job}"
    if job == "sharded":
        train_sharded(out)
    elif job == "stop":
        stop_in_several(out)
    else:
        train_in_several(job, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    command, *arguments = sys.argv[1:]
    if command == "train":
        kind, folder, out, pause = arguments
        train_and_save(kind, folder, out, float(pause))
    else:
        for job in arguments[1:]:
            several(job, arguments[0])
