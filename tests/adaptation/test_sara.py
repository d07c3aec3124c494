"""SaRA against AdamW, masks and frozen entries to the bit, the rank term, memory, files; other libraries' models."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from tests.contracts.adaptation import check_adapter
from torchfolio.adaptation.sara import (
    SaRA,
    SaRAAdapter,
    ineffective_drift,
    load_delta,
    nuclear_gradient,
    save_delta,
    threshold_for,
    zero_smallest,
)
from torchfolio.data import load
from torchfolio.engine import fit
from torchfolio.models import MLP


def net(dtype=torch.float32, width=96):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)).to(
        dtype
    )


def batches(count, size=16, dtype=torch.float32):
    draws = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 80, generator=draws).to(dtype), torch.randn(size, 3, generator=draws).to(dtype))
            for _ in range(count)]  # fmt: skip


def train(model, optimizer, data, accumulate=1):
    for k, (x, y) in enumerate(data):
        (nn.functional.mse_loss(model(x), y) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_of_everything_it_is_adamw(decay):
    ours, theirs = net(), net()
    ordinary = torch.optim.AdamW(theirs.parameters(), lr=3e-3, weight_decay=decay)
    packed = SaRA(ours, fraction=1.0, lr=3e-3, weight_decay=decay)
    assert packed.trainable_count == sum(p.numel() for p in ours.parameters())
    train(ours, packed, batches(50))
    train(theirs, ordinary, batches(50))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_two_small_batches_are_one():
    ours, other = net(), net()
    small = batches(6, 8)
    large = [tuple(torch.cat(pair) for pair in zip(small[i], small[i + 1], strict=True)) for i in (0, 2, 4)]
    train(ours, SaRA(ours, fraction=0.3, lr=1e-3), small, accumulate=2)
    train(other, SaRA(other, fraction=0.3, lr=1e-3), large)
    for p, q in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_else_stays_to_the_bit(dtype):
    model = net(dtype)
    before = copy.deepcopy(model)
    optimizer = SaRA(model, fraction=0.2, lr=1e-2, progressive_at=5, rank_weight=1e-3)
    first = {name: optimizer.mask(name) for name, _ in model.named_parameters()}
    count = optimizer.trainable_count
    train(model, optimizer, batches(5, dtype=dtype))
    middle, second = copy.deepcopy(model), {name: optimizer.mask(name) for name in first}
    assert 0 < optimizer.trainable_count < count
    train(model, optimizer, batches(5, dtype=dtype))
    for (name, p), q, r in zip(before.named_parameters(), middle.parameters(), model.parameters(), strict=True):
        assert torch.equal(p[~first[name]], q[~first[name]])
        assert torch.equal(q[~second[name]], r[~second[name]])
        assert not (second[name] & ~first[name]).any()
        assert (q[second[name]].abs() < optimizer.threshold).all()
    assert any(not torch.equal(q, r) for q, r in zip(middle.parameters(), model.parameters(), strict=True))


def test_half_precision_keeps_moments_in_32_bits():
    torch.manual_seed(0)
    net = nn.Linear(16, 16).bfloat16()
    optimizer, x = SaRA(net, fraction=1.0, lr=0.0), torch.randn(8, 16).bfloat16()
    squares = 0.0
    for _ in range(200):  # in bfloat16 a moment that is multiplied by 0.999 stays where it is
        net(x).float().square().sum().backward()
        squares = 0.999 * squares + 0.001 * optimizer._grad.square()
        optimizer.step()
    assert optimizer._square.dtype == torch.float32
    torch.testing.assert_close(optimizer._square, squares, rtol=1e-3, atol=1e-3)


def test_gradient_of_the_nuclear_norm():
    torch.manual_seed(0)
    matrix = torch.randn(70, 90, dtype=torch.float64).requires_grad_()
    exact = torch.autograd.grad(torch.linalg.matrix_norm(matrix, "nuc"), matrix)[0]
    torch.testing.assert_close(nuclear_gradient(matrix.detach()), exact, rtol=0, atol=1e-5)
    model = nn.Linear(70, 90)
    optimizer = SaRA(model, fraction=0.5, lr=0.0, rank_weight=0.3, weight_decay=0.0)
    mask = optimizer.mask("weight")
    optimizer._add_rank_term()
    u, _, vh = torch.linalg.svd(model.weight.detach() * mask, full_matrices=False)
    torch.testing.assert_close(optimizer._grad[: int(mask.sum())], 0.3 * (u @ vh)[mask], rtol=0, atol=1e-5)
    low = torch.randn(70, 2, dtype=torch.float64) @ torch.randn(2, 66, dtype=torch.float64)
    assert torch.linalg.matrix_rank(nuclear_gradient(low)) == 2


def test_memory_between_backward_and_step():
    model = net()
    optimizer = SaRA(model, fraction=0.1, lr=1e-3)
    x, y = batches(1)[0]
    nn.functional.mse_loss(model(x), y).backward()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.state_bytes == 12 * optimizer.trainable_count
    norm = optimizer._grad.norm()
    assert optimizer.clip_grad_norm_(0.5 * float(norm)) == norm
    assert optimizer._grad.norm() == pytest.approx(0.5 * float(norm), rel=1e-4)


def test_the_difference_is_small_and_loads_back(tmp_path):
    model = net()
    before = copy.deepcopy(model)
    optimizer = SaRA(model, fraction=0.1, lr=1e-2, progressive_at=3)
    count = optimizer.trainable_count
    train(model, optimizer, batches(6))
    path = save_delta(optimizer, tmp_path / "delta.safetensors")
    assert path.stat().st_size <= 1.2 * 4 * count + 1024
    again = copy.deepcopy(before)
    load_delta(path, again)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())
    other = SaRA(before, fraction=0.1)
    other.load_delta_state_dict(optimizer.delta_state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.state_dict().items())
    with pytest.raises(ValueError, match="masks differ"):
        load_delta(path, net(width=96).apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None))
    (tmp_path / "odd").write_bytes(b"odd")
    with pytest.raises(ValueError, match="no difference of SaRA"):
        load_delta(tmp_path / "odd", again)
    model.load_state_dict(net().double().state_dict() | {"0.bias": torch.ones(96)})
    with pytest.raises(ValueError, match=r"0\.bias that are not trained have changed"):
        optimizer.delta_state_dict()


def test_it_goes_on_to_the_bit_and_takes_schedules():
    def fresh():
        model = net()
        optimizer = SaRA(model, fraction=0.2, lr=1e-2, progressive_at=4, rank_weight=1e-3, seed=5)
        return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 10)

    model, optimizer, schedule = fresh()
    train(model, optimizer, batches(6))
    schedule.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    train(model, optimizer, batches(4))
    again, other, plan = fresh()
    for part, state in zip((again, other, plan), saved, strict=True):
        part.load_state_dict(state)
    train(again, other, batches(4))
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_thresholds_and_analyses():
    model = net()
    size = sum(p.numel() for p in model.parameters())
    threshold = threshold_for(model, 0.1)
    zeroed = zero_smallest(model, 0.1)
    assert sum(int((p == 0).sum()) for p in zeroed.parameters()) == round(0.1 * size)
    drift = ineffective_drift(model, zeroed, threshold)
    assert drift["before"] == drift["after"] == pytest.approx(0.1, abs=1e-3)
    assert drift["left"] == drift["entered"] == 0
    zeros = nn.Linear(4, 4)
    nn.init.zeros_(zeros.bias)
    assert SaRA(zeros, fraction=0.05).zero_share == 1.0  # all exact zeros, though they are a fifth
    assert SaRA(net(), threshold=2e-3).param_groups[0]["lr"] == pytest.approx(1e-3 * math.exp(-0.7))


def test_it_lets_go_and_networks_stay_ordinary():
    model = net()
    optimizer = SaRA(model, threshold=1e-3)
    assert not model[4].bias.requires_grad or optimizer.mask("4.bias").any()
    with pytest.raises(ValueError, match="another optimizer"):
        SaRA(model, threshold=1e-3)
    assert isinstance(copy.deepcopy(model)(torch.zeros(1, 80)), torch.Tensor)
    optimizer.release()
    assert all(p.requires_grad for p in model.parameters())
    alive = weakref.ref(SaRA(model, fraction=0.1))
    gc.collect()
    assert alive() is None
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    train_tied = SaRA(tied, fraction=0.5, lr=0.1)
    tied(torch.randn(3, 6)).square().mean().backward()
    train_tied.step()
    assert tied[0].weight is tied[1].weight


def test_what_is_refused():
    with pytest.raises(ValueError, match="the smallest is 1"):
        SaRA([("a", nn.Parameter(torch.ones(3)))], threshold=0.5)
    for arguments in (
        {},
        {"threshold": 0.1, "fraction": 0.1},
        {"fraction": 0.0},
        {"fraction": math.nan},
        {"threshold": -1.0},
    ):
        with pytest.raises(ValueError, match="expected"):
            SaRA(net(), **arguments)
    with pytest.raises(ValueError, match="complex"):
        SaRA([("a", nn.Parameter(torch.ones(3, dtype=torch.cfloat)))], fraction=0.5)
    with pytest.raises(ValueError, match="no parameter"):
        SaRA(net(), fraction=0.1).mask("other")
    optimizer = SaRA(net(), fraction=0.1)
    with pytest.raises(ValueError, match="another mask"):
        optimizer.load_delta_state_dict({"0.weight": torch.ones(3)})


def test_contract_and_classes(tmp_path):
    data = load("digits")
    train_set = torch.utils.data.TensorDataset(data.train.tensors[0].flatten(1), data.train.tensors[1])
    torch.manual_seed(0)
    arguments = {"in_features": 64, "out_features": 10, "hidden": [70, 70]}
    model = MLP(**arguments)
    fit(model, train_set, epochs=1, seed=0, progress=False)
    done = check_adapter(lambda: SaRAAdapter(epochs=1), model, train_set,
                         {"build": "torchfolio.models:MLP", "arguments": arguments}, tmp_path,
                         data.test.tensors[0][:5].flatten(1), num_classes=10)  # fmt: skip
    assert 0 < done.report["still_trained"] <= done.report["trained"]
    with pytest.raises(ValueError, match="12"):
        SaRAAdapter(epochs=1).adapt(model, train_set, num_classes=12, device="cpu")


def test_a_model_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
                                 norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    _trains(unet, lambda: unet(torch.ones(2, 1, 8, 8), torch.tensor([3, 7])).sample.square().mean())


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    )
    ids = torch.arange(16).view(2, 8)
    _trains(model, lambda: model(ids, labels=ids).loss)


def _trains(model, loss):
    optimizer = SaRA(model, fraction=0.1, lr=1e-2)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    masks = {n: optimizer.mask(n) for n in before}
    first = float(loss().detach())
    for _ in range(3):
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < first
    assert all(torch.equal(p[~masks[n]], before[n][~masks[n]]) for n, p in model.named_parameters())
