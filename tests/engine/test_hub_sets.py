"""`fit` on Hugging Face sets, dict batches and models of `transformers`: the same numbers, or one sentence."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchfolio import engine
from torchfolio.data import Examples
from torchfolio.engine.recipes import adam, sgd
from torchfolio.models import Logits

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, 60)
PIXELS = RNG.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8)
X, Y = torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(LABELS)


@pytest.fixture(scope="module")
def pictures():
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [Image.fromarray(p) for p in PIXELS], "label": LABELS.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


def transformed(batch):
    return {"pixel_values": [torch.from_numpy(np.asarray(i, np.float32) / 255).permute(2, 0, 1) for i in batch["image"]],
            "labels": batch["label"]}  # fmt: skip


FORMS = {
    "plain": lambda d: d,
    "torch": lambda d: d.with_format("torch"),
    "numpy": lambda d: d.with_format("numpy"),
    "transform": lambda d: d.with_transform(transformed),
    "stream": lambda d: d.to_iterable_dataset(),
    "stream of tensors": lambda d: d.to_iterable_dataset().with_format("torch"),
    "loader": lambda d: DataLoader(d.with_transform(transformed), batch_size=16),
}


@pytest.mark.parametrize("form", FORMS)
def test_pictures_of_the_hub_are_the_same_in_every_format(pictures, form):
    given = FORMS[form](pictures)
    x, y = (torch.cat(parts) for parts in zip(*Examples(given).batches(16), strict=True))
    torch.testing.assert_close(x, X)
    assert y.tolist() == LABELS.tolist()
    net, other = network(), network()
    torch.testing.assert_close(engine.evaluate(net, given), engine.evaluate(net, (X, Y)))
    batch = 60 if form != "loader" else 16
    engine.fit(net, given, epochs=1, batch_size=batch, optimizer=sgd(0.1, momentum=0), progress=False)
    whole = DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=batch)
    engine.fit(other, whole, epochs=1, optimizer=sgd(0.1, momentum=0), progress=False)
    torch.testing.assert_close(net.state_dict(), other.state_dict())


def test_batches_that_are_dicts_train_as_pairs_do():
    pairs = [(X[k : k + 20], Y[k : k + 20]) for k in (0, 20, 40)]
    trained = []
    for batches in (pairs, [{"pixel_values": x, "labels": y} for x, y in pairs]):
        net = network()
        engine.fit(net, batches, epochs=2, optimizer=sgd(0.1), progress=False)
        trained.append(net.state_dict())
    torch.testing.assert_close(*trained)


def test_a_stream_that_shuffles_does_so_anew_every_epoch():
    stream = datasets.Dataset.from_dict({"x": [[float(k)] for k in range(8)], "y": [0.0] * 8}).to_iterable_dataset()
    seen = []

    class Watch(nn.Linear):
        def forward(self, x):
            if self.training:
                seen.append(x.flatten().tolist())
            return super().forward(x)

    engine.fit(Watch(1, 1), stream.shuffle(seed=0, buffer_size=8), epochs=2, batch_size=8, progress=False)
    first, second = seen[-2:]
    assert sorted(first) == sorted(second)
    assert first != second


class Named(Dataset):
    def __init__(self, *shapes):
        self.shapes = shapes

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, k):
        return {"image": torch.zeros(self.shapes[k]), "label": 0}


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        (lambda d: datasets.DatasetDict(train=d, test=d), TypeError, r"as in data\['train'\], got all: train, test"),
        (lambda d: d.rename_column("image", "photo"), TypeError, "got the keys photo, label; rename one"),
        (lambda d: Named((1, 8, 8), (3, 8, 8)), ValueError, r"one shape, got \([13], 8, 8\) and \([13], 8, 8\)"),
        (lambda d: DataLoader(d.with_format("torch")), ValueError, "x.float"),
        (lambda d: ((X, Y) for _ in range(1)), TypeError, "gone through only once"),
    ],
)
def test_data_that_cannot_be_taken_say_so(pictures, data, error, sentence):
    with pytest.raises(error, match=sentence):
        engine.fit(network(), data(pictures), epochs=1, progress=False)


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Recorded(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, pixel_values, mask=None):
        return Answer(self.inner(pixel_values if mask is None else pixel_values * mask))


def test_models_that_return_a_record_are_wrapped():
    with pytest.raises(TypeError, match=r"return a tensor, got Answer; wrap it: torchfolio.models.Logits\(model\)"):
        engine.fit(Recorded(), (X, Y), epochs=1, progress=False)
    net, plain = Logits(Recorded()), network()
    for model in (net, plain):
        engine.fit(model, (X, Y), val=(X, Y), epochs=2, optimizer=sgd(0.1), progress=False)
    torch.testing.assert_close(net.model.inner.state_dict(), plain.state_dict())
    mask = torch.zeros(60, 1, 1, 1)
    torch.testing.assert_close(net(X, mask), plain(X * 0))
    with pytest.raises(TypeError, match="to return logits, got Tensor"):
        Logits(plain)(X)


def test_a_text_classifier_of_transformers_learns():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=32, num_labels=2, hidden_dropout_prob=0)  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (64, 6))
    labels = (ids[:, 0] > 9).long()
    rows = {"input_ids": ids.tolist(), "attention_mask": [[1] * 6] * 64, "labels": labels.tolist()}
    texts = datasets.Dataset.from_dict(rows)
    net = Logits(transformers.BertForSequenceClassification(config))
    result = engine.fit(net, texts, val=texts, epochs=10, batch_size=16, optimizer=adam(0.01), progress=False)
    assert result.history["val_accuracy"][-1] > 0.8
