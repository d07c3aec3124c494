"""Operations by formula; time of callables whose ratio is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.measure import Alternation, alternate, count_flops, flops_by_module


@pytest.mark.parametrize(("groups", "stride", "kernel"), [(1, 1, 3), (4, 1, 3), (1, 2, 5), (8, 2, 1)])
def test_convolution_by_formula(groups: int, stride: int, kernel: int) -> None:
    layer = nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups)
    out = layer(torch.zeros(2, 8, 12, 12))
    per_output = 2 * kernel**2 * 8 // groups
    assert count_flops(layer, torch.zeros(2, 8, 12, 12)) == out.numel() * per_output


def test_linear_forward_and_backward() -> None:
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    x = torch.randn(4, 6)
    first, second = 2 * 4 * 6 * 10, 2 * 4 * 10 * 3
    assert count_flops(net, x) == first + second
    # Backward: a product for every weight, and one for the input of each layer but the first.
    assert count_flops(net, x, backward=True) == first + second + first + 2 * second
    assert count_flops(net, x.requires_grad_(), backward=True) == 3 * (first + second)


def test_attention_by_formula() -> None:
    q = torch.randn(2, 3, 5, 4)  # batch, heads, positions, width
    expected = 2 * (2 * 2 * 3 * 5 * 5 * 4)
    assert count_flops(lambda q: (q @ q.mT).softmax(-1) @ q, q) == expected
    assert count_flops(lambda q: F.scaled_dot_product_attention(q, q, q), q) == expected
    # The fused backward pass computes the scores again: five products for two.
    both = count_flops(lambda q: F.scaled_dot_product_attention(q, q, q), q.requires_grad_(), backward=True)
    assert both == expected // 2 * 7


def test_counting_leaves_no_trace() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    net[0].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count_flops(net, torch.randn(8, 4), backward=True)
    flops_by_module(net, torch.randn(8, 4))
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    assert not net[0].training
    assert not net[0]._forward_hooks


def test_backward_needs_something_to_go_to() -> None:
    with pytest.raises(TypeError, match="return a tensor"):
        count_flops(lambda x: (x, x), torch.randn(2, 2, requires_grad=True), backward=True)
    with pytest.raises(ValueError, match="requires a gradient"):
        count_flops(lambda x: x @ x, torch.randn(2, 2), backward=True)


def test_table_of_modules_adds_up() -> None:
    shared = nn.Linear(5, 5)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU())
            self.mix = shared

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.mix(self.stem(x).mean(2)))

    net, x = Net(), torch.randn(3, 2, 7)
    table = flops_by_module(net, x)
    assert list(table.columns) == ["name", "type", "parameters", "flops", "shape"]
    assert list(table["name"]) == ["stem.0", "stem.1", "mix", "mix"]
    assert list(table["type"]) == ["Conv1d", "ReLU", "Linear", "Linear"]
    assert table["shape"].tolist()[0] == (3, 5, 7)
    assert list(table["flops"]) == [2 * 3 * 7 * 5 * 2 * 3, 0, 2 * 3 * 25, 2 * 3 * 25]
    assert sum(table["flops"]) == count_flops(net, x)
    assert sum(table["parameters"]) == sum(p.numel() for p in net.parameters())


def test_alternation_finds_a_known_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # a clock that only the callables move
    monkeypatch.setattr("torchfolio.measure.timing.timer", lambda: now[0])

    def short() -> None:
        now[0] += 0.004

    def long() -> None:
        now[0] += 0.012

    measured = alternate(short, long, repeats=5)
    assert measured.reference == "short"
    assert measured.ratio("short") == 1
    assert measured.ratio("long") == pytest.approx(3)
    low, high = measured.spread("long")
    assert low <= measured.ratio("long") <= high
    assert all(len(s) == 5 for s in measured.seconds.values())
    assert "ratio" in str(measured)
    assert list(measured.to_frame().columns) == ["seconds", "ratio", "low", "high"]


def test_ratios_are_paired_by_round() -> None:
    measured = Alternation({"a": [1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0]})
    assert measured.ratio("b") == 2
    assert measured.spread("b") == (2, 2)
    assert float(measured.to_frame().at["a", "seconds"]) == 10
    with pytest.raises(KeyError, match="expected one of a, b"):
        measured.ratio("c")


def test_every_round_calls_each_in_turn() -> None:
    calls: list[str] = []
    alternate(
        a=lambda: calls.append("a"),
        b=lambda: calls.append("b"),
        c=lambda: calls.append("c"),
        repeats=3,
        warmup=1,
        min_seconds=0,
    )
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"


def test_fast_callables_are_called_many_times_and_reported_once(monkeypatch) -> None:
    now = 0.0

    def tick() -> None:
        nonlocal now
        now += 1e-5

    # A clock that only the callable moves, so that a busy machine cannot disturb the count.
    monkeypatch.setattr("torchfolio.measure.timing.timer", lambda: now)
    measured = alternate(tick, lambda: None, repeats=2, warmup=1, min_seconds=1e-3)
    assert now == pytest.approx(1e-5 * (1 + 2 * 100), rel=0.02)  # one untimed call, two rounds of a hundred
    assert list(measured.seconds) == ["tick", "1"]
    assert measured.seconds["tick"] == pytest.approx([1e-5, 1e-5])


def test_alternation_needs_two_callables() -> None:
    with pytest.raises(ValueError, match="at least two callables, got 1"):
        alternate(print)
    with pytest.raises(ValueError, match="at least one round"):
        alternate(a=print, b=print, repeats=0)


@pytest.mark.parametrize(
    ("module", "inputs", "flops"),
    [
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(2, 5, 8)], 11_840),
        (nn.MultiheadAttention(8, 2, batch_first=True), [(2, 5, 8)] * 3, 6_720),
        (nn.LSTM(5, 10, batch_first=True), [(6, 10, 5)], 72_000),
        (nn.GRU(5, 10, batch_first=True), [(6, 10, 5)], 54_000),
        (nn.Bilinear(4, 5, 6), [(3, 4), (3, 5)], 2 * 3 * 4 * 5 * 6),
    ],
)
def test_fused_layers_cost_the_same_in_training_and_evaluation(module, inputs, flops):
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    for training in (True, False):
        module.train(training)
        assert count_flops(module, *map(torch.randn, inputs)) == flops
    assert before == (
        torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    )  # fmt: skip


def test_products_with_vectors():
    a, b = torch.randn(4, 5), torch.randn(5)
    assert count_flops(lambda x, y: x @ y, a, b) == 40
    assert count_flops(lambda x, y: torch.addmv(y[:4], x, y), a, b) == 40
    assert count_flops(torch.dot, b, b) == 10


def test_an_operator_without_a_formula_is_named():
    @torch.library.custom_op("torchfolio_tests::fast_linear", mutates_args=())
    def fast_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return x @ w

    with pytest.warns(UserWarning, match="not counted: fast_linear"):
        count_flops(lambda x, w: fast_linear(x, w), torch.randn(3, 4), torch.randn(4, 5))


@pytest.mark.parametrize(
    "function",
    [
        torch.linalg.inv,
        torch.linalg.svdvals,
        lambda x: torch.linalg.solve(x, x),
        torch.fft.fft,
        torch.linalg.cholesky_ex,
        lambda x: torch.cdist(x.repeat(10, 1), x),  # many rows go another way than few
    ],
)
def test_decompositions_and_transforms_are_named(function):
    with pytest.warns(UserWarning, match="not counted: "):
        assert count_flops(lambda x: function(x), torch.eye(4)) == 0


def test_norms_cost_nothing_and_added_batches_do():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_flops(lambda x: x.norm(dim=1), torch.randn(4, 4)) == 0
        assert (
            count_flops(lambda x: torch.addbmm(torch.zeros(4, 6), x, torch.randn(3, 5, 6)), torch.randn(3, 4, 5)) == 720
        )
