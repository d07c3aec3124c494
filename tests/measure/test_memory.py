"""Saved bytes against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from torchfolio.measure import SavedBytes, saved_bytes

BATCH, WIDTH = 8, 16
UNIT = BATCH * WIDTH * 4  # one activation in float32


def chain(layers: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(layers) for m in (nn.Linear(WIDTH, WIDTH), activation())])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, WIDTH)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_chain_saves_its_input_and_every_activation_once(x: Tensor, layers: int) -> None:
    net = chain(layers)
    measured = saved_bytes(lambda: net(x).sum().backward(), exclude=net)
    # The output of a ReLU is saved by the ReLU and again, as its input, by the next layer: one storage.
    assert measured == SavedBytes(peak=(layers + 1) * UNIT, total=(layers + 1) * UNIT)


def test_weights_count_unless_excluded(x: Tensor) -> None:
    net = chain(3)
    weights = 2 * WIDTH * WIDTH * 4  # the input gradient of the first layer is not needed, so its weight is not saved
    with_weights = saved_bytes(lambda: net(x).sum().backward())
    assert with_weights.peak - saved_bytes(lambda: net(x).sum().backward(), exclude=net).peak == weights
    assert saved_bytes(lambda: net(x).sum().backward(), exclude=[net, x]).peak == 3 * UNIT


def test_buffers_are_excluded_with_their_module(x: Tensor) -> None:
    net = nn.BatchNorm1d(WIDTH)
    measured = saved_bytes(lambda: net(x).sum().backward(), exclude=net)
    assert measured.peak == UNIT + 2 * WIDTH * 4  # the input, and the mean and deviation of the batch


def test_views_are_one_storage() -> None:
    x = torch.randn(BATCH, 2 * WIDTH, requires_grad=True)

    def gate() -> None:
        a, b = (2 * x).chunk(2, dim=1)
        (a * b).sum().backward()

    assert saved_bytes(gate).peak == 2 * UNIT


def test_backward_after_each_block_holds_one_block(x: Tensor) -> None:
    net = chain(6)

    def local() -> None:
        h = x
        for k in range(0, len(net), 2):
            h = net[k + 1](net[k](h.detach()))
            h.sum().backward()

    whole = saved_bytes(lambda: net(x).sum().backward(), exclude=net)
    blocks = saved_bytes(local, exclude=net)
    assert whole.peak == 7 * UNIT
    assert blocks.peak == 2 * UNIT
    # The output of a block is released and then saved again as the input of the next.
    assert blocks.total == 12 * UNIT


def test_a_graph_that_is_dropped_is_noticed(x: Tensor) -> None:
    net = chain(2)

    def twice(keep: bool) -> None:
        kept = [net(x).sum()]
        if not keep:
            kept.clear()
        net(x).sum().backward()

    assert saved_bytes(lambda: twice(keep=False), exclude=net).peak == 3 * UNIT
    assert saved_bytes(lambda: twice(keep=True), exclude=net).peak == 5 * UNIT  # the input is shared


def test_retained_graph_stays() -> None:
    x = torch.randn(BATCH, WIDTH, requires_grad=True)

    def twice() -> None:
        loss = x.exp().sum()
        loss.backward(retain_graph=True)
        x.exp().sum().backward()

    assert saved_bytes(twice).peak == 2 * UNIT


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_holds_the_inputs_and_one_recomputed_block(reentrant: bool) -> None:
    blocks = nn.ModuleList(chain(3, nn.Tanh) for _ in range(8))
    x = torch.randn(BATCH, WIDTH, requires_grad=True)

    def run(checkpointed: bool) -> None:
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=reentrant) if checkpointed else block(h)
        h.sum().backward()

    assert saved_bytes(lambda: run(False), exclude=blocks).peak == 25 * UNIT
    assert saved_bytes(lambda: run(True), exclude=blocks).peak == 11 * UNIT  # 8 inputs, 3 activations
    hook = checkpointing._recomputation_hook
    assert hook.__module__ == "torch.utils.checkpoint"  # nothing is left behind


def test_recomputation_inside_a_custom_backward_counts() -> None:
    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
            ctx.save_for_backward(x)
            ctx.block = block
            return block(x)

        @staticmethod
        def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                y = ctx.block(x)
            return torch.autograd.grad(y, x, grads)[0], None

    block = chain(3)
    x = torch.randn(BATCH, WIDTH, requires_grad=True)

    def run() -> None:
        out = Recompute.apply(x, block)
        assert isinstance(out, Tensor)
        out.sum().backward()

    assert saved_bytes(run, exclude=block).peak == 4 * UNIT


def test_nested_measurements_agree(x: Tensor) -> None:
    net = chain(4)
    inner: list[SavedBytes] = []

    def run() -> None:
        h = net[:4](x)
        inner.append(saved_bytes(lambda: net[4:](h).sum().backward(), exclude=net))

    outer = saved_bytes(run, exclude=net)
    assert outer.peak == 5 * UNIT
    assert inner[0].peak == 3 * UNIT
    assert saved_bytes(lambda: net(x).sum().backward(), exclude=net).peak == 5 * UNIT


def test_gradients_are_those_without_measuring(x: Tensor) -> None:
    net = chain(3)
    net(x).square().sum().backward()
    expected = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    saved_bytes(lambda: net(x).square().sum().backward())
    for p, g in zip(net.parameters(), expected, strict=True):
        assert torch.equal(p.grad, g)  # pyright: ignore[reportArgumentType]


def test_double_backward_works_under_measurement() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    second: list[Tensor] = []

    def run() -> None:
        (g,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
        second.extend(torch.autograd.grad(g.sum(), x))

    saved_bytes(run)
    assert torch.allclose(second[0], x.exp())


def test_meta_device_needs_no_memory() -> None:
    net = chain(3).to("meta")
    x = torch.empty(BATCH, WIDTH, device="meta")
    assert saved_bytes(lambda: net(x).sum().backward(), exclude=net).peak == 4 * UNIT


def test_an_error_ends_the_measurement(x: Tensor) -> None:
    net = chain(1)

    def fail() -> None:
        net(x)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        saved_bytes(fail)
    assert saved_bytes(lambda: net(x).sum().backward(), exclude=net).peak == 2 * UNIT


def test_exclude_takes_modules_and_tensors_only() -> None:
    with pytest.raises(TypeError, match="expected modules and tensors to exclude, got str"):
        saved_bytes(lambda: None, exclude=["weight"])  # pyright: ignore[reportArgumentType]
