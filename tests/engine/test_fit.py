"""The training loop: what it computes, what it refuses, and what it keeps."""

from __future__ import annotations

import copy
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torchfolio.engine import Backprop, EarlyStopping, NonFiniteLoss, StepRecorder, evaluate, fit
from torchfolio.engine.checkpoint import checkpoints
from torchfolio.engine.modes import seed_all
from torchfolio.engine.scalars import Scalars

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
    fit(model, (x, y), optimizer=SGD, epochs=3, batch_size=30, device=torch.device("cpu"))
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


def draws() -> tuple[float, ...]:
    """A number of each global generator, from a known state."""
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_same_seed_same_weights_and_generators_are_left_alone():
    a, b, c = (nn.Sequential(nn.Dropout(0.5), *net()) for _ in range(3))
    seed_all(3)
    before = draws()
    seed_all(3)
    fit(a, data(), seed=1, device="cpu")
    assert draws() == before
    fit(b, data(), seed=1, device="cpu")
    fit(c, data(), seed=2, device="cpu")
    assert same(a, b)
    assert not same(a, c)


def test_no_seed_takes_torchs():
    models = [net() for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(seed)
        fit(model, data(), batch_size=4, seed=None, device="cpu")
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


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


def test_plateau_follows_the_validation_loss():
    plateau = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0, threshold_mode="abs")
    result = fit(net(), data(), val=data(), optimizer=SGD, scheduler=plateau, epochs=3, device="cpu")
    assert result.history["lr"] == pytest.approx([0.1, 0.1, 0.01])


def test_early_stopping():
    stopper = EarlyStopping("val_accuracy", patience=2, mode="max")
    frozen = partial(torch.optim.SGD, lr=0.0)
    result = fit(net(), data(), val=data(), optimizer=frozen, epochs=50, early_stopping=stopper, device="cpu")
    assert result.epochs == 3
    assert "val_accuracy" in (result.stopped or "")
    with pytest.raises(ValueError, match="val or evaluate"):
        fit(net(), data(), early_stopping=3, device="cpu")


def test_best_weights_come_back(tmp_path):
    scores = iter([3.0, 1.0, 2.0, 2.0, 2.0])
    kept = []

    def evaluate_by_list(model, val):
        assert not model.training
        kept.append(copy.deepcopy(model))
        return {"score": next(scores)}

    model = net()
    stopper = EarlyStopping("val_score", patience=2, restore_best=True)
    arguments = {
        "early_stopping": stopper,
        "evaluate": evaluate_by_list,
        "checkpoint": tmp_path,
        "device": "cpu",
    }
    result = fit(model, data(), epochs=9, **arguments)
    assert result.epochs == 4
    assert same(model, kept[1])
    # A finished training that is asked for again is left as it is.
    again = net()
    assert fit(again, data(), epochs=9, **arguments).epochs == 4
    assert same(again, kept[1])


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


