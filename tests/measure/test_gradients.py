"""Losses and gradients of single examples against loops over them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchfolio.measure import (
    Hessian,
    gradient_agreement,
    gradient_dict,
    loss_gradients,
    per_example_gradients,
    per_example_losses,
)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)).double()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(10, 1, 4, 4, dtype=torch.float64), torch.arange(10) % 3


@pytest.mark.parametrize("batch_size", [None, 4])
def test_losses_equal_the_criterion_without_reduction(
    net: nn.Sequential, data: tuple[Tensor, Tensor], batch_size: int | None
) -> None:
    losses = per_example_losses(net.eval(), F.cross_entropy, data, batch_size=batch_size)
    torch.testing.assert_close(losses, F.cross_entropy(net(data[0]), data[1], reduction="none").detach())
    assert not losses.requires_grad


def test_losses_of_a_regression_average_over_outputs(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    target = torch.randn(10, 3, dtype=torch.float64)
    losses = per_example_losses(net.eval(), F.mse_loss, (data[0], target))
    torch.testing.assert_close(losses, (net(data[0]) - target).square().mean(1).detach())


def test_losses_do_not_touch_running_statistics(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    per_example_losses(net.train(), F.cross_entropy, data)
    loss_gradients(net, F.cross_entropy, data)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize("batch_size", [None, 3])
def test_gradients_equal_a_loop(net: nn.Sequential, data: tuple[Tensor, Tensor], batch_size: int | None) -> None:
    net.eval()
    net[0].bias.requires_grad_(False)
    gradients = per_example_gradients(net, F.cross_entropy, data, batch_size=batch_size)
    assert set(gradients) == {n for n, p in net.named_parameters() if p.requires_grad}
    x, y = data
    for i in range(len(x)):
        net.zero_grad()
        F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]).backward()
        for name, gradient in gradient_dict(net).items():
            torch.testing.assert_close(gradients[name][i], gradient)


def test_mean_of_single_gradients_is_the_gradient(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    net.eval()
    single = per_example_gradients(net, F.cross_entropy, data)
    whole = loss_gradients(net, F.cross_entropy, data, batch_size=3)
    for name, gradient in whole.items():
        torch.testing.assert_close(single[name].mean(0), gradient)
    assert gradient_dict(net) == {}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False).eval()])
def test_batch_norm_that_mixes_examples_is_refused(norm: nn.Module) -> None:
    net = nn.Sequential(nn.Linear(3, 3), norm)
    with pytest.raises(ValueError, match="1 is a batch norm that mixes the examples"):
        per_example_gradients(net, F.cross_entropy, (torch.randn(4, 3), torch.zeros(4, dtype=torch.long)))


def test_nothing_to_differentiate(data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="requires a gradient, got none"):
        per_example_gradients(nn.Flatten(), F.cross_entropy, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_what_the_network_cannot_take_is_told(
    net: nn.Sequential, data: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    x, y = data[0].to(dtype), data[1]
    message = (
        rf"^the network \(its weights are torch.float64\) or its loss cannot take .*\(10, 1, 4, 4\) {dtype} and \(10,\)"
    )
    hessian = lambda *given: Hessian(*given)(torch.zeros(sum(p.numel() for p in net.parameters())).double())  # noqa: E731
    for measure in (per_example_losses, per_example_gradients, loss_gradients, hessian):
        with pytest.raises(ValueError, match=message) as caught:
            measure(net.eval(), F.cross_entropy, (x, y))
        assert "\n" not in str(caught.value)
        with pytest.raises(ValueError, match=r"cannot take .*torch.float64 and \(10,\) torch.float32"):
            measure(net.eval(), F.cross_entropy, (data[0], y.float()))


def test_gradient_dict_is_a_copy(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    F.cross_entropy(net(data[0]), data[1]).backward()
    held = gradient_dict(net)
    kept = {n: g.clone() for n, g in held.items()}
    net.zero_grad(set_to_none=False)
    assert all(torch.equal(held[n], kept[n]) for n in held)
    assert set(held) == {n for n, _ in net.named_parameters()}


def test_agreement_of_known_gradients() -> None:
    a = {"w": torch.tensor([3.0, 0.0, 0.0]), "b": torch.tensor([4.0])}
    b = {"b": torch.tensor([-2.0]), "w": torch.tensor([0.0, 0.0, 1.5])}
    agreement = gradient_agreement(a, b)
    assert agreement.cosine == pytest.approx(-8 / (5 * 2.5))
    assert agreement.norm_ratio == pytest.approx(2)
    assert agreement.sign == 0  # of three numbers: the one that is zero in both does not count
    table = agreement.by_parameter
    assert list(table.index) == ["w", "b"]
    assert table.loc["w", "cosine"] == 0
    assert table.loc["b", "cosine"] == pytest.approx(-1)
    assert table.loc["b", "norm_ratio"] == pytest.approx(2)


def test_agreement_with_itself_and_with_its_opposite(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    gradients = loss_gradients(net.eval(), F.cross_entropy, data)
    same = gradient_agreement(gradients, gradients)
    assert (same.cosine, same.sign, same.norm_ratio) == pytest.approx((1, 1, 1))
    opposite = gradient_agreement(gradients, {n: -3 * g for n, g in gradients.items()})
    assert (opposite.cosine, opposite.sign, opposite.norm_ratio) == pytest.approx((-1, 0, 1 / 3))


def test_agreement_with_nothing_is_undefined() -> None:
    agreement = gradient_agreement({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    assert math.isnan(agreement.cosine)
    assert math.isnan(agreement.norm_ratio)


def test_agreement_errors() -> None:
    with pytest.raises(ValueError, match=r"got \['b'\] on one side"):
        gradient_agreement({"w": torch.ones(2)}, {"w": torch.ones(2), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="got none"):
        gradient_agreement({}, {})
    with pytest.raises(ValueError, match=r"w has gradients of shapes \(2,\) and \(3,\)"):
        gradient_agreement({"w": torch.ones(2)}, {"w": torch.ones(3)})
    with pytest.raises(ValueError, match="the gradient of w is not finite"):
        gradient_agreement({"w": torch.tensor([torch.inf])}, {"w": torch.ones(1)})
