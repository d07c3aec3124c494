"""The training loop: what it computes, what it refuses, and what survives a kill."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.engine import Backprop, EarlyStopping, NonFiniteLoss, StepRecorder, evaluate, fit
from torchfolio.engine.checkpoint import checkpoints

WORKER = Path(__file__).with_name("worker.py")
SGD = partial(torch.optim.SGD, lr=0.1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(n: int = 30) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_full_batch_is_plain_gradient_descent():
    model, reference = net(), net()
    x, y = data().tensors
    fit(model, (x, y), optimizer=SGD, epochs=3, batch_size=30, device="cpu")
    optimizer = SGD(reference.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_accumulated_batches_are_one_batch():
    whole, parts = net(), net()
    fit(whole, data(), optimizer=SGD, epochs=2, batch_size=30, device="cpu")
    result = fit(parts, data(), optimizer=SGD, epochs=2, batch_size=8, accumulate=4, device="cpu")
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert result.steps == 2


def test_learns_and_reports():
    model = net()
    result = fit(model, data(), val=data(), optimizer=SGD, epochs=40, batch_size=10, device="cpu")
    frame = result.history.to_frame()
    assert frame["val_accuracy"].iloc[-1] > 0.8
    assert list(frame.index) == list(range(1, 41))
    assert result.history["loss"][-1] < result.history["loss"][0]
    assert result.model is model
    assert evaluate(model, data())["accuracy"] == pytest.approx(frame["val_accuracy"].iloc[-1])
    assert (result.steps, result.epochs, result.stopped) == (120, 40, None)


def test_same_seed_same_weights_and_generators_are_left_alone():
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    a, b, c = (nn.Sequential(nn.Dropout(0.5), *net()) for _ in range(3))
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    fit(a, data(), seed=1, device="cpu")
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == before
    fit(b, data(), seed=1, device="cpu")
    fit(c, data(), seed=2, device="cpu")
    assert same(a, b)
    assert not same(a, c)


def test_regression_is_the_default_for_float_targets():
    torch.manual_seed(0)
    x = torch.randn(64, 3)
    y = x.sum(1)
    model = nn.Linear(3, 1)
    fit(model, (x, y), optimizer=SGD, epochs=30, batch_size=16, device="cpu")
    scores = evaluate(model, (x, y))
    assert set(scores) == {"loss"}
    assert scores["loss"] < 1e-3


def test_schedulers_step_by_step_or_epoch():
    by_epoch = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    result = fit(
        net(),
        data(),
        optimizer=SGD,
        scheduler=by_epoch,
        schedule="epoch",
        epochs=3,
        batch_size=10,
        device="cpu",
    )
    assert result.history["lr"] == pytest.approx([0.1, 0.05, 0.025])
    result = fit(net(), data(), optimizer=SGD, scheduler=by_epoch, epochs=1, batch_size=10, device="cpu")
    assert result.history["lr"] == pytest.approx([0.1 * 0.5**3])


def test_early_stopping():
    stopper = EarlyStopping("val_accuracy", patience=2, mode="max")
    frozen = partial(torch.optim.SGD, lr=0.0)
    result = fit(net(), data(), val=data(), optimizer=frozen, epochs=50, early_stopping=stopper, device="cpu")
    assert result.epochs == 3
    assert "val_accuracy" in (result.stopped or "")


def test_callbacks_see_and_stop():
    seen = []

    def callback(state):
        seen.append((state.step, state.epoch_end))
        if state.step == 4:
            state.stop("enough")

    result = fit(net(), data(), epochs=9, batch_size=10, callbacks=[callback], device="cpu")
    assert result.steps == 4
    assert result.stopped == "enough"
    assert seen == [(1, False), (2, False), (3, False), (3, True), (4, False)]


def test_clipping_bounds_the_step():
    model, before = net(), net()
    fit(
        model,
        data(),
        optimizer=partial(torch.optim.SGD, lr=1.0),
        clip_norm=0.01,
        epochs=1,
        batch_size=30,
        device="cpu",
    )
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-4)


def test_bfloat16_mixed_precision_trains():
    model = net()
    fit(model, data(), val=data(), optimizer=SGD, precision="bf16-mixed", epochs=2, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_recorder():
    recorder = StepRecorder({"norm": lambda s: float(s.model[0].weight.detach().norm())}, per_decade=4)
    fit(net(), data(), epochs=10, batch_size=10, callbacks=[recorder], device="cpu")
    assert list(recorder.to_frame().index) == [1, 2, 3, 6, 10, 18]
    with pytest.raises(ValueError, match="either"):
        StepRecorder({})


def test_loggers(tmp_path):
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(net(), data(), val=data(), loggers=[logger], log_every=1, epochs=2, batch_size=10, device="cpu")
    assert any("val_loss" in p.read_text() for p in tmp_path.rglob("metrics.csv"))


def test_non_finite_loss_stops_at_its_step(tmp_path):
    model = net()
    with pytest.raises(NonFiniteLoss, match=r"loss is .* at step \d+.*learning rate"):
        fit(
            model, (data().tensors[0], data().tensors[0][:, :3]), optimizer=partial(torch.optim.SGD, lr=1e20),
            epochs=50, batch_size=10, checkpoint=tmp_path, device="cpu",
        )  # fmt: skip
    for path in checkpoints(tmp_path):
        saved = torch.load(path, weights_only=True)
        assert all(v.isfinite().all() for v in saved["module"].values())


X, Y = data().tensors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"train": (X[:0], Y[:0])}, ValueError, "no examples"),
        ({"train": (X, Y[:5])}, ValueError, "lengths"),
        ({"train": (X,)}, ValueError, "inputs and targets"),
        ({"train": (X * float("nan"), Y)}, ValueError, "NaN"),
        ({"train": 3}, TypeError, "Dataset"),
        ({"train": (X, Y + 1)}, ValueError, "labels from 0 to 2"),
        ({"train": (X[:, :2], Y)}, ValueError, "cannot take a batch"),
        ({"val": (X[:0], Y[:0])}, ValueError, "val holds no"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"accumulate": 1.5}, ValueError, "accumulate"),
        ({"schedule": "day"}, ValueError, "schedule"),
        ({"clip_norm": -1}, ValueError, "clip_norm"),
        ({"optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1)}, ValueError, "misses 4 of 4"),
    ],
)
def test_bad_input_is_refused_at_the_start(arguments, error, message):
    with pytest.raises(error, match=message):
        fit(**({"model": net(), "train": data(), "device": "cpu"} | arguments))


def test_optimizer_instance():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = net()
    fit(model, data(), optimizer=optimizer, device="cpu")
    assert not same(model, before)


# Checkpoints


def test_truncated_checkpoint_falls_back_to_the_one_before(tmp_path):
    whole, model = net(), net()
    fit(whole, data(), epochs=4, batch_size=10, device="cpu")
    fit(model, data(), epochs=3, batch_size=10, checkpoint=tmp_path, device="cpu")
    newest = checkpoints(tmp_path)[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    again = net()
    with pytest.warns(UserWarning, match="cannot be read"):
        fit(again, data(), epochs=4, batch_size=10, checkpoint=tmp_path, device="cpu")
    assert same(again, whole)
    for path in checkpoints(tmp_path):
        path.write_bytes(b"no")
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match="none of the"):
        fit(net(), data(), checkpoint=tmp_path, device="cpu")


def test_finished_training_may_go_on_for_more_epochs(tmp_path):
    whole, model = net(), net()
    fit(whole, data(), epochs=5, batch_size=10, device="cpu")
    fit(model, data(), epochs=2, batch_size=10, checkpoint=tmp_path, device="cpu")
    again = net()
    result = fit(again, data(), epochs=5, batch_size=10, checkpoint=tmp_path, device="cpu")
    assert same(again, whole)
    assert len(result.history) == 5
    assert len(checkpoints(tmp_path)) == 2


def test_checkpoints_of_another_training_are_refused(tmp_path):
    fit(net(), data(), checkpoint=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="batch_size"):
        fit(net(), data(), batch_size=7, checkpoint=tmp_path, device="cpu")
    other = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 3))
    with pytest.raises(ValueError, match="another network"):
        fit(other, data(), checkpoint=tmp_path, device="cpu")
    fit(other, data(), checkpoint=tmp_path, resume=False, device="cpu")


def test_custom_datasets_and_loaders():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, k):
            return X[k], Y[k]

    fit(net(), Pairs(), val=Pairs(), epochs=1, batch_size=7, device="cpu")
    fit(net(), DataLoader(Pairs(), batch_size=5), rule=Backprop(), epochs=1, device="cpu")