def test_a_number_of_steps_without_epochs():
    result = fit(net(), data(), val=data(), max_steps=7, batch_size=10, device="cpu")
    assert (result.steps, result.epochs, len(result.history)) == (7, 2, 3)
    assert result.history["step"] == [3, 6, 7]
    assert len(fit(net(), data(), max_steps=6, batch_size=10, device="cpu").history) == 2


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


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_true_precision_converts(precision, dtype):
    model = net()
    result = fit(model, data(), val=data(), optimizer=SGD, precision=precision, epochs=2, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert result.history["val_loss"][-1] > 0


def test_bfloat16_mixed_precision_trains():
    model = net()
    fit(model, data(), val=data(), optimizer=SGD, precision="bf16-mixed", epochs=2, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def weight_norm(state):
    return state.model.get_parameter("0.weight").norm()


def test_recorder():
    recorder = StepRecorder({"norm": weight_norm}, per_decade=4)
    fit(net(), data(), epochs=10, batch_size=10, callbacks=[recorder], device="cpu")
    assert list(recorder.to_frame().index) == [0, 1, 2, 3, 6, 10, 18]
    with pytest.raises(ValueError, match="either"):
        StepRecorder({})


def test_recording_leaves_no_trace(tmp_path):
    def meddle(state):
        outputs = state.model(torch.randn(5, 4))
        outputs.sum().backward()
        return {"norm": weight_norm(state), "outputs": outputs}

    plain = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    recorded = copy.deepcopy(plain)
    recorder = StepRecorder({"m": meddle}, every=2)
    fit(plain, data(), epochs=2, batch_size=10, device="cpu")
    fit(recorded, data(), epochs=2, batch_size=10, callbacks=[recorder], device="cpu", checkpoint=tmp_path)
    assert same(plain, recorded)
    frame = recorder.to_frame()
    assert list(frame.index) == [0, 2, 4, 6]
    assert list(frame.columns) == ["m_norm", "m_outputs"]
    again = StepRecorder(recorder.measurements, every=2)
    fit(recorded, data(), epochs=3, batch_size=10, callbacks=[again], device="cpu", checkpoint=tmp_path)
    assert list(again.to_frame().index) == [0, 2, 4, 6, 8]


def test_loggers(tmp_path):
    from lightning_fabric import Fabric
    from lightning_fabric.loggers import CSVLogger

    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fabric = Fabric(accelerator="cpu", devices=1, loggers=[logger])
    fit(net(), data(), val=data(), fabric=fabric, log_every=1, epochs=2, batch_size=10)
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


def test_a_weight_that_is_not_finite_is_never_kept(tmp_path):
    class Poison(Backprop):
        def step(self, batch, backward):
            scalars = super().step(batch, backward)
            steps.append(len(steps) + 1)
            if steps[-1] == 5:
                model.get_parameter("0.weight").grad[0, 0] = float("nan")  # pyright: ignore[reportOptionalSubscript]
            return scalars

    model, steps = net(), []
    with pytest.raises(NonFiniteLoss, match=r"weight 0\.weight is nan at step 5"):
        fit(
            model, data(), rule=Poison(), batch_size=10, epochs=9, checkpoint=tmp_path, checkpoint_every=1,
            optimizer=SGD, device="cpu",
        )  # fmt: skip
    assert [path.stem for path in checkpoints(tmp_path)] == ["step-000000003", "step-000000004"]


def test_scalars_that_are_read_late_name_their_step():
    scalars = Scalars(torch.device("cpu"), world=1)
    scalars.immediate = False
    for step in range(1, 9):
        scalars.add(step, {"loss": torch.tensor(1.0 * step), "aux": float("inf") if step == 5 else 0.0})
    assert not scalars.due(8)
    assert scalars.due(16)
    with pytest.raises(NonFiniteLoss, match="aux is inf at step 5") as caught:
        scalars.read([False])
    error = pickle.loads(pickle.dumps(caught.value))
    assert (error.step, error.name, str(error)) == (5, "aux", str(caught.value))
    with pytest.raises(ValueError, match="'loss'"):
        scalars.add(1, {"accuracy": 1.0})


def test_progress_is_on_standard_error(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    fit(net(), data(), epochs=2, progress=True, device="cpu")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "epoch 1/2" in shown.err or "epoch 2/2" in shown.err
    fit(net(), data(), epochs=2, device="cpu")
    assert capsys.readouterr() == ("", "")


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
        ({"train": (X, Y.int())}, TypeError, "int64"),
        ({"train": (X, Y[:, None])}, ValueError, r"shape \[N\]"),
        ({"train": (X, X[:, :2])}, ValueError, r"output's shape \(8, 3\), got \(8, 2\)"),
        ({"train": (X.double(), Y)}, ValueError, "torch.float64 .its weights are torch.float32"),
        ({"train": (X, Y.tolist())}, TypeError, "a list of pairs or of batches, got Tensor, list"),
        ({"train": (X[:5], Y[:5]), "drop_last": True}, ValueError, "drop_last leaves nothing"),
        ({"model": nn.Sequential(net(), nn.BatchNorm1d(3)), "batch_size": 29}, ValueError, "drop_last=True"),
        ({"val": (X[:0], Y[:0])}, ValueError, "val holds no"),
        ({"callbacks": [3]}, TypeError, "callables"),
        ({"optimizer": 3}, TypeError, "optimizer or a factory"),
        ({"optimizer": lambda p: 3}, TypeError, "to return an optimizer"),
        ({"optimizer": torch.optim.LBFGS}, ValueError, "LBFGS"),
        ({"model": net().requires_grad_(False)}, ValueError, "requires a gradient"),
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
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match="none of"):
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
    with pytest.raises(ValueError, match=r"optimizer\.lr 0\.001"):
        fit(net(), data(), optimizer=partial(torch.optim.AdamW, lr=1.0), checkpoint=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="optimizer 'AdamW', now it is 'SGD'"):
        fit(net(), data(), optimizer=SGD, checkpoint=tmp_path, device="cpu")
    step = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    with pytest.raises(ValueError, match="scheduler"):
        fit(net(), data(), scheduler=step, checkpoint=tmp_path, device="cpu")
    fit(other, data(), checkpoint=tmp_path, resume=False, device="cpu")
    assert len(checkpoints(tmp_path)) == 1


def test_arguments_of_the_rule_are_compared(tmp_path):
    class Scaled(Backprop):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

    fit(net(), data(), rule=Scaled(1.0), checkpoint=tmp_path, device="cpu")
    with pytest.raises(ValueError, match=r"rule\.scale 1\.0, now it is 2\.0"):
        fit(net(), data(), rule=Scaled(2.0), checkpoint=tmp_path, device="cpu")


def test_state_that_would_need_unpickling_is_refused(tmp_path):
    class Odd(Backprop):
        def state_dict(self):
            return {"when": [object()]}

    with pytest.raises(TypeError, match=r"checkpoint\['rule'\]\['when'\]\[0\] is a object"):
        fit(net(), data(), rule=Odd(), checkpoint=tmp_path, device="cpu")


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9),
        partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2, 4]),
        partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
        partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0),
    ],
)
def test_schedulers_and_adam_resume(scheduler, tmp_path):
    whole, parts = net(), net()
    fit(whole, data(), scheduler=scheduler, epochs=3, batch_size=10, device="cpu")
    for epochs in (1, 2, 3):
        parts = net()
        fit(
            parts,
            data(),
            scheduler=scheduler,
            epochs=epochs,
            batch_size=10,
            checkpoint=tmp_path,
            device="cpu",
        )
    assert same(whole, parts)


