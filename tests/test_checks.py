"""Checks of arguments: what passes, what is refused, and that NaN passes none."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchfolio import checks

NAN = float("nan")


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (checks.number, ()),
        (checks.at_least, (0,)),
        (checks.between, (0, 1)),
        (checks.positive, ()),
        (checks.one_of, ([1.0, NAN],)),
        (checks.finite, ()),
    ],
)
@pytest.mark.parametrize("value", [NAN, np.float32("nan"), torch.tensor(NAN)])
def test_nan_passes_none(check, arguments, value):
    with pytest.raises((ValueError, TypeError), match="rate"):
        check("rate", value, *arguments)


def test_whole_refuses_nan():
    with pytest.raises(TypeError, match="expected n to be a whole number, got nan"):
        checks.whole("n", NAN)


@pytest.mark.parametrize("value", ["3", None, True, [1], np.ones(2), torch.ones(2), 1j])
def test_what_is_no_number_is_a_type_error(value):
    for call in (lambda v: checks.at_least("a", v, 0), lambda v: checks.between("a", v, 0, 1)):
        with pytest.raises(TypeError, match="expected a to be a number"):
            call(value)
    with pytest.raises(TypeError, match="expected a to be a positive number"):
        checks.positive("a", value)


def test_values_come_back_as_given():
    assert checks.at_least("a", 3, 3) == 3
    assert isinstance(checks.between("a", np.float32(0.5), 0, 1), np.float32)
    assert checks.positive("a", math.pi) == math.pi
    assert checks.whole("n", np.int64(4)) == 4
    assert type(checks.whole("n", np.int64(4))) is int
    assert checks.one_of("mode", "sum", ["sum", "mean"]) == "sum"
    x = torch.rand(2, 3)
    assert checks.finite("x", x) is x


def test_ranges():
    with pytest.raises(ValueError, match="expected a of at least 2, got 1"):
        checks.at_least("a", 1, 2)
    with pytest.raises(ValueError, match="expected a of at least 2 and finite, got inf"):
        checks.at_least("a", math.inf, 2)
    with pytest.raises(ValueError, match="positive and finite, got 0"):
        checks.positive("a", 0)
    with pytest.raises(ValueError, match="positive and finite, got inf"):
        checks.positive("a", math.inf)
    with pytest.raises(ValueError, match=r"expected p in \[0, 1\), got 1"):
        checks.between("p", 1, 0, 1, inclusive=(True, False))
    with pytest.raises(ValueError, match=r"expected p in \(0, 1\), got 0"):
        checks.between("p", 0, 0, 1, inclusive=False)
    assert checks.between("p", 0, 0, 1, inclusive=(True, False)) == 0


def test_whole_numbers():
    with pytest.raises(TypeError, match=r"whole number of at least 1, got 3\.0"):
        checks.whole("n", 3.0, 1)
    with pytest.raises(TypeError, match="got True"):
        checks.whole("n", True)
    with pytest.raises(ValueError, match="from 1 to 4, got 5"):
        checks.whole("n", 5, 1, 4)
    with pytest.raises(ValueError, match="of at most 4, got 5"):
        checks.whole("n", 5, high=4)


def test_options():
    with pytest.raises(ValueError, match="expected mode to be 'mean' or 'sum', got 'mena'; did you mean 'mean'"):
        checks.one_of("mode", "mena", ("mean", "sum"))
    with pytest.raises(ValueError, match="got True"):
        checks.one_of("order", True, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_finite_tensors(dtype):
    x = torch.ones(4, dtype=dtype)
    checks.finite("x", x)
    x[1] = NAN
    with pytest.raises(ValueError, match="expected x to be finite, 1 of 4 entries are NaN or infinite"):
        checks.finite("x", x)


def test_finite_where_the_sum_overflows_and_of_other_values():
    checks.finite("x", torch.full((4,), 3e38))
    checks.finite("n", torch.arange(3))
    checks.finite("n", [1.0, 2.0])
    with pytest.raises(ValueError, match="expected n to be finite, got inf"):
        checks.finite("n", math.inf)
    with pytest.raises(ValueError, match="2 of 3"):
        checks.finite("n", np.array([1, NAN, -math.inf]))
    with pytest.raises(TypeError, match="to hold numbers"):
        checks.finite("n", "text")
    # Opposite infinities sum to NaN, not to a finite number.
    with pytest.raises(ValueError, match="2 of 2"):
        checks.finite("x", torch.tensor([math.inf, -math.inf]))


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_labels(make):
    y = make([0, 2, 1])
    assert checks.labels(y, 3) is y
    with pytest.raises(ValueError, match="labels from 0 to 1, got 0 to 2"):
        checks.labels(y, 2)
    with pytest.raises(ValueError, match="0 upwards, got -1 to 1"):
        checks.labels(make([-1, 1]))
    with pytest.raises(TypeError, match="whole numbers"):
        checks.labels(make([0.0, 1.0]))
    with pytest.raises(TypeError, match="whole numbers"):
        checks.labels(make([True, False]))
    with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
        checks.labels(make([[0, 1]]))
    checks.labels(make([0, -100]), 2, ignore_index=-100)


def test_labels_empty_or_no_array():
    with pytest.raises(ValueError, match="one example or more"):
        checks.labels(torch.zeros(0, dtype=torch.long))
    with pytest.raises(TypeError, match="tensor or array of labels, got list"):
        checks.labels([0, 1])


def test_networks():
    net = torch.nn.Linear(2, 2)
    net.register_buffer("mask", torch.tensor([0, -math.inf]))
    assert checks.network(net) is net
    checks.network(torch.nn.Linear(1, 1).half().requires_grad_(False).apply(lambda m: m.weight.fill_(6e4)))
    net.get_buffer("mask")[0] = NAN
    with pytest.raises(ValueError, match="the network holds NaN or infinity in mask"):
        checks.network(net)
    with torch.no_grad():
        net.bias[0] = math.inf
    with pytest.raises(ValueError, match="the teacher holds NaN or infinity in bias"):
        checks.network(net, "the teacher")


def test_images():
    x = torch.rand(2, 3, 4, 4)
    assert checks.images(x, unit=True) is x
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\)"):
        checks.images(x[0])
    with pytest.raises(TypeError, match=r"floating point, got torch\.uint8"):
        checks.images(x.byte())
    with pytest.raises(ValueError, match=r"in \[0, 1\], got values from"):
        checks.images(x * 255, unit=True)
    with pytest.raises(ValueError, match="finite"):
        checks.images(x / 0)
    with pytest.raises(TypeError, match="got ndarray"):
        checks.images(x.numpy())


def test_lengths():
    assert checks.same_length(x=[1, 2], y=torch.ones(2, 5)) == 2
    with pytest.raises(ValueError, match="expected x and y of the same length, x has 1, y has 2"):
        checks.same_length(x=[1], y=[1, 2])


def test_needs_no_torch():
    code = "import sys, torchfolio.checks; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
