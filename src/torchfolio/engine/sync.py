"""Keeping several processes in step without a wrapper around the module.

A wrapper that averages gradients inside backward expects one backward for each forward of the whole module.
Rules that call backward many times on parts of it would break that; averaging once after the rule's step
does not.

Statistics of batch norm are those of each process's share, as in PyTorch's own data parallelism. They are
averaged before every evaluation and checkpoint. For statistics of the joint batch convert the model with
`nn.SyncBatchNorm.convert_sync_batchnorm` (on GPUs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

BUCKET_BYTES = 25 * 2**20


def is_sharded(fabric: Fabric) -> bool:
    """Whether the strategy shards modules in place and averages their gradients itself (FSDP2)."""
    return hasattr(fabric.strategy, "device_mesh")


def data_rank(fabric: Fabric) -> tuple[int, int]:
    """Rank and number of the processes that see different data. Tensor-parallel ones see the same."""
    if is_sharded(fabric):
        mesh = fabric.strategy.device_mesh["data_parallel"]  # pyright: ignore[reportAttributeAccessIssue]
        return mesh.get_local_rank(), mesh.size()
    return fabric.global_rank, fabric.world_size


def broadcast_module(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), src=0)


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in buckets of some megabytes.

    Parameters without a gradient on any process keep none: a rule may leave parts of a module alone.
    """
    world = dist.get_world_size()
    for bucket in _buckets(parameters):
        grads = [p.grad for p in bucket]
        used = torch.tensor([g is not None for g in grads], dtype=bucket[0].dtype, device=bucket[0].device)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(bucket, grads, strict=True)]
        parts = [g.to_dense() if g.is_sparse else g for g in parts]
        flat = torch.cat([*(g.reshape(-1) for g in parts), used])
        dist.all_reduce(flat)
        flat /= world
        *means, users = flat.split([*(p.numel() for p in bucket), len(bucket)])
        # Reading who uses what waits for the device: only where this process lacks a gradient does it matter.
        anywhere = [True] * len(bucket) if None not in grads else [u > 0 for u in users.tolist()]
        for parameter, mean, present in zip(bucket, means, anywhere, strict=True):
            parameter.grad = mean.view_as(parameter).clone() if present else None


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if bucket and (size > BUCKET_BYTES or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += parameter.numel() * parameter.element_size()
    if bucket:
        yield bucket


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Give every process the mean of batch norms' running statistics, and the first one's other buffers."""
    statistics: set[Tensor] = set()
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            statistics |= {part.running_mean, part.running_var}  # pyright: ignore[reportAssignmentType]
    for buffer in module.buffers():
        if buffer in statistics:
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
        else:
            dist.broadcast(buffer, src=0)


def add_over_processes(values: Sequence[float], fabric: Fabric) -> list[float]:
    """The sums of numbers over processes."""
    if fabric.world_size == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=fabric.device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def gather(value: Any, world: int) -> list[Any]:
    """An object of every process, in the order of ranks."""
    if world == 1:
        return [value]
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, value)
    return gathered


def mean_over_processes(value: Tensor, world: int) -> Tensor:
    """The mean of a tensor over so many processes, in place."""
    if world > 1:
        dist.all_reduce(value)
        value /= world
    return value
