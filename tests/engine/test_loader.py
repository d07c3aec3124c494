"""Shares of joint batches, and positions taken up again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from torchfolio.engine.loader import LoaderBatches, TensorBatches, as_batches, batch_length, tensors_of


class Numbers(Dataset):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, k: int) -> torch.Tensor:
        return torch.tensor([k])


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.tensor([k]),) for k in range(10)])


def counted(shares) -> list[list[int]]:
    """The examples of each share that count."""
    rows = []
    for share in shares:
        batch = share.batch[0] if isinstance(share.batch, list | tuple) else share.batch
        assert len(batch) == max(share.size, 1)
        rows.append(batch.flatten().tolist()[: share.size])
    return rows


@given(
    n=st.integers(1, 40),
    size=st.integers(1, 12),
    world=st.integers(1, 4),
    kind=st.sampled_from(["tensors", "map"]),
)
@settings(max_examples=60, deadline=None)
def test_shares_make_up_the_joint_batches_of_one_process(n, size, world, kind):
    def make(rank: int, world: int):
        if kind == "tensors":
            return TensorBatches([torch.arange(n)], size, 7, rank, world)
        return LoaderBatches(DataLoader(Numbers(n), size, shuffle=True), 7, rank, world)

    joint = counted(make(0, 1).epoch(2))
    shares = [counted(make(rank, world).epoch(2)) for rank in range(world)]
    assert sorted(k for batch in joint for k in batch) == list(range(n))
    for k, batch in enumerate(joint):
        assert sorted(row for share in shares for row in share[k]) == sorted(batch)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tensors", "map", "stream"])
def test_a_position_is_taken_up_again(kind, workers):
    def make():
        if kind == "tensors":
            return TensorBatches([torch.arange(23)], 4, 1)
        data = Stream() if kind == "stream" else Numbers(23)
        if kind == "stream" and workers:
            pytest.skip("workers would each read the whole stream")
        return LoaderBatches(DataLoader(data, 4, shuffle=kind == "map", num_workers=workers), 1)

    whole = counted(make().epoch(0))
    assert counted(make().epoch(0, 2)) == whole[2:]
    assert counted(make().epoch(0, len(whole))) == []
    if kind != "stream":
        assert counted(make().epoch(1)) != whole


def test_generators_of_a_loader_are_kept():
    def make():
        return LoaderBatches(DataLoader(Numbers(20), 4, shuffle=True, generator=torch.Generator().manual_seed(5)), 0)

    first = make()
    counted(first.epoch(0))
    second_epoch = first.epoch(1)
    drawn = [next(second_epoch) for _ in range(2)]
    saved = first.state_dict()
    rest = counted(second_epoch)
    again = make()
    again.load_state_dict(saved)
    assert counted(again.epoch(1, len(drawn))) == rest


def test_last_batch_may_be_dropped():
    assert TensorBatches([torch.arange(10)], 4, 0, drop_last=True).count == 2
    assert as_batches(Numbers(10), 4, 0, drop_last=True).count == 2
    assert TensorBatches([torch.arange(10)], 4, 0).count == 3


def test_streams_are_cut_by_rows():
    loader = DataLoader(Stream(), 4)
    parts = [LoaderBatches(loader, 0, rank, 2) for rank in range(2)]
    assert parts[0].count is None
    first, second = (counted(part.epoch(0)) for part in parts)
    assert first == [[0, 2], [4, 6], [8]]
    assert second == [[1, 3], [5, 7], [9]]


def test_subsets_of_tensors_are_tensors():
    data = TensorDataset(torch.arange(10), torch.arange(10) * 2)
    found = tensors_of(Subset(Subset(data, [9, 3, 1]), [2, 0]))
    assert found is not None
    assert [t.tolist() for t in found] == [[1, 9], [2, 18]]
    assert tensors_of(Numbers(3)) is None


def test_length_of_odd_batches():
    assert batch_length({"ids": torch.zeros(5, 2)}) == 5
    assert batch_length([{"ids": torch.zeros(6, 2)}, torch.zeros(6)]) == 6
    assert batch_length(object()) == 1
