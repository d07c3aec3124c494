"""Checkpoints that were damaged, exchanged, or made under other conditions: nothing is trained on from them."""

from __future__ import annotations

import random
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from torchfolio.engine import Backprop, fit
from torchfolio.engine.checkpoint import checkpoints, load_checkpoint, save_checkpoint

FLIPS = 200


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def train(folder, epochs: int = 2, **arguments) -> nn.Module:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    scheduler = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=9)
    given = {"batch_size": 10, "scheduler": scheduler, "early_stopping": 50, "device": "cpu", **arguments}
    fit(model := net(), (x, y := x[:, :3].argmax(1)), val=(x, y), epochs=epochs, checkpoint=folder, **given)
    return model


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    train(tmp_path)
    older, newest = checkpoints(tmp_path)
    whole, draw = newest.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        newest.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = load_checkpoint(tmp_path)
        assert found is not None
        noticed += found["step"] == 3 and str(newest) in str(caught[0].message)
    assert noticed == FLIPS
    assert older.exists()


def test_a_damaged_checkpoint_costs_its_epoch_and_not_the_training(tmp_path):
    whole = train(None, 3)
    train(tmp_path)
    newest = checkpoints(tmp_path)[-1]
    damaged = bytearray(newest.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match="damaged"):
        assert same(train(tmp_path, 3), whole)


FOREIGN = {
    "nothing": {},
    "tensor": torch.ones(3),
    "weights alone": {"module": net().state_dict()},
    "other types": {"format": 2, "settings": 3, "module": [], "optimizer": "x"},
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("by", ["torch.save", "save_checkpoint"])
def test_foreign_content_gives_one_sentence(content, by, tmp_path):
    path = tmp_path / "step-000000001.ckpt"
    if by == "torch.save":
        torch.save(content, path)
    else:
        save_checkpoint(tmp_path, 1, content)
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(ValueError, match="none of the 1 checkpoint"):
        train(tmp_path)


def spoil(saved: dict, how: str) -> None:
    if how == "nan":
        saved["module"]["0.weight"][0] = torch.nan
    elif how == "optimizer":
        saved["optimizer"]["state"] = {0: {"step": "x"}, 77: {}}
        saved["optimizer"]["param_groups"] = [3]
    elif how == "random":
        saved["random"][0] = ({"python": (), "numpy": (), "torch": torch.ones(3)}, {})
    elif how == "history":
        saved["history"] = [1, "x"]
    elif how == "position":
        saved["position"] = -4
    elif how == "sums":
        saved["scalars"] = {"sums": {"loss": "x"}, "counts": []}
    else:
        saved[how] = "not this"


HOW = ("nan", "optimizer", "random", "history", "position", "sums", "step", "scheduler", "stopper", "callbacks", "rule")


@pytest.mark.parametrize("how", HOW)
def test_bad_content_under_a_right_digest_falls_back_to_the_one_before(how, tmp_path):
    whole = train(None, 3)
    train(tmp_path)
    saved = load_checkpoint(tmp_path)
    assert saved is not None
    spoil(saved, how)
    save_checkpoint(tmp_path, 6, saved)
    with pytest.warns(UserWarning, match=r"step-000000006.*cannot be (read|taken up)"):
        assert same(train(tmp_path, 3), whole)
    for path in checkpoints(tmp_path)[:-1]:
        path.unlink()
    save_checkpoint(tmp_path, 99, saved)
    for path in checkpoints(tmp_path)[:-1]:
        path.unlink()
    with pytest.warns(UserWarning, match="cannot be"), pytest.raises(ValueError, match="none of the 1 checkpoint"):
        train(tmp_path, 3)


def test_another_number_of_threads_is_refused_with_the_way_on(tmp_path):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = train(None, 3)
        train(tmp_path)
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match=r"1 thread.*2.*OMP_NUM_THREADS=1.*torch\.set_num_threads\(1\)"):
            train(tmp_path, 3)
        torch.set_num_threads(1)
        assert same(train(tmp_path, 3), whole)
    finally:
        torch.set_num_threads(threads)


class Noise:
    """An augmentation with a setting."""

    def __init__(self, size: float) -> None:
        self.size = size

    def __call__(self, x):
        return x + self.size * torch.randn_like(x)


def smooth(x):
    return x


WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
OTHERS = {
    "inputs": {"shift": 1.0},
    "labels": {"turn": True},
    "one label": {"one": True},
    "loss": {"rule": Backprop(nn.CrossEntropyLoss(label_smoothing=0.1))},
    "function for loss": {"rule": Backprop(nn.functional.multi_margin_loss)},
    "weights of classes": {"rule": Backprop(WEIGHTED)},
    "augmentation": {"augment": Noise(0.1)},
    "function that augments": {"augment": smooth},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_training_is_not_gone_on_with(other, tmp_path):
    """Weights of one set, loss or augmentation once went on silently with another."""

    def run(*, shift=0.0, turn=False, one=False, **arguments):
        x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
        y = x[:, :3].argmax(1)
        y = (y + turn) % 3
        y[-1] = (y[-1] + one) % 3
        fit(model := net(), (x + shift, y), epochs=2, batch_size=10, device="cpu", checkpoint=tmp_path, **arguments)
        return model

    given = {"rule": Backprop(nn.CrossEntropyLoss()), "augment": Noise(0.2)}
    whole = run(**given)
    with pytest.raises(ValueError, match=r"is of a training on other examples|was made with (rule\.loss|augment) "):
        run(**{**given, **other})
    again = {"rule": Backprop(nn.CrossEntropyLoss()), "augment": Noise(0.2)}  # the same, made anew
    assert same(run(**again), whole)
    with pytest.raises(ValueError, match="was made with rule 'Backprop', now it is 'Sum'"):
        run(rule=Sum(), augment=Noise(0.2))


class Sum(Backprop):
    """Another rule of the same arguments."""


def test_a_place_that_cannot_be_written_is_told_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    seen = []
    with pytest.raises(OSError, match="file"):
        train(tmp_path / "file" / "checkpoints", callbacks=[seen.append])
    assert not seen
