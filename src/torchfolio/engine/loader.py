"""Batches in an order that a checkpoint can name: the epoch and the position in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

Data = Dataset | DataLoader | Sequence[Tensor]


class Batches(Protocol):
    """What the training loop draws from."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Sequence[Tensor], int]]:
        """The batches of an epoch from position `start`, each with the size of the joint batch of all processes."""
        ...


class TensorBatches:
    """Shuffled batches of tensors that are in memory, indexed a whole batch at a time.

    The order of an epoch depends on seed and epoch alone, so that any position can be taken up again. Of each joint
    batch a process takes every `world`-th example: together the processes see what one process would.

    Args:
        tensors: inputs and targets, first axis the examples.
        batch_size: examples of the joint batch.
        seed: of the order.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, tensors: Sequence[Tensor], batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.tensors = tuple(tensors)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        n = len(self.tensors[0])
        # A last batch with fewer examples than processes would leave one of them without work.
        self.batches = -(-n // batch_size) - int(0 < n % batch_size < world)

    def __len__(self) -> int:
        return self.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Sequence[Tensor], int]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        order = torch.randperm(len(self.tensors[0]), generator=generator)
        for k in range(start, self.batches):
            joint = order[k * self.batch_size : (k + 1) * self.batch_size]
            mine = joint[self.rank :: self.world] if self.world > 1 else joint
            yield tuple(t[mine] for t in self.tensors), len(joint)


class LoaderBatches:
    """Batches of a user's `DataLoader`. To take up a position its batches are drawn again and passed over."""

    def __init__(self, loader: DataLoader, world: int = 1) -> None:
        self.loader, self.world = loader, world

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Sequence[Tensor], int]]:
        sampler = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)  # pyright: ignore[reportOptionalMemberAccess]
        for k, batch in enumerate(self.loader):
            if k >= start:
                yield batch, len(batch[0]) * self.world


def as_batches(data: Data, batch_size: int, seed: int, fabric: Any = None) -> TensorBatches | LoaderBatches:
    """Batches of whatever holds the training data.

    Args:
        data: a `TensorDataset` or tensors (indexed whole batches at a time), another `Dataset`, or a `DataLoader`
            (taken as it is).
        batch_size: of the joint batch; a `DataLoader` brings its own.
        seed: of the order.
        fabric: tells rank and number of processes.
    """
    rank, world = (fabric.global_rank, fabric.world_size) if fabric is not None else (0, 1)
    if isinstance(data, DataLoader):
        if world > 1:
            data = fabric.setup_dataloaders(data, move_to_device=False)
        return LoaderBatches(data, world)  # pyright: ignore[reportArgumentType]
    tensors = tensors_of(data)
    if tensors is not None:
        return TensorBatches(tensors, batch_size, seed, rank, world)
    loader = DataLoader(data, batch_size=max(1, batch_size // world), shuffle=True)  # pyright: ignore[reportArgumentType]
    return as_batches(loader, batch_size, seed, fabric)


def tensors_of(data: Data) -> tuple[Tensor, ...] | None:
    """The tensors of data that are in memory as a whole, else `None`."""
    if isinstance(data, TensorDataset):
        return data.tensors
    if isinstance(data, tuple | list) and data and all(isinstance(t, Tensor) for t in data):
        return tuple(data)
    return None
