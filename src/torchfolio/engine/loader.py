"""Batches in an order that a checkpoint can name: the epoch and the position in it.

A *joint batch* is what one process would see. Of several processes each takes its share of it, so that their
number changes the speed and not the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from torchfolio.data.examples import whole_tensors
from torchfolio.data.rows import INPUTS, TARGETS, as_row, collate
from torchfolio.engine.modes import seeded

Data = Dataset | DataLoader | Sequence[Tensor]


@dataclass(frozen=True)
class Share:
    """One process's part of a joint batch.

    Attributes:
        batch: tensors.
        size: examples that count. Where a joint batch has fewer examples than there are processes, some get
            one that counts for nothing (`size` 0), since all of them must take part in every step.
        joint: examples of the joint batch.
    """

    batch: Any
    size: int
    joint: int


class Batches(Protocol):
    """What the training loop draws from."""

    @property
    def count(self) -> int | None:
        """Joint batches in an epoch, where that is known."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """The shares of an epoch; those before position `start` have been passed over when this returns."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Generators as they were when the current epoch began."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        ...


def as_batches(
    data: Data,
    batch_size: int,
    seed: int,
    *,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
    device: torch.device | None = None,
) -> Batches:
    """Shuffled batches of whatever holds the training data.

    Args:
        data: tensors or a `TensorDataset` (indexed whole batches at a time), another `Dataset`, or a
            `DataLoader`, which brings its own batches and order, as a list of batches does.
        batch_size: examples of a joint batch.
        seed: seed of the order.
        rank: rank of this process.
        world: number of processes.
        drop_last: whether to leave out a last batch that is not full.
        device: device of training; tensors that fit are kept there.
    """
    if isinstance(data, DataLoader):
        return LoaderBatches(data, seed, rank, world)
    tensors = tensors_of(data)
    if tensors is not None:
        return TensorBatches(_near(tensors, device), batch_size, seed, rank, world, drop_last)
    if isinstance(data, list):
        return LoaderBatches(DataLoader(data, batch_size=None), seed, rank, world)  # pyright: ignore[reportArgumentType]
    if not isinstance(data, Dataset):
        raise TypeError(
            f"expected a Dataset, a DataLoader, a list of batches or tensors (x, y), got {type(data).__name__}, which "
            "may be gone through only once"
        )
    shuffle = not isinstance(data, IterableDataset)
    loader = DataLoader(data, batch_size, shuffle=shuffle, drop_last=drop_last, collate_fn=collate)
    return LoaderBatches(loader, seed, rank, world)


