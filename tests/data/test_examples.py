"""Examples: the same rows whatever form they come in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from torchfolio.data import Examples
from torchfolio.data.rows import WholeBatch, collate
from torchfolio.engine.loader import as_batches

X = torch.arange(30.0).view(10, 3)
Y = torch.arange(10) % 3


class Pairs(Dataset):
    def __init__(self, make=lambda x, y: (x, y)):
        self.make = make

    def __len__(self):
        return len(X)

    def __getitem__(self, k):
        if k >= len(X):
            raise IndexError
        return self.make(X[k], int(Y[k]))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


def hub():
    import datasets

    return datasets.Dataset.from_dict({"x": X.tolist(), "label": Y.tolist()})


FORMS = {
    "tensors": lambda: (X, Y),
    "list of tensors": lambda: [X, Y],
    "arrays": lambda: (X.double().numpy(), Y.to(torch.int32).numpy()),
    "dict": lambda: {"x": X, "y": Y},
    "TensorDataset": lambda: TensorDataset(X, Y),
    "Subset": lambda: Subset(TensorDataset(X.repeat(2, 1), Y.repeat(2)), range(10)),
    "Dataset": Pairs,
    "Dataset of dicts": lambda: Pairs(lambda x, y: {"pixel_values": x, "labels": y, "id": "text"}),
    "Dataset of arrays": lambda: Pairs(lambda x, y: {"x": x.double().numpy(), "y": np.int32(y)}),
    "list of pairs": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "list of pairs of tensors": lambda: list(zip(X, Y, strict=True)),
    "list of dicts": lambda: [{"x": x.tolist(), "label": int(y)} for x, y in zip(X, Y, strict=True)],
    "batches": lambda: [(X[:4], Y[:4]), (X[4:], Y[4:])],
    "loader": lambda: DataLoader(TensorDataset(X, Y), 3),
    "loader of dicts": lambda: DataLoader(Pairs(lambda x, y: {"input_ids": x, "labels": y}), 3),
    "hub": hub,
    "hub with tensors": lambda: hub().with_format("torch"),
    "loader of a hub set": lambda: DataLoader(hub().with_format("torch"), 4),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form):
    examples = Examples(FORMS[form]())
    x, y = (torch.cat(parts) for parts in zip(*examples.batches(4), strict=True))
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert len(examples) == 10
    assert examples.supervised
    assert torch.equal(examples.labels, Y)
    assert len(Examples(examples).first(2)[0]) == 2
    assert "float32" in repr(examples)
    if form != "batches":
        one = examples[7]
        assert torch.equal(torch.as_tensor(one[0]), X[7])
        assert int(one[1]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_every_form_trains_and_is_scored(form):
    from torchfolio.engine import evaluate, fit

    if form == "batches":
        pytest.skip("fit takes data sets and loaders, whose order it keeps")
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    fit(net, FORMS[form](), val=FORMS[form](), epochs=1, batch_size=4, progress=False)
    assert evaluate(net, FORMS[form]()) == pytest.approx(evaluate(net, (X, Y)), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_are_those_of_one_pass_and_leave_the_network_alone(form):
    from torchfolio.measure import outputs

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)).train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    got = outputs(net, FORMS[form](), batch_size=3)
    assert net.training
    assert net[1].training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert not got.requires_grad
    torch.testing.assert_close(got, net.eval()(X).detach())


def test_inputs_alone_and_several():
    from torchfolio.measure import outputs

    alone = Examples(X)
    assert not alone.supervised
    assert alone.targets is None
    assert alone.labels is None
    assert [len(row) for row in alone.batches(4)] == [1, 1, 1]
    torch.testing.assert_close(outputs(torch.nn.Identity(), X.numpy()), X)
    two = Examples((X, X, Y))
    assert len(next(two.batches(4))) == 3
    bilinear = torch.nn.Bilinear(3, 3, 2)
    torch.testing.assert_close(outputs(bilinear, (X, X, Y)), bilinear(X, X).detach())
    assert Examples((X, X[:, 0])).labels is None
    assert len(next(Examples((X, Y)).batches(None))[0]) == 10


def test_pictures_become_channels_in_the_unit_interval():
    from PIL import Image

    pictures = [(Image.fromarray(np.full((2, 3, 3), 51 * k, np.uint8)), k) for k in range(3)]
    examples = Examples(pictures)
    assert examples.first(3)[0].shape == (3, 3, 2, 3)
    assert examples[2][0].unique().tolist() == pytest.approx([0.4])
    assert Examples([(Image.new("L", (3, 2)), 0)]).first()[0].shape == (1, 1, 2, 3)


def test_streams_have_no_length():
    loader = DataLoader(Stream(), 4)
    assert sum(len(x) for x, y in Examples(loader).batches()) == 10
    with pytest.raises(TypeError, match="stream of unknown length"):
        len(Examples(loader))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected train to be a Dataset, a DataLoader or tensors"),
        ("digits", "got text 'digits'"),
        ({"a": X}, "expected an input under pixel_values"),
        ([("a", 0), ("b", 1)], r"to hold tensors, arrays or numbers, got text \('a'\)"),
        ((X, ["a"] * 10), r"got Tensor, list"),
        (np.array(["a", "b"]), "got text"),
        ([], "got nothing"),
        ({"input_ids": X, "attention_mask": torch.zeros(10, 3), "y": Y}, "comes with attention_mask"),
    ],
)
def test_what_is_no_data_is_told_in_a_sentence(data, message):
    with pytest.raises(TypeError, match=message):
        Examples(data, "train")


def test_no_examples_or_unequal_numbers():
    for empty in ((X[:0], Y[:0]), Subset(Pairs(), []), DataLoader(TensorDataset(X[:0], Y[:0]))):
        with pytest.raises(ValueError, match="train holds no examples"):
            Examples(empty, "train")
    with pytest.raises(ValueError, match=r"as many targets as inputs in train, got lengths \[10, 9\]"):
        Examples((X, Y[:9]), "train")


def test_a_batch_that_is_whole_is_not_taken_apart():
    x, y = torch.randn(10, 3), torch.arange(10)

    class Whole(Dataset):
        def __len__(self):
            return 10

        def __getitems__(self, indices):
            return WholeBatch(x[indices], y[indices])

    data, taken = Whole(), WholeBatch(x, y)
    assert collate(taken)[0] is x
    for batch in (next(iter(DataLoader(data, 4))), next(iter(DataLoader(data, 4, collate_fn=collate)))):
        torch.testing.assert_close(tuple(batch), (x[:4], y[:4]))
    assert len(taken) == 10
    assert torch.equal(taken[3][0], x[3])
    (share,) = as_batches(data, 10, seed=0).epoch(0)
    assert sorted(share.batch[1].tolist()) == y.tolist()