def test_custom_datasets_and_loaders():
    class Pairs(torch.utils.data.Dataset):
        def __len__(self):
            return 30

        def __getitem__(self, k):
            return X[k], Y[k]

    fit(net(), Pairs(), val=Pairs(), epochs=1, batch_size=7, device="cpu")
    fit(net(), DataLoader(Pairs(), batch_size=5), rule=Backprop(), epochs=1, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "auglocal"}, "expected a learning rule such as Backprop.., got the text 'auglocal'"),
        ({"rule": Backprop}, "expected a learning rule such as Backprop.., got the class Backprop"),
        ({"rule": 3}, "expected a learning rule such as Backprop.., got a int"),
        ({"model": "net"}, "expected a network, an nn.Module, got the text 'net'"),
        ({"model": nn.Linear}, "expected a network, an nn.Module, got the class Linear"),
    ],
)
def test_what_is_no_rule_and_no_network(arguments, message):
    model = arguments.pop("model", nn.Linear(3, 2))
    with pytest.raises(TypeError, match=message):
        fit(model, (torch.randn(8, 3), torch.randint(2, (8,))), epochs=1, device="cpu", **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there(device):
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=f"there is no device '{device}' here"):
        fit(nn.Linear(3, 2), (torch.randn(8, 3), torch.randint(2, (8,))), epochs=1, device=device)


@pytest.mark.parametrize("wrap", [
    lambda x: x,
    lambda x: (x,),
    lambda x: x.numpy(),
    lambda x: torch.utils.data.TensorDataset(x),
    lambda x: DataLoader(torch.utils.data.TensorDataset(x), batch_size=10),
    lambda x: DataLoader(x, batch_size=10),
])  # fmt: skip
def test_a_rule_that_needs_no_targets_takes_inputs_alone(wrap):
    class Reconstruct(Backprop):
        needs_targets = False

        def step(self, batch, backward):
            (x,) = batch
            loss = (self.model(x) - x).square().mean()
            backward(loss)
            return {"loss": loss.detach()}

    x = torch.randn(30, 4)
    result = fit(nn.Linear(4, 4), wrap(x), rule=Reconstruct(), batch_size=10, epochs=2, device="cpu")
    assert result.steps == 6
    with pytest.raises(ValueError, match="inputs and targets, got 1"):
        fit(nn.Linear(4, 4), x, device="cpu")


def test_a_network_that_holds_nan_is_refused_by_the_name_of_the_tensor():
    net = nn.Sequential(nn.Linear(X.shape[1], 3))
    with torch.no_grad():
        net[0].weight[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"holds NaN or infinity in 0\.weight"):
        fit(net, (X, Y), device="cpu")