class TensorBatches:
    """Shuffled batches of tensors in memory, indexed a whole batch at a time.

    The order of an epoch depends on seed and epoch alone, so that any position can be taken up again.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = False,
    ) -> None:
        self.tensors = tuple(tensors)
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        full, rest = divmod(len(self.tensors[0]), batch_size)
        self.count = full + (rest > 0 and not drop_last)
        if not self.count:
            raise ValueError(f"drop_last leaves nothing of {rest} examples in batches of {batch_size}")

    def order(self, epoch: int) -> Tensor:
        """Indices of the examples in the order of an epoch."""
        generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
        return torch.randperm(len(self.tensors[0]), generator=generator)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        order = self.order(epoch).to(self.tensors[0].device)
        for k in range(start, self.count):
            joint = order[k * self.batch_size : (k + 1) * self.batch_size]
            mine = joint if self.world == 1 else joint[self.rank :: self.world]
            size = len(mine)
            chosen = mine if size else joint[:1]
            yield Share(tuple(t.index_select(0, chosen) for t in self.tensors), size, len(joint))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class LoaderBatches:
    """Joint batches of a `DataLoader`, loaded in shares.

    The indices of an epoch are drawn at once, by generators that are seeded with seed and epoch (or the
    loader's own), so that every process draws the same and loads only its share. Loaders that do not batch
    by index (iterable data sets, loaders with an `__iter__` of their own) are read whole by every process,
    which then takes its rows; they must give every process the same batches.

    A position is taken up again by passing over batches: without loading them where the data set runs in this
    process, by loading them where it runs in workers, whose random states depend on what they loaded.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int = 0, world: int = 1) -> None:
        self.original, self.rank, self.world = loader, rank, world
        self.count = _length(loader)
        self.shares: _Shares | None = None
        self.loader = loader
        indexed = loader.batch_sampler is not None and hasattr(loader.batch_sampler, "__len__")
        if indexed and type(loader).__iter__ is DataLoader.__iter__ and not isinstance(loader.dataset, IterableDataset):
            self.shares = _Shares(loader.batch_sampler, seed, rank, world)
            self.loader = _with_batches(loader, self.shares)
        self.began: list[Tensor] | None = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Share]:
        for part in (self.original.sampler, self.original.batch_sampler, self.original.dataset):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
        self.began = [g.get_state() for g in self._generators()]
        passed = start
        if self.shares is not None:
            # Workers start at the first batch again: what they draw depends on what they drew before.
            unloaded = start if self.loader.num_workers == 0 else 0
            self.shares.begin(epoch, unloaded)
            passed -= unloaded
        drawn = iter(self.loader)
        for _ in islice(drawn, passed):
            pass
        return self._rest(drawn, start)

    def _rest(self, drawn: Iterator[Any], start: int) -> Iterator[Share]:
        for k, batch in enumerate(drawn, start):
            batch = _row(batch)
            yield self.shares.share(batch, k) if self.shares is not None else self._cut(batch)
        self.began = None

    def _cut(self, batch: Any) -> Share:
        """This process's rows of a batch that every process has read."""
        if self.world == 1:
            size = batch_length(batch)
            return Share(batch, size, size)
        if not isinstance(batch, list | tuple) or not all(isinstance(t, Tensor) for t in batch):
            raise TypeError(f"expected batches of tensors to share between processes, got {type(batch).__name__}")
        joint = len(batch[0])
        size = len(range(self.rank, joint, self.world))
        return Share([t[self.rank :: self.world] if size else t[:1] for t in batch], size, joint)

    def _generators(self) -> list[torch.Generator]:
        owners = (self.original, self.original.sampler, self.original.batch_sampler)
        generators = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())

    def state_dict(self) -> dict[str, Any]:
        return {"generators": self.began or [g.get_state() for g in self._generators()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for generator, saved in zip(self._generators(), state["generators"], strict=True):
            generator.set_state(saved)


class _Shares(Sampler[list[int]]):
    """The batches of a batch sampler, each cut to the share of one process."""

    def __init__(self, joint: Any, seed: int, rank: int, world: int) -> None:
        self.joint, self.seed, self.rank, self.world = joint, seed, rank, world
        self.epoch = self.start = 0
        self.sizes: list[int] = []

    def begin(self, epoch: int, start: int) -> None:
        """Say which epoch comes next and how many of its batches are passed over."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        with seeded(_epoch_seed(self.seed, self.epoch)):
            joint = [list(indices) for indices in self.joint]
        self.sizes = [len(indices) for indices in joint]
        return iter([i[self.rank :: self.world] or i[:1] for i in joint[self.start :]])

    def __len__(self) -> int:
        return len(self.joint)

    def share(self, batch: Any, k: int) -> Share:
        """The k-th batch of the epoch with its sizes."""
        joint = self.sizes[k]
        return Share(batch, len(range(self.rank, joint, self.world)), joint)


def _with_batches(loader: DataLoader, batches: _Shares) -> DataLoader:
    """The loader with another batch sampler."""
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return DataLoader(
        loader.dataset,
        batch_sampler=batches,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        **workers,
    )


def tensors_of(data: Any) -> tuple[Tensor, ...] | None:
    """The tensors of data that are in memory as a whole, else `None`."""
    return whole_tensors(data)


def _row(batch: Any) -> Any:
    """A dict of a known input and target as (x, y); other batches as they are, for rules that know them."""
    if isinstance(batch, Mapping) and any(key in batch for key in INPUTS) and any(key in batch for key in TARGETS):
        return as_row(batch, "train")
    return batch


def batch_length(batch: Any) -> int:
    """Examples of a batch: the length of its first tensor, or what a batch of graphs says; else one."""
    first: Any = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if isinstance(first, Mapping) and first:
        first = next(iter(first.values()))
    if isinstance(first, Tensor):
        return len(first) if first.dim() else 1
    return int(getattr(first, "num_graphs", 1))


def _near(tensors: Sequence[Tensor], device: torch.device | None) -> Sequence[Tensor]:
    """The tensors on the device of training where they take no more than a quarter of its free memory."""
    if device is None or device.type != "cuda":
        return tensors
    free, _ = torch.cuda.mem_get_info(device)
    fits = sum(t.numel() * t.element_size() for t in tensors) < free / 4
    return [t.to(device) for t in tensors] if fits else [t.cpu() for t in tensors]


def _epoch_seed(seed: int, epoch: int) -> int:
    return (seed * 1_000_003 + epoch) % 2**63


def _length(loader: DataLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
